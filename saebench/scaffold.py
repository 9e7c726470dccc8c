"""`saebench new`: writes a commented entry or task file that passes `saebench check`."""

from __future__ import annotations

import keyword
import os
import re
import shutil
from pathlib import Path
from textwrap import dedent

from saebench.coders import check_fit
from saebench.errors import UsageError
from saebench.registry import Registry
from saebench.specs import SaeSpec
from saebench.strict import parse_spec
from saebench.weights import file_sha256, weights_path

FOLDERS = {
    "sae": "registry/saes",
    "backbone": "registry/backbones",
    "dataset": "registry/datasets",
    "task": "tasks",
}


def write_new(
    registry: Registry,
    kind: str,
    name: str,
    *,
    out: str,
    weights: str | None = None,
    backbone: str | None = None,
    site: str | None = None,
    tokens: str = "all",
) -> Path:
    """Write the file and return its path. Nothing that exists is overwritten.

    Errors: UsageError for a name that is none, or a file that is there; those of the registry
    for a backbone or site that is not.
    """
    check_name(kind, name)
    path = entry_path(kind, name, out)
    if path.exists():
        raise UsageError(f"{path} is there already", "choose another name, or edit that file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if kind == "sae":
            text = sae_entry(registry, name, out, weights, backbone, site, tokens)
        elif kind == "backbone":
            text = backbone_entry(registry, path, weights)
        elif kind == "dataset":
            text = DATASET.replace("NAME", name)
        else:
            title = "".join(part.title() for part in name.split("_"))
            text = TASK.replace("NAME", name).replace("CLASS", title)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error}", "choose another --out") from None
    return path


def entry_path(kind: str, name: str, out: str) -> Path:
    """Where an entry of this name lies below a content folder."""
    return Path(out) / FOLDERS[kind] / f"{name}{'.py' if kind == 'task' else '.toml'}"


def check_name(kind: str, name: str) -> None:
    """Errors: UsageError for a name that cannot be a file's, a glob's or a Python class's."""
    if kind == "task":
        if not name.isidentifier() or keyword.iskeyword(name) or name.startswith("_"):
            raise UsageError(f"'{name}' cannot be a task's name", "use letters, digits and _")
    elif not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]*(/[A-Za-z0-9][A-Za-z0-9._+-]*)*", name):
        raise UsageError(
            f"'{name}' cannot be an entry's name", "use letters, digits and . _ + - (and / )"
        )


def sae_entry(
    registry: Registry,
    name: str,
    out: str,
    weights: str | None,
    backbone: str | None,
    site: str | None,
    tokens: str,
) -> str:
    """The entry of an SAE, checked against its backbone, with the hash of its file."""
    if weights is None:
        raise UsageError("an SAE is a file", f"saebench new sae {name} --weights FILE")
    file = Path(weights)
    if not file.is_file():
        raise UsageError(f"--weights {weights}: there is no such file")
    owner = registry.backbone(backbone or name.partition("/")[0])
    chosen = site or owner.site
    raw = {
        "backbone": owner.name,
        "site": chosen,
        "tokens": tokens,
        "weights": {"file": _relative(file, entry_path("sae", name, out).parent)},
    }
    spec = parse_spec(SaeSpec, raw, name=name, path=str(entry_path("sae", name, out)))
    declared = check_fit(owner, spec)
    return SAE.format(
        backbone=owner.name,
        site=chosen,
        sites=", ".join(owner.sites),
        tokens=tokens,
        kinds=", ".join(declared.kinds),
        file=raw["weights"]["file"],
        sha256=file_sha256(file),
    )


def backbone_entry(registry: Registry, path: Path, weights: str | None) -> str:
    """The entry of a backbone: with `weights`, or with a copy of those it was copied from."""
    if weights is None:
        example = registry.backbone("tiny-vit")
        source = weights_path(example)
        assert source is not None
        file = path.with_suffix(source.suffix)
        shutil.copyfile(source, file)
    else:
        file = Path(weights)
        if not file.is_file():
            raise UsageError(f"--weights {weights}: there is no such file")
    return BACKBONE.format(file=_relative(file, path.parent), sha256=file_sha256(file))


