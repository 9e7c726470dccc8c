"""What pickles of SAEs name beside tensors: configuration objects, paths, NumPy numbers.

ViT-Prisma, PatchSAE and others save their configuration whole. Its class is never imported: a stub
holds its attributes. Every other name is refused, and named (`saebench.pickles`).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch

from saebench import torchfiles
from saebench.errors import WeightsError
from saebench.plainvalues import Damaged, ForeignName, Span, Stub, Unsupported, a

# Classes of configurations that are saved whole, whatever module their project had them in.
_CONFIG_CLASSES = frozenset(
    {
        "VisionModelSAERunnerConfig",  # ViT-Prisma, its V-JEPA runner, its model's configuration
        "JEPABaseConfig",
        "HookedViTConfig",
        "ViTSAERunnerConfig",  # HugoFry, PatchSAE, ConceptScope
        "ViTSAERunnerConfig_",
        "VisionSAERunnerConfig",
        "SAERunnerConfig",
        "LanguageModelSAERunnerConfig",  # SAELens 2
        "CacheActivationsRunnerConfig",
        "RunnerConfig",
        "Config",
    }
)


class NumpyDtype:
    """Stands for a NumPy dtype: the code and byte order of a number that follows."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code, self.order = code, "<"

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


def numpy_number(dtype: Any, data: Any = None) -> float | int:
    """A NumPy number as Python's own: MSAE saves one among its tensors."""
    kinds = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i"}
    if (
        not isinstance(dtype, NumpyDtype)
        or dtype.code not in kinds
        or dtype.order not in ("<", ">")
    ):
        raise Unsupported("a NumPy value that is no number of a usual kind")
    return struct.unpack(dtype.order + kinds[dtype.code], a(Span, data).read())[0]


def path_text(*parts: Any) -> str:
    """A path as its text: of paths that are made of paths, each may be twice the one before."""
    return str(PurePosixPath(*(a(str, part) for part in parts)))


_NAMES: Mapping[str, Any] = {
    "pathlib.PosixPath": path_text,
    "pathlib.PurePosixPath": path_text,
    "pathlib._local.PosixPath": path_text,
    "numpy.dtype": NumpyDtype,
    "numpy.core.multiarray.scalar": numpy_number,
    "numpy._core.multiarray.scalar": numpy_number,
}


def named(name: str) -> Any:
    """What stands for a name of a pickle. Errors: KeyError for one that is not known."""
    return Stub if name.rpartition(".")[2] in _CONFIG_CLASSES else _NAMES[name]


def read_torch(path: Path, offset: int = 0) -> Any:
    """What `torch.save` wrote, from `offset` on. Errors: WeightsError (needs code, damaged)."""
    return _read(path, lambda: torchfiles.read_torch(path, named, offset))


def read_bare(file: BinaryIO, where: Path) -> Any:
    """What `pickle.dump` wrote. Errors: WeightsError (needs code, damaged)."""
    return _read(where, lambda: torchfiles.read_bare(file, named))


def _read(where: Path, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ForeignName as error:
        raise WeightsError(
            f"{where} needs code to be read: {error}",
            "it is not run here: where it was written, and where you trust it, save the weights "
            "alone, torch.save(sae.state_dict(), path)",
        ) from None
    except torchfiles.TorchScript:
        raise WeightsError(
            f"{where} is a TorchScript archive: a program, not only weights",
            "save the state dict where it was written: torch.save(sae.state_dict(), path)",
        ) from None
    except Unsupported as error:
        raise unsupported(where, error) from None
    except (Damaged, OSError) as error:
        raise damaged(where, error) from None


def plain(value: Any) -> Any:
    """A configuration as dicts of plain values: a stub's attributes."""
    if isinstance(value, Stub):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value)
    return str(value) if isinstance(value, torch.dtype) else value


def damaged(where: Path, error: BaseException) -> WeightsError:
    """A file that cannot be read to its end."""
    first = (str(error).splitlines() or [type(error).__name__])[0]
    return WeightsError(
        f"{where} cannot be read: {first}",
        f"it has {where.stat().st_size:,} bytes, and is truncated or damaged: get it again",
    )


def unsupported(where: Path, error: Unsupported) -> WeightsError:
    """A file that may be sound, of a kind that is not read."""
    return WeightsError(
        f"{where} is not read: {error}",
        "where it was written, save the weights alone again, as safetensors",
    )
