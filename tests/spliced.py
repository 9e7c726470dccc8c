"""A small setting with SAEs at many sites, and the slow plain way to splice them: timm's own hooks.

The task `outputs` reads one number of every output, Σ_i cos(i) e_i of the embedding e, so that a
splice can be told from another by its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from saebench.data import open_dataset
from saebench.registry import Registry
from saebench.saes import Sae
from tests.content import BACKBONE, TASK, write
from tests.small import DATASETS, LATENTS, SIZES, WIDTH, add_sae, random_sae, save_backbone

TOKENS = f"width = {WIDTH}\ncls = 1\ngrid = [4, 4]\n"
SITES = "".join(
    f'[sites."{path}"]\npath = "{path}"\nkind = "{kind}"\n{TOKENS}'
    for path, kind in (
        ("blocks.0", "bottleneck"),
        ("blocks.2", "bottleneck"),
        ("blocks.1.attn", "branch"),
        ("blocks.1.mlp", "branch"),
    )
)

OUTPUTS = '''
"""Reads one number of every output."""

from saebench.task import Measurement, Metric, Task

NAMES = ("clean", "spliced", "kept", "cls", "all", "zero", "mean", "zero_cls", "sees")


class Outputs(Task):
    name = "outputs"
    version = 1
    splices = True
    has_conventions = True
    metrics = tuple(Metric(name, unit="1", better="none") for name in NAMES)

    def start(self, ctx):
        from saebench.metrics import Total

        self.ctx, self.parts = ctx, {name: Total() for name in NAMES}

    def update(self, batch):
        outputs = {
            "clean": batch.clean_output,
            "spliced": batch.spliced_output(),
            "kept": batch.spliced_output("sae_tokens", keep_error=True),
            "cls": batch.spliced_output("cls"),
            "zero": batch.ablated_output("zero"),
            "mean": batch.ablated_output("mean"),
            "zero_cls": batch.ablated_output("zero", "cls"),
        }
        for name, output in outputs.items():
            embedding_bd = output.embedding_bd.double()
            weights_d = embedding_bd.new_tensor(range(embedding_bd.shape[1])).cos()
            self.parts[name].add(float((embedding_bd @ weights_d).sum()), batch.n_images)

    def results(self):
        variant = {"convention": "mine"} if self.ctx.conventions else {}
        for name in NAMES[:-1]:
            part = self.parts[name]
            if part.n:
                yield Measurement(name, part.mean(), n=part.n, variant=variant)
        yield Measurement("sees", float(self.ctx.sees("patches") or 0), n=1, variant=variant)
'''


def setting(root: Path) -> Path:
    """A content folder with the backbone `small` of three blocks, and SAEs at five of its sites."""
    write(
        root,
        {
            "registry/backbones/small.toml": BACKBONE
            + SITES
            + '[weights]\nfile = "small.safetensors"\n',
            "tasks/outputs.py": OUTPUTS,
            "tasks/rows.py": TASK,
            **DATASETS,
        },
    )
    save_backbone(root / "registry/backbones/small.safetensors")
    for i, (name, site, tokens) in enumerate(
        (
            ("first", "blocks.0", "all"),
            ("attn", "blocks.1.attn", "all"),
            ("mlp", "blocks.1.mlp", "all"),
            ("out", "blocks.1", "all"),
            ("cls", "blocks.1", "cls"),
            ("patches", "blocks.1", "patches"),
            ("last", "blocks.2", "all"),
        )
    ):
        add_sae(root, name, random_sae(i), site=site, tokens=tokens)
    add_sae(root, "meta", random_sae(9, d=LATENTS), site="sae:small/out/codes")
    return root


def reconstructed(sae: Sae, x: Tensor) -> Tensor:
    """x̂ of a TopK SAE whose encoder is its decoder's transpose, in plain torch."""
    assert sae.b_pre_d is not None
    pre = (x - sae.b_pre_d) @ sae.W_dec_sd.T + sae.b_enc_s
    top = pre.topk(4, dim=-1)
    codes = torch.zeros_like(pre).scatter(-1, top.indices, top.values.clamp(min=0))
    return codes @ sae.W_dec_sd + sae.b_dec_d


def read_with_hooks(
    root: Path,
    replace: Mapping[str, Callable[[Tensor], Tensor]],
    n: int,
    dataset: str = "shapes",
    split: str = "test",
) -> float:
    """The mean number of `outputs` with modules of timm's model returning something else."""
    return float(_pass(root, replace, n, dataset, split)[0])


def mean_of_kinds(root: Path, module: str, n: int) -> Tensor:
    """[1 t d] mean of a module's train output: of CLS, and of all patches."""
    seen: list[Tensor] = []

    def look(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    _pass(root, {module: look}, n, "shapes", "train")
    x = torch.cat(seen).double()
    cls, patches = x[:, :1].mean(0), x[:, 1:].mean((0, 1))
    return torch.cat([cls, patches.expand(16, -1)]).float()[None]


def _pass(
    root: Path, replace: Mapping[str, Callable[[Tensor], Tensor]], n: int, dataset: str, split: str
) -> np.ndarray:
    model = timm.create_model("vit_tiny_patch16_224", **SIZES).eval()  # type: ignore[arg-type]
    model.load_state_dict(load_file(root / "registry/backbones/small.safetensors"))
    data = open_dataset(Registry.load([root]).dataset(dataset))
    order = data.manifest(split).order(n)
    pixels = np.stack([np.asarray(data.image(split, int(i)).convert("RGB")) for i in order])
    images_b3hw = (torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    for name, change in replace.items():
        model.get_submodule(name).register_forward_hook(
            lambda module, given, out, change=change: change(out)
        )
    with torch.inference_mode():
        embedding_bd = torch.cat([model(chunk) for chunk in images_b3hw.split(64)]).double()
    return (embedding_bd @ torch.arange(WIDTH).double().cos()).mean(dim=0, keepdim=True).numpy()
