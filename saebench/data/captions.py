"""Captions: one text for each image of a split, for image-text retrieval.

A form finds them where its entry says (`caption` of `[folder]`, `[tar]` and `[hub]`). White space
around one is taken off, so that they are the same in every form.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from saebench.data.texts import Picked, Texts
from saebench.errors import DataError

if TYPE_CHECKING:
    from saebench.data.dataset import Dataset


def texts_of(captions: Iterable[str], whose: Callable[[int], str]) -> Texts:
    """Captions as they are written, each without the white space around it. Some may be empty.

    whose: says for a message which image a caption is of.
    Errors: DataError for one that holds a NUL, or half of a surrogate pair, which is no letter.
    """

    def clean() -> Iterator[str]:
        for place, caption in enumerate(captions):
            if "\0" in caption or not (caption.isascii() or _is_text(caption)):
                raise DataError(
                    f"the caption of {whose(place)} is no text: {caption[:60]!a}",
                    "write captions in UTF-8, without NUL",
                )
            yield caption.strip()

    return Texts.of(clean())


def _is_text(caption: str) -> bool:
    try:
        caption.encode()
    except UnicodeEncodeError:
        return False
    return True


def all_there(captions: Sequence[str], ids: Sequence[str], where: str) -> None:
    """Errors: DataError where images have no caption, naming the first of them."""
    empty = [place for place, caption in enumerate(captions) if not caption]
    if empty:
        raise DataError(
            f"{where}: {len(empty)} of {len(captions)} images have no caption, the first is "
            f"'{ids[empty[0]]}'",
            "write one for each image; or remove `caption` from the entry, and retrieval is not "
            "measured",
        )


def evaluated_captions(dataset: Dataset | None, split: str, n_images: int) -> Sequence[str]:
    """The captions of the first n images of a split's order; empty where there are none."""
    if dataset is None or not dataset.has_captions:
        return ()
    return Picked(dataset.captions(split), dataset.manifest(split).order(n_images))


def captions_sha256(captions: Sequence[str]) -> str:
    """Hash of captions in their order; '' where there are none."""
    if not captions:
        return ""
    digest = hashlib.sha256(b"saebench captions 1\n")
    for caption in captions:
        digest.update(caption.encode() + b"\0")
    return digest.hexdigest()
