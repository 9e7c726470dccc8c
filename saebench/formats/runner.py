"""A runner's configuration beside a state dict: what ViT-Prisma and the HugoFry family save.

Both pickle {"cfg" or "config": a configuration, "state_dict": W_enc [d s], b_enc, W_dec [s d],
b_dec}; ViT-Prisma also bare state dicts with config.json beside them. The names of the tensors are
the same and the forward passes are not, so only the configuration tells whose a file is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from saebench.errors import WeightsError
from saebench.formats.content import Content

WEIGHTS = ("W_enc", "b_enc", "W_dec", "b_dec")
CONFIG = "config.json"
_STATE, _LEGACY = "state_dict", "autoencoder"
_VISION = {
    *("layer_subtype", "image_size", "cls_token_only", "use_patches_only", "vit_model_cfg"),
    *("is_transcoder", "model_classs_name"),  # so spelled in the first days
}


@dataclass(frozen=True)
class Run:
    """What a file holds: its state dict, its configuration, and where that was ("" for none).

    `strange` are the names beside them; `legacy`: it is {"config", "autoencoder": {"state_dict"}}.
    """

    state: Mapping[str, Any]
    config: Mapping[str, Any]
    source: str
    strange: frozenset[str] = frozenset()
    legacy: bool = False

    @property
    def of_prisma(self) -> bool:
        """Whether the configuration is ViT-Prisma's: of a vision model, at a hook point."""
        config = self.config
        vision = (
            str(config.get("model_name", "")).startswith("open-clip:")
            or config.get("model_class_name") == "HookedViT"
            or bool(_VISION & config.keys())
        )
        return "hook_point_layer" in config and vision and "block_layer" not in config

    @property
    def of_hugofry(self) -> bool:
        """Whether the configuration is of the HugoFry family: at a module of a block."""
        config = self.config
        return config.keys() >= {"block_layer", "module_name"} and "hook_point_layer" not in config

    def check(self, W_enc_ds: Tensor) -> None:
        """Errors: WeightsError for names beside, and a configuration of another SAE's size."""
        if self.strange:
            listed = ", ".join(sorted(self.strange)[:8])
            raise WeightsError(f"beside its state dict it holds {listed}, which is not known")
        if W_enc_ds.ndim != 2:
            raise WeightsError(f"W_enc has shape {list(W_enc_ds.shape)}, not [d s]")
        d, s = W_enc_ds.shape
        width, factor = self.config.get("d_in", d), self.config.get("expansion_factor")
        latents = self.config.get("d_sae", s)
        if isinstance(factor, (int, float)):
            latents = d * factor  # some d_sae are of before a sweep set the factor
        if (width, latents) != (d, s) and not isinstance(factor, list):
            raise WeightsError(
                f"its configuration says {width} x {latents}, and W_enc is [{d} {s}]",
                "the configuration is of another SAE",
            )


def opened(content: Content) -> Run | None:
    """The state dict and the configuration of a file, in any of the shapes; None for another."""
    if content.has(*WEIGHTS):
        source, config = content.config(CONFIG)
        return Run(content.objects, config, source)
    if content.has(_LEGACY, "config"):
        inside = content.nested(_LEGACY)
        strange = (content.names - {_LEGACY, "config"}) | (inside.keys() - {_STATE, "config"})
        run = Run(_named(inside.get(_STATE)), content.nested("config"), "file", strange, True)
    else:
        key = "cfg" if content.has("cfg") else "config"
        strange = content.names - {key, _STATE}
        run = Run(content.nested(_STATE), content.nested(key), "file", strange)
    return run if run.state.keys() >= set(WEIGHTS) else None


def _named(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
