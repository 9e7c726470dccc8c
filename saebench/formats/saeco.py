"""saeco (sae_components): `<stem>.arch_ref` beside torch pickles that are called safetensors.

The .arch_ref names a class and its configuration: what the SAE computes is that class's code. The
two that the library itself ships are read, every other one is refused by its name.

    VanillaSAE   z = relu((u − b_dec) @ W_enc + b_enc)       b_dec subtracted where pre_bias says so
    Gated        z = relu(exp(r)·pre + b_mag) where pre + b_gate > 0,     pre = (u − b_dec) @ W_enc
                 û = z @ W_dec + b_dec

The model is trained on, and saved in, the space of its normaliser, whose numbers are in the file:

    u = (x − mu_e − mu_s) / ((|std_e| + 1e-7) · std_s)    each part where its configuration has it

The state dict is that of everything that was trained, so each tensor is in it under many names: of
the model, of its losses and of its metrics. Names of wrappers (`module`, `wrapped`) came and went
with the versions of the library, and say nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from saebench.activations import Activation, Gated, Threshold
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.tensors import dtype_of, flag, matrix, weights
from saebench.inputs import Scaling
from saebench.saes import Sae

NAME = "saeco"
_SUFFIX = ".arch_ref"
_WRAPPERS = ("module", "wrapped")
_MODEL, _NORMALIZER, _PRE_BIAS = "models.0.", "normalizer.", ".pre_bias."
_DECODER = ("decoder.weight", "decoder.bias")
_VANILLA = ("encoder.encoder_pre.lin.weight", "encoder.encoder_pre.lin.bias")
_GATED = (
    "encoder.magnitude.r_mag.identity.weight",
    "encoder.magnitude.r_mag.exp_r",
    "encoder.magnitude.bias.bias",
    "encoder.gate.bias.bias",
)
_GATE_WEIGHT = "encoder.gate.weight.weight"  # the encoder's again
_CLASSES = {
    ("saeco.architectures.vanilla.vanilla_model", "VanillaSAE"): False,
    ("saeco.architectures.gated.arch", "Gated"): True,
}
_EPS = 1e-7
_UNUSED, _PRIMED, _LEARNED = 0, 1, 4  # what is primed or learned is in the file
_OUT = "where saeco runs, write its encoder, biases and decoder with saebench.formats.write_sae"


def recognise(content: Content) -> bool:
    """By the .arch_ref of its name beside it."""
    return any(name.endswith(_SUFFIX) for name in content.beside)


def read(content: Content, facts: Facts) -> Sae:
    """Errors: SpecError (facts that contradict it), WeightsError (a class or names not known)."""
    source = next(name for name in content.beside if name.endswith(_SUFFIX))
    reference = content.config(source)[1]
    gated, config = _is_gated(reference, source), _under(reference, "config")
    state, averaged = _state(content.objects)
    pre_bias = flag(_under(config, "arch_cfg").get("pre_bias"), "pre_bias")
    facts.known("activation", "gated" if gated else "relu", source)
    facts.known("pre_bias", pre_bias, source)
    if not averaged:  # a mean of unit vectors is shorter
        facts.promise("decoder_norm", "unit")
    _trained_on(_under(config, "train_cfg"), facts)
    model = _part(state, _MODEL)
    found = weights(
        {name: value for name, value in model.items() if _PRE_BIAS not in name},
        (*_DECODER, *_GATED, _GATE_WEIGHT) if gated else (*_DECODER, _VANILLA[0]),
        () if gated else _VANILLA[1:],  # the first version of VanillaSAE had no encoder bias
        what="a Gated of saeco" if gated else "a VanillaSAE of saeco",
    )
    _check_pre_bias(model, pre_bias, 2 if gated else 1)
    _check_repeated(state)
    W_enc_sd, b_dec_d = matrix(found, (_GATED if gated else _VANILLA)[0]), found[_DECODER[1]]
    scaling = _scaling(state, _under(config, "normalizer_cfg"), W_enc_sd.shape[1], source, facts)
    facts.settle()
    zeros_s = torch.zeros(W_enc_sd.shape[0])
    activation: Activation = Threshold(0.0)
    if gated:
        r_mag_s, b_mag_s, b_gate_s = (found[name] for name in _GATED[1:])
        activation = Gated(b_gate_s, r_mag_s, b_mag_s)
    return Sae(
        W_enc_ds=W_enc_sd.T,
        b_enc_s=found.get(_VANILLA[1], zeros_s),
        W_dec_sd=matrix(found, _DECODER[0]).T,
        b_dec_d=b_dec_d,
        activation=activation,
        architecture="gated" if gated else "relu",
        b_pre_d=b_dec_d if pre_bias else None,
        scaling=scaling,
        stored_dtype=dtype_of(model[(_GATED if gated else _VANILLA)[0]]),
    )


def _is_gated(reference: Mapping[str, Any], source: str) -> bool:
    """Errors: WeightsError for every class but the two."""
    named = _under(reference, "class_ref")
    module, name = named.get("module"), named.get("cls_name")
    for (known_module, known_name), gated in _CLASSES.items():
        if (module, name) == (known_module, known_name):
            return gated
    raise WeightsError(
        f"{source} says that it is a {module!s:.80}.{name!s:.80}: what that computes is in its "
        "code, not in the file",
        _OUT,
    )


def _under(config: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    """The configuration under these names; {} where there is none."""
    for name in names:
        inner = config.get(name)
        config = inner if isinstance(inner, Mapping) else {}
    return config


def _state(objects: Mapping[str, Any]) -> tuple[dict[str, Tensor], bool]:
    """The tensors by their names without wrappers, and whether it is torch's AveragedModel.

    Errors: WeightsError for what is no tensor, or one name for two different ones.
    """
    state: dict[str, Tensor] = {}
    for full, value in objects.items():
        if not isinstance(value, Tensor):
            raise WeightsError(f"{full} is a {type(value).__name__}, not a tensor")
        name = ".".join(part for part in full.split(".") if part not in _WRAPPERS)
        if not _equal(state.setdefault(name, value), value):
            raise WeightsError(f"two different tensors are both {name}", _OUT)
    return state, state.pop("n_averaged", None) is not None


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name[len(prefix) :]: value for name, value in state.items() if name.startswith(prefix)}


def _equal(a: Tensor, b: Tensor) -> bool:
    same = a.shape == b.shape and a.dtype == b.dtype
    return same and (a.data_ptr() == b.data_ptr() or torch.equal(a, b))


def _check_pre_bias(model: Mapping[str, Tensor], pre_bias: bool, times: int) -> None:
    """Errors: WeightsError where what is subtracted is not the decoder's bias, as often as said."""
    found = [value for name, value in model.items() if _PRE_BIAS in name]
    if len(found) != pre_bias * times or not all(
        _equal(value, model[_DECODER[1]]) for value in found
    ):
        raise WeightsError(
            f"pre_bias is {pre_bias}, and the model does not subtract its decoder's bias "
            f"{pre_bias * times} times",
            _OUT,
        )


