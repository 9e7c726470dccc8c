"""Reads pickles without running their code: plain data, tensors, and configuration objects.

A pickle is a program. Archives of torch go through `torch.load(weights_only=True)`; a bare pickle
(ViT-Prisma's and PatchSAE's .pkl.gz) goes through an unpickler that knows the few names below.
The configuration objects that those projects save become stubs: their classes are never imported,
and a stub only holds attributes. Every other name is refused, and named.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from saebench.errors import WeightsError

# Classes of configurations that are saved whole, whatever module their project had them in.
_CONFIG_CLASSES = frozenset(
    {
        "VisionModelSAERunnerConfig",  # ViT-Prisma
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
_PATHS = frozenset({"pathlib.PosixPath", "pathlib.PurePosixPath", "pathlib._local.PosixPath"})
_STORAGES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_DTYPES = ("float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8")


class Stub:
    """Stands for a configuration object: attributes and nothing else."""

    def __init__(self, *_: Any, **attributes: Any) -> None:
        self.__dict__.update(attributes)

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.__dict__.update({str(key): value for key, value in state.items()})


def read_torch(file: BinaryIO, where: Path) -> Any:
    """What `torch.save` wrote. Errors: WeightsError (needs code, damaged)."""
    stubs = _stubs_for(file, where)
    try:
        with torch.serialization.safe_globals(stubs):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _needs_code(where, [_first_line(error)]) from None
    except MemoryError:
        raise
    except Exception as error:
        raise damaged(where, error) from None


def _stubs_for(file: BinaryIO, where: Path) -> list[Any]:
    """Stubs for the classes that an archive names. Errors: WeightsError for any other."""
    start = file.tell()
    try:
        names = torch.serialization.get_unsafe_globals_in_checkpoint(file)  # type: ignore[arg-type]
    except Exception:
        names = []  # a file of torch's old kind is not looked into: nothing is stubbed
    file.seek(start)
    foreign = [name for name in names if not _is_config(name) and name not in _PATHS]
    if foreign:
        raise _needs_code(where, foreign)
    return [(PurePosixPath if name in _PATHS else Stub, name) for name in names]


def _is_config(name: str) -> bool:
    return name.rpartition(".")[2] in _CONFIG_CLASSES


def read_bare_pickle(data: bytes, where: Path) -> Any:
    """What `pickle.dump` wrote. Errors: WeightsError (needs code, damaged)."""
    try:
        return _Unpickler(io.BytesIO(data)).load()
    except pickle.UnpicklingError as error:
        raise _needs_code(where, [_first_line(error)]) from None
    except MemoryError:
        raise
    except Exception as error:
        raise damaged(where, error) from None


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full in _PATHS:
            return PurePosixPath
        if full in _ALLOWED:
            return _ALLOWED[full]
        if _is_config(full):
            return Stub
        raise pickle.UnpicklingError(full)

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"a reference to {type(pid).__name__} outside the file")


def _load_from_bytes(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


_ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": OrderedDict,
    "torch._utils._rebuild_tensor_v2": torch._utils._rebuild_tensor_v2,  # type: ignore[attr-defined]
    "torch._utils._rebuild_parameter": torch._utils._rebuild_parameter,  # type: ignore[attr-defined]
    "torch.storage._load_from_bytes": _load_from_bytes,
    "torch.device": torch.device,
    "torch.Size": torch.Size,
    **{f"torch.{name}Storage": getattr(torch, f"{name}Storage") for name in _STORAGES},
    **{f"torch.{name}": getattr(torch, name) for name in _DTYPES},
}


def plain(value: Any) -> Any:
    """A configuration as dicts of plain values: a stub's attributes, a path as its text."""
    if isinstance(value, Stub):
        return {key: plain(item) for key, item in vars(value).items()}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, (PurePosixPath, torch.dtype, torch.device)) else value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested containers and stubs, each once."""
    seen, waiting = set[int](), [value]
    while waiting:
        one = waiting.pop()
        if id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, Mapping):
            waiting += one.values()
        elif isinstance(one, (list, tuple, set)):
            waiting += one
        elif isinstance(one, Stub):
            waiting += vars(one).values()


def check_tensors(value: Any, where: Path) -> None:
    """Errors: WeightsError for a tensor that claims more than is stored, or is no plain one."""
    for tensor in tensors_in(value):
        kind = type(tensor)
        if kind not in (Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
            raise WeightsError(f"{where} holds a tensor that is not plain ({tensor.layout})")
        if tensor.is_quantized or tensor.is_meta:
            raise WeightsError(f"{where} holds a quantised tensor, or one without values")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
            raise WeightsError(
                f"{where} holds a tensor of shape {list(tensor.shape)} and not that many values",
                "no library writes such a file: do not use it",
            )


def damaged(where: Path, error: BaseException) -> WeightsError:
    """A file that cannot be read to its end."""
    return WeightsError(
        f"{where} cannot be read: {_first_line(error)}",
        f"it has {where.stat().st_size:,} bytes, and is truncated or damaged: get it again",
    )


def _needs_code(where: Path, names: list[str]) -> WeightsError:
    return WeightsError(
        f"{where} needs code to be read: {', '.join(names[:4])}",
        "it is not run here: where it was written, and where you trust it, save the weights alone, "
        "torch.save(sae.state_dict(), path)",
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
