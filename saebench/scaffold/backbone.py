"""The entry of a backbone: of a model that timm, open_clip or a hub has, or a copy to change.

Without `--from`: a small embedded ViT, its weights copied beside the entry, as an example whose
every line says what it is for.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from saebench.registry import Registry
from saebench.scaffold import relative, weights_file
from saebench.scaffold.texts import BACKBONE
from saebench.weights import file_sha256, weights_path


def backbone_entry(
    registry: Registry,
    name: str,
    path: Path,
    weights: str | None,
    source: str | None,
    loader: str | None,
) -> str:
    """The text of an entry at `path`. Errors: UsageError; those of building the model."""
    file = None if weights is None else weights_file(weights)
    if source is not None:
        from saebench.scaffold.render import render
        from saebench.scaffold.upstream import described

        spec, notes = described(source, name, path, file=file, loader=loader)
        return render(spec, source, notes)
    if file is None:
        example = weights_path(registry.backbone("tiny-vit"))
        assert example is not None
        file = path.with_suffix(example.suffix)
        shutil.copyfile(example, file)
    return BACKBONE.format(file=relative(file, path.parent), sha256=file_sha256(file))
