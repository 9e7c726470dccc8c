"""An SAE as plain JSON and named tensors, and back: version 2 of saebench's own format.

Every part of an `Sae` is a frozen dataclass of tensors, plain values and further parts. A part
becomes {"part": class, field: value, …} without the fields at their defaults; a tensor becomes
{"tensor": name}, one name for one tensor, so that a pre-bias that is the decoder's stays so.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any

from torch import Tensor

from saebench.activations import (
    Absolute,
    Gated,
    GroupMax,
    LatentNorm,
    LeakyReLU,
    Squash,
    Threshold,
    TopK,
)
from saebench.errors import WeightsError
from saebench.inputs import InTurn, LayerNorm, Length, OneWay, Scaling
from saebench.pursuit import MatchingPursuit, OrthogonalMatchingPursuit
from saebench.saes import Sae
from saebench.trunk import Block, Trunk

PARTS: Mapping[str, type] = {
    part.__name__: part
    for part in (
        *(Threshold, TopK, GroupMax, Gated, LeakyReLU, LatentNorm, Absolute, Squash),
        *(MatchingPursuit, OrthogonalMatchingPursuit),
        *(Scaling, LayerNorm, Length, InTurn, OneWay),
        *(Trunk, Block),
        Sae,
    )
}
_NOT_STORED = ("record", "stored_dtype")  # of the file that an SAE was read from


def taken_apart(sae: Sae) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What an SAE is as plain JSON, and its tensors by name."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}

    def plain(value: Any, name: str) -> Any:
        if isinstance(value, Tensor):
            if id(value) not in names:
                names[id(value)], tensors[name] = name, value
            return {"tensor": names[id(value)]}
        if isinstance(value, tuple):
            return [plain(item, f"{name}.{i}") for i, item in enumerate(value)]
        if not is_dataclass(value):
            return value
        if type(value).__name__ not in PARTS:
            raise WeightsError(
                f"saebench's own format has no place for {type(value).__name__}",
                "keep the file that it came in",
            )
        shown: dict[str, Any] = {"part": type(value).__name__}
        for field in fields(value):
            held = getattr(value, field.name)
            if field.name not in _NOT_STORED and not _is_default(held, field.default):
                shown[field.name] = plain(held, f"{name}.{field.name}" if name else field.name)
        return shown

    return plain(sae, ""), tensors


def _is_default(held: Any, default: Any) -> bool:
    if default is MISSING or isinstance(held, Tensor) or isinstance(default, Tensor):
        return False
    return held is default or (type(held) is type(default) and held == default)


def put_together(shown: Mapping[str, Any], tensors: Mapping[str, Tensor], dtype: str) -> Sae:
    """The SAE of `taken_apart`. Errors: WeightsError for whatever does not fit together."""
    used: set[str] = set()

    def value_of(item: Any) -> Any:
        if isinstance(item, list):
            return tuple(value_of(one) for one in item)
        if not isinstance(item, Mapping):
            return item
        if "tensor" in item:
            used.add(item["tensor"])
            return tensors[item["tensor"]]
        rest = {name: value_of(value) for name, value in item.items() if name != "part"}
        return PARTS[item["part"]](**rest)

    try:
        if shown["part"] != "Sae":
            raise KeyError(shown["part"])
        sae = value_of({**shown, "stored_dtype": dtype})
        # Parts that do not work together show at the first row.
        sae.decode(sae.encode(sae.b_enc_s.new_zeros(1, sae.d_model)))
    except WeightsError:
        raise
    except Exception as error:
        raise WeightsError(
            f"its parts do not make an SAE: {type(error).__name__}: {error}",
            "it is damaged, or of a newer saebench",
        ) from None
    if strange := set(tensors) - used:
        raise WeightsError(f"nothing in it uses the tensors {', '.join(sorted(strange))}")
    return sae
