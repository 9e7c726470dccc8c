"""The rows of one tar shard: members whose names are alike up to the first dot are a sample.

    n01440764_10026.jpg   the image: .jpg .jpeg .png .webp (and the other image suffixes)
    n01440764_10026.cls   the label, a number or a name; with label = "json:<key>" in the .json
    n01440764_10026.txt   the caption, where the entry asks for it; with "json:<key>" in the .json

With label = "folder" there are no samples: every image file is a row, and its label is the first
folder of its name, below one that is called as the split or its shards (`train_mini/` in
`train_mini-000.tar`; `birds/` in `birds.tar`, where the pattern is `*.tar`). So a folder per class
that was packed with `tar` is read as it is. A hard link is the image it stands for; a symbolic
link, whose image lies elsewhere, is an error.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from saebench.data.scan import SUFFIXES
from saebench.data.tarindex import Member, members
from saebench.errors import DataError


class Row(NamedTuple):
    """An image of a shard: where it is, its label as text, its caption ('' for none)."""

    key: str
    offset: int
    size: int
    label: str
    caption: str = ""


def rows_of(
    path: Path, label: str, above: Sequence[str | None], caption: str | None = None
) -> Iterator[Row]:
    """Each image of a shard. caption: the member that holds it, where it is asked for."""
    if label != "folder":
        for sample in _samples(path).values():
            yield _row(path, label, sample, caption)
        return
    images = [
        (name, member.offset, member.size)  # millions of them, and a member holds bytes of its file
        for name, member in _files(path)
        if _suffix(name) in SUFFIXES
    ]
    tops = {top for top in above if top}
    # A shard's own name may be its class (`cat.tar` of `cat/`), with folders for some of it.
    if None in above and all(_below_top(name, {path.stem}) != name for name, *_ in images):
        tops.add(path.stem)
    for name, offset, size in images:
        key = _below_top(name, tops)
        folder, slash, _ = key.partition("/")
        if not slash:
            raise _unlabelled(path, name, "it lies in no folder", label)
        yield Row(key, offset, size, folder)


def _below_top(name: str, tops: set[str]) -> str:
    """A name without the folder that was packed as a whole."""
    top, _, below = name.partition("/")
    return below if top in tops and "/" in below else name


def _files(path: Path) -> Iterator[tuple[str, Member]]:
    """The files of a shard that are not hidden, by their names.

    Errors: DataError for a link that stands for an image, or a folder, that is not in the shard.
    """
    for member in members(path):
        name = _clean(member.name)
        if _hidden(name):
            continue
        if not member.link:
            yield name, member
        elif _suffix(name) in SUFFIXES or not _suffix(name):
            raise DataError(
                f"{path}: '{name}' is a link to '{member.link}', and what it links to was not "
                "packed in its place",
                f"pack the shard again with -h, which follows links:  tar -h -cf {path.name} …",
            )


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def _samples(path: Path) -> dict[str, dict[str, Member]]:
    """Key -> suffix, in small letters and without its dot -> member."""
    samples: dict[str, dict[str, Member]] = {}
    for name, member in _files(path):
        folder, slash, file = name.rpartition("/")
        stem, dot, suffix = file.partition(".")
        if not dot:
            continue
        sample = samples.setdefault(f"{folder}{slash}{stem}", {})
        if suffix.lower() in sample:
            raise DataError(f"{path} holds '{name}' twice", "write the shard again")
        sample[suffix.lower()] = member
    return samples


def _row(path: Path, label: str, sample: Mapping[str, Member], caption: str | None = None) -> Row:
    images = [member for suffix, member in sample.items() if f".{suffix}" in SUFFIXES]
    name = _clean(next(iter(sample.values())).name)
    if len(images) != 1:
        raise DataError(
            f"{path}: the sample of '{name}' has {len(images) or 'no'} images (members: "
            f"{', '.join(sample)})",
            "a sample is one image and its label; if the shard is a packed folder, say "
            '[tar] label = "folder"',
        )
    image = images[0]
    suffix, _, key = label.partition(":")
    if suffix not in sample:
        raise _unlabelled(path, _clean(image.name), f"members: {', '.join(sample)}", label)
    try:
        text = _content(path, sample[suffix])
        found = _json_label(text, key) if key else text.strip()
        if not found:
            raise ValueError("it is empty")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: '{_clean(sample[suffix].name)}' holds no label: {error!r}",
            "it has to hold a number or the name of a class",
        ) from None
    told = "" if caption is None else _caption(path, caption, sample)
    return Row(_clean(image.name), image.offset, image.size, found, told)


def _caption(path: Path, caption: str, sample: Mapping[str, Member]) -> str:
    """What a sample says its image shows; '' where it says nothing."""
    suffix, _, key = caption.partition(":")
    if suffix not in sample:
        return ""
    try:
        text = _content(path, sample[suffix])
        value: Any = json.loads(text).get(key) if key else text
        if isinstance(value, list) and all(isinstance(one, str) for one in value):
            value = value[0] if value else ""
        if not isinstance(value, str | None):
            raise ValueError(f"{key} is {value!r}")
    except (ValueError, AttributeError) as error:
        raise DataError(
            f"{path}: '{_clean(sample[suffix].name)}' holds no caption: {error!r}",
            "it has to hold a text, or a list of texts, of which the first counts",
        ) from None
    return value or ""


def _content(path: Path, member: Member) -> str:
    if len(member.start) == member.size:
        return member.start.decode()
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), member.size, member.offset).decode()


def _json_label(text: str, key: str) -> str:
    value: Any = json.loads(text)[key]
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError(f"{key} is {value!r}")
    return str(value)


def _unlabelled(path: Path, name: str, why: str, label: str) -> DataError:
    return DataError(
        f"{path}: '{name}' has no label ({why})",
        f'[tar] label is "{label}" in the entry; it may be "cls", "json:<key>" or "folder"',
    )


def _clean(name: str) -> str:
    return name.removeprefix("./").lstrip("/")


def _hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
