"""A small content folder, written for a test: one backbone, a dataset, SAEs, a task."""

from __future__ import annotations

from pathlib import Path

BACKBONE = """
family = "vit"
architecture = "vit"
pretraining = "none"
loader = "timm"
model = "vit_tiny_patch16_224"
dataset = "shapes"
site = "blocks.1"
[model_args]
img_size = 32
patch_size = 8
embed_dim = 16
depth = 3
num_heads = 2
num_classes = 0
[input]
size = 32
[sites."blocks.1"]
path = "blocks.1"
width = 16
cls = 1
grid = [4, 4]
"""

TASK = '''
"""Counts the rows."""

from saebench.task import Measurement, Metric, Task


class Rows(Task):
    name = "rows"
    version = 1
    metrics = (Metric("rows", unit="1", better="none"),)

    def start(self, ctx):
        from saebench.metrics import Total

        self.parts = {"rows": Total()}

    def update(self, batch):
        self.parts["rows"].add(0.0, batch.n_rows)

    def results(self):
        yield Measurement("rows", float(self.parts["rows"].n), n=self.parts["rows"].n)
'''


def write(root: Path, files: dict[str, str]) -> Path:
    """Write files below a folder and return it."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def sae_entry(
    backbone: str = "small", site: str = "blocks.1", tokens: str = "all", **more: object
) -> str:
    """An SAE's entry whose weights file is called `sae.safetensors`."""
    lines = [f'backbone = "{backbone}"', f'site = "{site}"', f'tokens = "{tokens}"']
    lines += [f"{key} = {value!r}".replace("'", '"') for key, value in more.items()]
    return "\n".join([*lines, "[weights]", 'file = "sae.safetensors"'])
