"""SAELens's cfg.json, of version 6 and of the versions before it, read into one form.

Version 6 has one class an architecture and keeps what it knows of the model under `metadata`.
Before it one class read a flat file, in which

    the activation is `activation_fn_str` or `activation_fn`: `topk` is TopK whatever `architecture`
    says (which may be missing, and then is standard)
    a missing `apply_b_dec_to_input` is true
    `normalize_activations` may be null or a boolean: true is expected_average_only_in
    a missing `reshape_activations` is hook_z where the hook's name says so

No key has two meanings in the two, so that nothing here depends on the version.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from saebench.errors import WeightsError
from saebench.formats.tensors import flag, whole

CFG = "cfg.json"
ARCHITECTURES = (
    "standard",
    "topk",
    "abstopk",
    "jumprelu",
    "gated",
    "batchtopk",
    "matryoshka_batchtopk",
)
_TRANSCODERS = {
    "transcoder": ("standard", False),
    "skip_transcoder": ("standard", True),
    "jumprelu_transcoder": ("jumprelu", False),
    "jumprelu_skip_transcoder": ("jumprelu", True),
}
_REFUSED = {
    "matching_pursuit": "it is tied, and encodes by pursuit on the residual",
    "temporal": "it reads whole sequences, not single activations",
}
_NORMS = (
    "none",
    "layer_norm",
    "constant_norm_rescale",
    "expected_average_only_in",
    "covariance_whitening",
)


@dataclass(frozen=True)
class Config:
    """What decides the output, in the words of version 6. `trained_as`: the training architecture.

    `k` is None where a TopK's is not said. `tanh`: activations go through tanh.
    """

    architecture: str
    d_in: int
    d_out: int
    d_sae: int
    k: int | None
    rescaled: bool
    tanh: bool
    pre_bias: bool
    norm: str
    heads: bool
    transcoder: bool
    skip: bool
    finetuned: bool
    trained_as: str
    widths: tuple[int, ...]
    trained_on: Mapping[str, Any]


def is_saelens(config: Mapping[str, Any]) -> bool:
    """Whether a cfg.json is SAELens's, of any version."""
    return (
        "sae_lens_version" in config
        or "sae_lens_version" in _nested(config, "metadata")
        or (
            "d_in" in config
            and "d_sae" in config
            and not {"architecture", "hook_name", "hook_point"}.isdisjoint(config)
        )
    )


def config_of(raw: Mapping[str, Any]) -> Config:
    """Errors: WeightsError for what is not known, or contradicts itself."""
    stated = raw.get("architecture", "standard")
    if not isinstance(stated, str) or stated not in (*ARCHITECTURES, *_TRANSCODERS):
        if isinstance(stated, str) and stated in _REFUSED:
            raise WeightsError(f"SAELens's {stated} is not read: {_REFUSED[stated]}")
        raise WeightsError(
            f"{CFG} has architecture = {stated!r:.80}",
            f"known: {', '.join((*ARCHITECTURES, *_TRANSCODERS))}",
        )
    transcoder = stated in _TRANSCODERS
    architecture, skip = _TRANSCODERS.get(stated, (stated, False))
    architecture, tanh = _activation(raw, architecture)
    metadata = {**raw, **_nested(raw, "metadata")}
    trained_as = str(metadata.get("training_architecture") or architecture)
    pre_bias = flag(raw.get("apply_b_dec_to_input", True), "apply_b_dec_to_input")
    if transcoder and pre_bias:
        raise WeightsError(
            f"{CFG} has apply_b_dec_to_input = true, and a transcoder's b_dec is not of its input"
        )
    d_in, d_sae = whole(raw.get("d_in"), "d_in"), whole(raw.get("d_sae"), "d_sae")
    return Config(
        architecture=architecture,
        d_in=d_in,
        d_out=whole(raw.get("d_out"), "d_out") if transcoder else d_in,
        d_sae=d_sae,
        k=_k(raw) if architecture in ("topk", "abstopk") else None,
        rescaled=flag(
            raw.get("rescale_acts_by_decoder_norm", False), "rescale_acts_by_decoder_norm"
        ),
        tanh=tanh,
        pre_bias=pre_bias,
        norm=_norm(raw),
        heads=_reshapes(raw, metadata),
        transcoder=transcoder,
        skip=skip,
        finetuned=flag(raw.get("finetuning_scaling_factor") or False, "finetuning_scaling_factor"),
        trained_as=trained_as,
        widths=_widths(metadata, d_sae) if trained_as == "matryoshka_batchtopk" else (),
        trained_on={
            "model": metadata.get("model_name"),
            "hook": metadata.get("hook_name", metadata.get("hook_point")),
            "dataset": metadata.get("dataset_path"),
        },
    )


