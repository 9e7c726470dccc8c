"""SAELens, version 6 and before: sae_weights.safetensors beside its cfg.json.

    u   = norm(x), minus b_dec where `apply_b_dec_to_input`
    z   = activation(u @ W_enc + b_enc)                  gated: see `saebench.activations.Gated`
    x̂   = undone norm(z @ W_dec + b_dec)                 of a transcoder not undone, + x @ W_skip.T

With `rescale_acts_by_decoder_norm` pre-activations are multiplied by the lengths of the decoder's
rows before they are selected and divided again behind: both are part of the matrices here, as in
the files that the library itself writes for inference. A batchtopk file of a training run is used
with its topk_threshold. Two norms are of a run in progress, and folded at its end:
expected_average_only_in (x·s, s in activation_scaler.json) and covariance_whitening
((x − mean) @ M, in activation_whitening.safetensors).
"""

from __future__ import annotations

from saebench.activations import Activation, Gated, Squash, Threshold, TopK
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.saelens_config import CFG, Config, config_of, is_saelens
from saebench.formats.saelens_folds import (
    FINETUNING,
    WHITENING,
    Tensors,
    finetuned,
    of_raw_x,
    times_decoder_norms,
    whitening_of,
)
from saebench.formats.tensors import dtype_of, float32, number, weights
from saebench.inputs import LayerNorm, Length, OneWay, Scaling
from saebench.saes import Sae

