"""What every dataset offers: names, a manifest for each split, and one image at a time."""

from __future__ import annotations

import errno
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from saebench.data.manifest import Manifest
from saebench.data.templates import templates_of
from saebench.errors import DataError, ImageError, SaebenchError, SpecError
from saebench.specs import DatasetSpec

if TYPE_CHECKING:
    from PIL.Image import Image


class Dataset(ABC):
    """A labelled image dataset.

    `class_names[c]` names main label c. `label_names[level][v]` names value v of a label level; the
    levels of a manifest have exactly these keys. Instances are picklable, for worker processes.
    `text_names[kind][c]` is what class c is called in texts: `default` wherever there are texts,
    and where a dataset has more, `common`, `scientific`, `taxonomic`.
    """

    splits: tuple[str, ...]
    class_names: tuple[str, ...]
    label_names: Mapping[str, tuple[str, ...]]
    decodes: bool = False  # from files, which takes long enough for processes of its own
    has_captions: bool = False  # whether `captions` gives any
    resolved_revision: str = ""  # of a hub dataset: the commit that is read

    def __init__(self, spec: DatasetSpec, *, options: Sequence[str] = ()) -> None:
        """`options` are the keys of `spec.options` that this reader knows."""
        self.spec = spec
        self._manifests: dict[str, Manifest] = {}
        unknown = sorted(set(spec.options) - set(options))
        if unknown:
            raise SpecError(
                f"{spec.path or spec.name}: source '{spec.source}' has no option '{unknown[0]}'",
                f"its options: {', '.join(options)}" if options else "it has no options",
            )

    def manifest(self, split: str) -> Manifest:
        """The split's rows; built once. Errors: DataError for an unknown split."""
        if split not in self.splits:
            raise DataError(
                f"dataset '{self.spec.name}' has no split '{split}'",
                f"its splits: {', '.join(self.splits)}",
            )
        if split not in self._manifests:
            self._manifests[split] = self._build_manifest(split)
        return self._manifests[split]

    @property
    def text_names(self) -> Mapping[str, tuple[str, ...]]:
        """Kind of class name -> [c] names, for zero-shot texts; empty where there are none."""
        return {"default": self.class_names}

    def captions(self, split: str) -> Sequence[str]:
        """One caption for each row of the split's manifest; empty where the dataset has none."""
        return ()

    @property
    def templates(self) -> tuple[str, ...]:
        """Zero-shot texts of the entry, with {} for the name; empty where it has none."""
        return templates_of(self.spec)

    def fetch(self) -> str:
        """Get what has to be downloaded, ahead of time; say in a few words what that was."""
        return ""

    def image(self, split: str, index: int) -> Image:
        """Decode row `index` of the split's manifest: PIL, 8-bit RGB.

        Errors: ImageError naming an image that does not decode; DataError where the disk or the
        network fails, or the file is gone.
        """
        manifest = self.manifest(split)
        n = len(manifest)
        if not 0 <= index < n:
            raise DataError(
                f"dataset '{self.spec.name}', split '{split}' has no row {index}",
                f"its rows are 0 to {n - 1}",
            )
        try:
            return self._decode(split, int(index))
        except (SaebenchError, MemoryError):
            raise
        except Exception as error:
            raise undecodable(manifest.ids[index], self.spec.name, error) from error

    @abstractmethod
    def _build_manifest(self, split: str) -> Manifest: ...

    @abstractmethod
    def _decode(self, split: str, index: int) -> Image: ...


_OF_ONE_FILE = (errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG)


def undecodable(id: str, dataset: str, error: Exception) -> DataError:
    """The error to raise for an image, after what `error` says.

    An ImageError where it is about this one image. A disk or a network that fails is about all of
    them, and so is a file that was listed and is gone, or may not be read: were such images left
    out, numbers would come from whatever was left.
    """
    what = f"image '{id}' of dataset '{dataset}'"
    code = error.errno if isinstance(error, OSError) else None
    if not code or code in _OF_ONE_FILE:
        return ImageError(
            f"{what} cannot be decoded: {error or type(error).__name__}",
            "replace the file, or leave such images out with  --bad-images skip",
        )
    if code in (errno.ENOENT, errno.ENOTDIR):
        return DataError(
            f"{what} was there when the dataset was listed and is gone: {error}",
            "is the disk still mounted? Are all links to files that are there? Then run it again",
        )
    if code in (errno.EACCES, errno.EPERM):
        return DataError(f"{what} may not be read: {error}", "mend the permissions of its files")
    return DataError(f"{what} cannot be read: {error}", "run it again once the disk answers")