def _relative(file: Path, folder: Path) -> str:
    return Path(os.path.relpath(file.resolve(), folder.resolve())).as_posix()


SAE = dedent("""\
    # One SAE: a checkpoint, and the activations it was trained on.
    backbone = "{backbone}"
    site = "{site}"        # of: {sites}
    tokens = "{tokens}"    # all, or kinds joined by +: {kinds}

    # Documentation, and how leaderboards group. All of it may stay empty.
    description = ""
    recipe = ""            # SAEs that differ in sparsity or seed alone share a recipe
    trained_on = ""        # the dataset
    # l0 = 16              # as measured; adds the PCA control of that rank
    # seed = 0
    licence = ""
    paper = ""

    [weights]
    file = "{file}"        # relative to this file
    sha256 = "{sha256}"
    """)

BACKBONE = dedent("""\
    # A backbone: how it is built, its weights, its pixels, and the sites where SAEs sit.
    # Written as a copy of an embedded ViT, weights included: replace what differs in yours.
    family = "vit"                 # leaderboards group by these four
    architecture = "vit"
    pretraining = "supervised"
    corpus = ""
    loader = "timm"                # timm, open_clip, or your own  package.module:function
    model = "vit_tiny_patch16_224"
    activation = "gelu"            # checked on the model: gelu, quick_gelu, relu, …
    dataset = "shapes"             # what to measure on when no --dataset is named
    site = "blocks.2"              # where the controls are run when no SAE asks for a site
    # base = "tiny-vit"            # the backbone that this one is a fine-tune of
    description = ""
    licence = ""
    paper = ""

    # Keywords of timm.create_model.
    [model_args]
    img_size = 32
    patch_size = 4
    embed_dim = 64
    depth = 4
    num_heads = 4
    num_classes = 58

    [weights]
    file = "{file}"        # safetensors, relative to this file
    sha256 = "{sha256}"

    # The weights' own pixels: resize, centre crop, 0..1, minus mean, over std.
    [input]
    size = 32
    resize = "squash"              # shortest, squash, none
    interpolation = "bicubic"
    crop = false
    mean = [0.5, 0.5, 0.5]
    std = [0.5, 0.5, 0.5]

    # A literal module path and its tokens, in the order they stand in: cls, distillation,
    # registers, patches. A conv map has  layout = "map"; an MLP output  kind = "branch".
    [sites."blocks.2"]
    path = "blocks.2"
    width = 64
    cls = 1
    grid = [8, 8]

    [head]
    kind = "none"                  # classifier, zero_shot, or none: a probe is fitted
    """)

DATASET = dedent("""\
    # A labelled image dataset.
    source = "shapes"              # the reader: digits or shapes
    train = "train"                # the split that statistics and probes are fitted on
    test = "val"                   # the split that rows are measured on
    description = "NAME: the validation images of shapes"
    licence = ""
    paper = ""
    """)

TASK = dedent('''\
    """The mean L2 norm of the activations and of their reconstruction.

    norm = mean over rows of ‖x_i‖, norm_recon = mean over rows of ‖x̂_i‖.
    """

    from saebench.task import Measurement, Metric, Task


    class CLASS(Task):
        """Replace this by what you measure; bump `version` whenever a number could change."""

        name = "NAME"
        version = 1
        metrics = (
            Metric("norm", unit="act", better="none", bounds=(0, None)),
            Metric("norm_recon", unit="act", better="none", bounds=(0, None)),
        )

        def start(self, ctx):
            from saebench.metrics import Total  # here, so that listing needs no torch

            self.parts = {"norm": Total(), "norm_recon": Total()}

        def update(self, batch):
            # batch.x_btd, batch.codes, batch.recon_btd, batch.labels, …: see saebench/task.py
            self.parts["norm"].add(batch.x_btd.double().norm(dim=-1).sum(), batch.n_rows)
            norms_bt = batch.recon_btd.double().norm(dim=-1)
            self.parts["norm_recon"].add(norms_bt.sum(), batch.n_rows)

        def results(self):
            for metric, part in self.parts.items():
                yield Measurement(metric, part.mean(), n=part.n)
    ''')
