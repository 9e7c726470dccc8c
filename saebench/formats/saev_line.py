"""The line of JSON before the archive of a saev file, in all its forms.

no schema   the configuration itself; its activation is a ReLU
1, form A   {schema, cfg, cls, commit, lib}: cls is the activation, its k is cfg.top_k
1, form B   cls is SparseAutoencoderConfig, cfg.activation is {cls, params}
2 to 5      without cls. 4: d_sae for exp_factor; 5: what is in params is {cls, params} too
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saebench.errors import WeightsError
from saebench.formats.content import refuse_unknown
from saebench.formats.tensors import whole

_KEYS = {"Relu": "relu", "TopK": "top-k", "BatchTopK": "batch-top-k"}  # class -> `key` or `kind`
_CLASS = "SparseAutoencoderConfig"
_LINE = {"schema", "cfg", "cls", "commit", "lib"}
_SIZES = {"d_vit", "d_model", "exp_factor", "d_sae"}
_TRAINING = {
    *("n_reinit_samples", "reinit_blend", "reinit_enc_dec_tranpose", "seed"),
    *("remove_parallel_grads", "normalize_w_dec"),
    *("sparsity_coeff", "l1_coeff", "ghost_grads", "use_ghost_grads"),
}
_PARAMS = {"top_k", "kind", "key", "sparsity", "aux", "momentum"}
_AFTER = (
    *("e7ca004", "ab690dc", "fad9929", "795479b", "5056de4", "9f39cf8", "6845bc2", "5fee417"),
    *("ea2c9f5", "8aecac1", "f5d892c", "65c5a2b"),
)
"""The commits of schema 1 that read x itself, all of 2025-07-31."""


@dataclass(frozen=True)
class Line:
    """What the line says, whatever its form. `schema` 0: there is none."""

    schema: int
    config: Mapping[str, Any]
    activation: str
    params: Mapping[str, Any]
    commit: str = "unknown"
    within: bool = True  # whether the activation is inside the configuration

    @property
    def dated(self) -> bool:
        """Whether it names the commit that wrote it."""
        return self.commit != "unknown"

    @property
    def after(self) -> bool:
        """Whether it is known to be written by code that reads x itself, and as it is."""
        return self.schema > 1 or self.commit.startswith(_AFTER)


def parsed(line: Mapping[str, Any]) -> Line:
    """Errors: WeightsError for a schema, a class or a key that is not known."""
    if "schema" not in line:
        refuse_unknown(set(line), _SIZES | _TRAINING, "the configuration of saev's first files")
        return Line(0, line, "Relu", {})
    schema, config = line["schema"], line.get("cfg")
    if isinstance(schema, bool) or schema not in (1, 2, 3, 4, 5):
        raise WeightsError(
            f"it is of schema {schema!r:.80} of saev, and this saebench reads 1 to 5",
            "pip install --upgrade saebench-vision",
        )
    if not isinstance(config, Mapping):
        raise WeightsError("its line of JSON has no  cfg")
    refuse_unknown(set(line), _LINE, "saev's line of JSON")
    commit = str(line.get("commit", "unknown"))
    name = str(line.get("cls", _CLASS))
    if schema == 1 and name in _KEYS:
        refuse_unknown(set(config), _SIZES | _TRAINING | {"top_k"}, "saev's cfg")
        return Line(schema, config, name, config, commit, within=False)
    if name != _CLASS:
        raise WeightsError(f"its class is '{name:.80}'", f"known: {', '.join([*_KEYS, _CLASS])}")
    refuse_unknown(set(config), _SIZES | _TRAINING | {"activation"}, "saev's cfg")
    activation, params = _class_of(config.get("activation"))
    return Line(schema, config, activation, params, commit)


def _class_of(nested: Any) -> tuple[str, Mapping[str, Any]]:
    """(class, parameters) of {cls, params}. Errors: WeightsError."""
    stated = nested if isinstance(nested, Mapping) else {}
    name, params = str(stated.get("cls")), stated.get("params")
    if name not in _KEYS or not isinstance(params, Mapping) or len(stated) != 2:
        raise WeightsError(
            f"its activation is {nested!r:.80}",
            f"known: {', '.join(_KEYS)}, as  {{cls, params}}",
        )
    refuse_unknown(set(params), _PARAMS, f"saev's {name}")
    for key in ("kind", "key"):
        if params.get(key, _KEYS[name]) != _KEYS[name]:
            raise WeightsError(f"its activation is {name}, and its {key} {params[key]!r:.80}")
    return name, params


def check_sizes(config: Mapping[str, Any], W_enc_ds: Tensor) -> None:
    """Errors: WeightsError where the configuration is of another SAE than the tensors."""
    if W_enc_ds.ndim != 2:
        raise WeightsError(f"W_enc has shape {list(W_enc_ds.shape)}, not [d s]")
    d, s = W_enc_ds.shape
    stated = {name: whole(config[name], name) for name in _SIZES if name in config}
    holds = {
        "d_vit": lambda size: size == d,
        "d_model": lambda size: size == d,
        "d_sae": lambda size: size == s,
        "exp_factor": lambda factor: factor * d == s,
    }
    for name, size in stated.items():
        if not holds[name](size):
            raise WeightsError(f"its line says {name} = {size}, and W_enc is [{d} {s}]")