def _nested(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = raw.get(name)
    return found if isinstance(found, Mapping) else {}


def _activation(raw: Mapping[str, Any], architecture: str) -> tuple[str, bool]:
    """(architecture, whether tanh follows)."""
    kind = raw.get("activation_fn_str", raw.get("activation_fn")) or "relu"
    if kind not in ("relu", "topk", "tanh-relu"):
        raise WeightsError(
            f"{CFG} has activation_fn = {kind!r:.80}", "known: relu, topk, tanh-relu"
        )
    given = "activation_fn_str" in raw or "activation_fn" in raw
    if kind == "topk" and architecture in ("standard", "topk"):
        return "topk", False
    if kind == "topk" or (given and kind == "relu" and architecture == "topk"):
        raise WeightsError(
            f"{CFG} has architecture = '{architecture}' and activation_fn = '{kind}'",
            "the two contradict each other: which of them it was trained with is not known",
        )
    if kind == "tanh-relu" and architecture not in ("standard", "jumprelu", "gated"):
        raise WeightsError(f"{CFG} has architecture = '{architecture}' with tanh-relu")
    return architecture, kind == "tanh-relu"


def _k(raw: Mapping[str, Any]) -> int | None:
    kwargs = raw.get("activation_fn_kwargs") or {}
    # Version 6 takes the k and always a ReLU; what another function was before it is not certain.
    relu = isinstance(kwargs, Mapping) and kwargs.get("postact_fn", "relu") in ("relu", "ReLU")
    if not relu or kwargs.keys() - {"k", "postact_fn"}:
        raise WeightsError(
            f"{CFG} has activation_fn_kwargs = {kwargs!r:.80}", "known: k, and postact_fn = relu"
        )
    found = {whole(said["k"], "k") for said in (raw, kwargs) if said.get("k") is not None}
    if len(found) > 1:
        raise WeightsError(f"{CFG} has two k: {sorted(found)}")
    return found.pop() if found else None


def _norm(raw: Mapping[str, Any]) -> str:
    norm = raw.get("normalize_activations")
    if isinstance(norm, bool):
        return "expected_average_only_in" if norm else "none"
    if norm is None:
        return "none"
    if norm not in _NORMS:
        raise WeightsError(
            f"{CFG} has normalize_activations = {norm!r:.80}", f"known: {', '.join(_NORMS)}"
        )
    return norm


def _reshapes(raw: Mapping[str, Any], metadata: Mapping[str, Any]) -> bool:
    hook = metadata.get("hook_name", metadata.get("hook_point"))
    reshaping = raw.get("reshape_activations")
    if reshaping is None:
        return isinstance(hook, str) and hook.endswith("_z")
    if reshaping not in ("none", "hook_z"):
        raise WeightsError(f"{CFG} has reshape_activations = {reshaping!r:.80}")
    return reshaping == "hook_z"


def _widths(metadata: Mapping[str, Any], d_sae: int) -> tuple[int, ...]:
    """The nested widths of a Matryoshka SAE, which its inference file keeps among its metadata."""
    details = {**metadata, **_nested(metadata, "training_architecture_details")}
    found = details.get("matryoshka_widths")
    if not isinstance(found, list) or not found:
        raise WeightsError("a Matryoshka SAE has no matryoshka_widths")
    widths = tuple(whole(width, "matryoshka_widths") for width in found)
    return widths if widths[-1] == d_sae else (*widths, d_sae)
