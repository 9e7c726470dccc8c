"""The texts that `saebench new` fills in: a copied backbone, a dataset, a task."""

from __future__ import annotations

from textwrap import dedent

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
    # A labelled image dataset. This one is drawn; for images of your own say  source = "images"
    # and where they are (docs/datasets.md):
    #   [folder]                   as it is: <data root>/NAME/<split>/<class>/<image>
    #   root = "/my/images"        or in that folder
    #   [hub]
    #   repo = "owner/name"        a dataset of the Hugging Face hub
    source = "shapes"              # the reader
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
