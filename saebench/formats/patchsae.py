"""The HugoFry family (mats_sae_training_for_ViTs, PatchSAE, ConceptScope): {cfg, state_dict}.

    z = ReLU((x − b_dec) @ W_enc + b_enc)         x̂ = z @ W_dec + b_dec

The configuration is a pickled object or a dict, under `cfg` or `config`. PatchSAE can save a gated
SAE, whose forward pass in its code is empty.
"""

from __future__ import annotations

from typing import Any

from saebench.activations import Threshold
from saebench.errors import WeightsError
from saebench.formats.content import Content
from saebench.formats.facts import Facts
from saebench.formats.runner import WEIGHTS, opened
from saebench.formats.tensors import dtype_of, weights
from saebench.saes import Sae

NAME = "patchsae"
_GATED = ("r_mag", "b_mag")


def recognise(content: Content) -> bool:
    """Whether a state dict is pickled with a configuration of this family."""
    run = opened(content)
    return run is not None and run.of_hugofry and not run.legacy and run.source == "file"


def could_be(content: Content) -> bool:
    """A state dict of the right names with a configuration that does not tell, or with none."""
    run = opened(content)
    return run is not None and not run.legacy and run.state.keys() <= {*WEIGHTS, *_GATED}


def read(content: Content, facts: Facts) -> Sae:
    """Errors: WeightsError (gated, names, sizes), SpecError (facts that are otherwise)."""
    run = opened(content)
    if run is None:
        raise WeightsError("it holds no state dict of this family")
    if run.config.get("gated_sae") or run.state.keys() & set(_GATED):
        raise WeightsError(
            "it is a gated SAE of PatchSAE, whose code has no forward pass for it",
            "what it computes is not known; use an SAE that is not gated",
        )
    found = weights(run.state, WEIGHTS, what="an SAE of the HugoFry family")
    run.check(found["W_enc"])
    facts.always("activation", "relu")
    facts.always("pre_bias", True)
    facts.always("input", "raw")
    facts.promise("decoder_norm", "unit")
    if run.of_hugofry:
        facts.trained_on(
            model=run.config.get("model_name"),
            hook=f"{run.config['module_name']} of block {run.config['block_layer']}",
            tokens=_tokens(run.config.get("class_token")),
            dataset=run.config.get("dataset_path"),
        )
        if run.config.get("custom_clip_ckpt_path"):
            facts.note("its CLIP was read from a checkpoint of its makers: not the published one")
    facts.settle()
    return Sae(
        W_enc_ds=found["W_enc"],
        b_enc_s=found["b_enc"],
        W_dec_sd=found["W_dec"],
        b_dec_d=found["b_dec"],
        activation=Threshold(),
        architecture="relu",
        b_pre_d=found["b_dec"],
        stored_dtype=dtype_of(run.state["W_enc"]),
    )


def _tokens(class_token: Any) -> str | None:
    """Which tokens it was trained on: HugoFry and PatchSAE say true or false, ConceptScope how."""
    words = {"only": "cls", "include": "all", "exclude": "patches"}
    if isinstance(class_token, str):
        return words.get(class_token)
    return "cls" if class_token else "all"