NAME = "saelens"
_BIASED = ("b_enc",)
_TENSORS = {
    "standard": _BIASED,
    "topk": _BIASED,
    "abstopk": _BIASED,
    "jumprelu": (*_BIASED, "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "batchtopk": (*_BIASED, "topk_threshold"),
    "matryoshka_batchtopk": (*_BIASED, "topk_threshold"),
}
_ARCHITECTURES = {
    "standard": "relu",
    "abstopk": "topk",
    "matryoshka_batchtopk": "matryoshka-batchtopk",
}
_SCALER = "activation_scaler.json"


def recognise(content: Content) -> bool:
    """Whether it is safetensors, and its cfg.json is SAELens's."""
    return content.container == "safetensors" and is_saelens(content.config(CFG)[1])


def could_be(content: Content) -> bool:
    """Whether its tensors have SAELens's names."""
    return content.container == "safetensors" and content.has("W_enc", "W_dec", "b_dec")


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (what is not read is named), SpecError."""
    raw = content.config(CFG)[1]
    if not raw:
        raise WeightsError(f"{CFG} is not beside it, and says all of it", f"put {CFG} beside it")
    config = config_of(raw)
    whitening = (
        whitening_of(content, config.d_in) if config.norm == "covariance_whitening" else None
    )
    architecture = _architecture(config)
    facts.known("architecture", architecture, CFG)
    facts.known("activation", "tanh-relu" if config.tanh else config.architecture, CFG)
    facts.known("pre_bias", config.pre_bias, CFG)
    k = _k(config, facts)
    if any("threshold" in name for name in _TENSORS[config.architecture]):
        facts.always("strict", True)
    scaling = _scaling(content, config, whitening, facts)
    if config.heads:
        facts.note("trained on the outputs of attention heads: x is all heads, one after the other")
    facts.trained_on(**config.trained_on)
    facts.settle()

    floats = _weights(content, config)
    _check_widths(config, floats)
    if config.rescaled and "topk" in config.architecture:
        floats = times_decoder_norms(floats)
    if whitening is not None:
        floats = of_raw_x(floats, whitening)
    floats = finetuned(floats, config.finetuned, config.d_sae)
    W_enc_ds, b_dec_d = floats["W_enc"], floats["b_dec"]
    return Sae(
        W_enc_ds=W_enc_ds,
        b_enc_s=floats["b_enc"] if "b_enc" in floats else W_enc_ds.new_zeros(W_enc_ds.shape[1]),
        W_dec_sd=floats["W_dec"],
        b_dec_d=b_dec_d,
        activation=_activation(config, floats, k),
        architecture=architecture,
        b_pre_d=b_dec_d if config.pre_bias else None,
        scaling=scaling,
        transcoder=config.transcoder,
        skip_dd=floats.get("W_skip"),
        prefixes=config.widths,
        stored_dtype=dtype_of(content.objects["W_enc"]),
    )


def _architecture(config: Config) -> str:
    """A BatchTopK SAE stays one, though its file for inference is a JumpReLU of one threshold."""
    if config.tanh and config.architecture == "standard":
        return "tanh-relu"
    batch = config.architecture == "jumprelu" and config.trained_as.endswith("batchtopk")
    name = config.trained_as if batch else config.architecture
    return _ARCHITECTURES.get(name, name)


def _k(config: Config, facts: Facts) -> int:
    if config.architecture not in ("topk", "abstopk"):
        return 0
    if config.k is None:
        return facts.ask_int("k", "the latents that are kept of a row")
    return facts.known("k", config.k, CFG)


def _scaling(content: Content, config: Config, whitening: Tensors | None, facts: Facts) -> Scaling:
    rows = {"layer_norm": LayerNorm(), "constant_norm_rescale": Length()}.get(config.norm)
    said = {"layer_norm": "layer_norm", "constant_norm_rescale": "sqrt_d"}.get(config.norm, "none")
    facts.known("row_norm", said, CFG)
    if rows is not None:
        return Scaling(rows=OneWay(rows) if config.transcoder else rows)
    if config.norm == "none":
        return Scaling()
    if config.transcoder:
        raise WeightsError(
            f"a transcoder with normalize_activations = '{config.norm}': nothing says the scale of "
            "what it writes",
            "fold it where it was trained, and save it again",
        )
    if whitening is not None:
        facts.known("input", "whitened", WHITENING)
        return Scaling(float32(whitening["mean"], "mean"))
    source, scaler = content.config(_SCALER)
    if scaler.get("scaling_factor") is None:
        about = "what x is divided by before it is encoded: the mean of ‖x‖ / √d"
        return facts.ask_scaling(about, d=config.d_in, estimate="norm")
    scale = number(scaler["scaling_factor"], "scaling_factor")
    if not 0 < scale < float("inf"):
        raise WeightsError(f"{source} has scaling_factor = {scale}")
    facts.known("input_std", 1 / scale, source)
    return Scaling(scale=scale)


def _weights(content: Content, config: Config) -> Tensors:
    """The tensors of its architecture, a logarithm of thresholds already undone."""
    names = {"W_enc", "W_dec", "b_dec", *_TENSORS[config.architecture]}
    if config.skip:
        names.add("W_skip")
    logarithm = "threshold" in names and "log_threshold" in content.names
    if logarithm:
        names = names - {"threshold"} | {"log_threshold"}
    floats = weights(content.objects, names, FINETUNING, what=f"SAELens's {config.architecture}")
    if logarithm:
        floats["threshold"] = floats.pop("log_threshold").exp()
    return floats


def _check_widths(config: Config, floats: Tensors) -> None:
    """Errors: WeightsError where the tensors are not of the widths that cfg.json says."""
    said = {
        "W_enc": [config.d_in, config.d_sae],
        "b_enc": [config.d_sae],
        "W_dec": [config.d_sae, config.d_out],
        "b_dec": [config.d_out],
    }
    for name, shape in said.items():
        if name in floats and list(floats[name].shape) != shape:
            raise WeightsError(
                f"{CFG} says {name} {shape}, and it is {list(floats[name].shape)}",
                "the configuration is another SAE's, or a matrix is transposed",
            )


def _activation(config: Config, floats: Tensors, k: int) -> Activation:
    activation: Activation
    if config.architecture == "gated":
        activation = Gated(floats["b_gate"], floats["r_mag"], floats["b_mag"])
    elif config.architecture in ("topk", "abstopk"):
        signed = config.architecture == "abstopk"
        activation = TopK(k, signed=signed, by_magnitude=signed)
    else:
        theta = floats.get("threshold", floats.get("topk_threshold", 0.0))
        activation = Threshold(theta)
    return Squash(activation) if config.tanh else activation