def _check_repeated(state: Mapping[str, Tensor]) -> None:
    """Errors: WeightsError where losses, metrics and the like hold what the model does not."""
    own = [value for name, value in state.items() if name.startswith((_MODEL, _NORMALIZER))]
    gate, encoder = state.get(_MODEL + _GATE_WEIGHT), state.get(_MODEL + _GATED[0])
    if gate is not None and encoder is not None and not _equal(gate, encoder):
        raise WeightsError("its gate has an encoder of its own", _OUT)
    for name, value in state.items():
        if not any(_equal(value, one) for one in own):
            raise WeightsError(
                f"{name} is no tensor of its model or its normaliser: that is not known", _OUT
            )


def _trained_on(train: Mapping[str, Any], facts: Facts) -> None:
    """Errors: WeightsError for a model that was to write the activations of another place."""
    data = _under(train, "data_cfg")
    model = _under(data, "model_cfg")
    sites = train.get("input_sites") or _under(model, "acts_cfg").get("sites")
    if train.get("target_sites") not in (None, sites):
        raise WeightsError("target_sites: it writes the activations of another place", _OUT)
    facts.trained_on(
        model=_under(model, "model_load_cfg").get("model_name"),
        hook=", ".join(map(str, sites)) if isinstance(sites, list) else None,
        dataset=data.get("dataset"),
    )


def _scaling(
    state: Mapping[str, Tensor], config: Mapping[str, Any], d: int, source: str, facts: Facts
) -> Scaling:
    """(x − mean) / std of its normaliser. Errors: WeightsError (one that depends on other rows)."""
    used = [name for name in ("mu_s", "mu_e", "std_s", "std_e") if _is_used(config, name, source)]
    found = weights(_part(state, _NORMALIZER), [f"_{name}" for name in used], what="its normaliser")
    for name, value in found.items():
        if list(value.shape) != ([1, d] if name.endswith("_e") else []):
            raise WeightsError(f"{_NORMALIZER}{name} has shape {list(value.shape)}")
    if not used:
        facts.known("input", "raw", source)
        return Scaling()
    mean_d, std_d = torch.zeros(d), torch.ones(d, dtype=torch.float64)
    if "mu_s" in used or "mu_e" in used:
        mean_d = mean_d + found.get("_mu_s", 0.0) + found.get("_mu_e", torch.zeros(1, d))[0]
        facts.known("input_mean", mean_d, "file")
    if "std_e" in used:
        std_d = std_d * (found["_std_e"][0].double().abs() + _EPS)
    if "std_s" in used:
        std_d = std_d * found["_std_s"].double()
    facts.known("input_std", std_d.float(), "file")
    return Scaling(mean_d, (1 / std_d).float())


def _is_used(config: Mapping[str, Any], name: str, source: str) -> bool:
    """Whether the normaliser has this part. Errors: WeightsError for one not fixed in the file."""
    value = config.get(name)
    fixed = (_UNUSED, _PRIMED, _LEARNED) if name.endswith("_e") else (_UNUSED, _PRIMED)
    if isinstance(value, bool) or value not in fixed:
        raise WeightsError(
            f"{source} says {name} = {value!r:.40} of its normaliser: what that takes is not fixed "
            "in the file (a running or batch average, or a value that is not known)",
            _OUT,
        )
    return value != _UNUSED
