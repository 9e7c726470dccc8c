"""The table of datasets in `docs/datasets.md`, made from the registry's entries."""

from __future__ import annotations

from pathlib import Path

from saebench.specs import DatasetSpec
from saebench.strict import read_spec


def overview(content: Path) -> str:
    """A Markdown table of the dataset entries of a content folder, by name."""
    lines = ["| dataset | what | splits | to be had as |", "|---|---|---|---|"]
    folder = content / "registry/datasets"
    for path in sorted(folder.rglob("*.toml")):
        spec = read_spec(DatasetSpec, path, path.relative_to(folder).with_suffix("").as_posix())
        name = f"[{spec.name}]({spec.paper})" if spec.paper else spec.name
        splits = f"`{spec.train}` `{spec.test}`"
        lines.append(f"| {name} | {spec.description} | {splits} | {_forms(spec)} |")
    return "\n".join(lines)


def _forms(spec: DatasetSpec) -> str:
    if spec.source != "images":
        return {
            "idx": "IDX files, downloaded by hand",
            "dsprites": "NumPy archive, downloaded by hand",
        }.get(spec.source, "embedded: needs no files")
    forms = []
    if spec.folder is not None:
        forms.append("image folders")
    if spec.tar is not None:
        forms.append("tar shards")
    if spec.hub is not None:
        forms.append(f"hub `{spec.hub.repo}`")
    return ", ".join(forms)
