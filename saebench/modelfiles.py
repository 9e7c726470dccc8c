"""Files besides the weights that decide what a model is: its configuration and its vocabulary.

`model = "local-dir:<folder>"` names a folder of the user's, relative to the entry, and
`model = "hf-hub:owner/name@revision"` a repository whose configuration is fetched and locked
(`saebench.hub`) into a folder. Either holds `config.json` for timm or `open_clip_config.json` for
open_clip, in the library's own form.
"""

from __future__ import annotations

from pathlib import Path

from saebench import hub
from saebench.errors import SpecError
from saebench.identity import file_sha256
from saebench.specs import BackboneSpec
from saebench.weights import hub_model

LOCAL = "local-dir:"
_CONFIG = {"timm": "config.json", "open_clip": "open_clip_config.json"}


def config_wanted(spec: BackboneSpec) -> hub.Wanted | None:
    """The configuration that a model wants of a hub; None where it wants none."""
    repo, revision = hub_model(spec)
    return hub.Wanted(repo, (_CONFIG[spec.loader],), spec.name, revision) if repo else None


def config_folder(spec: BackboneSpec) -> Path | None:
    """The folder of a model's configuration, fetched where it is a hub's; None for a plain name.

    Errors: SpecError for a folder without it; those of `hub.fetch`.
    """
    if wanted := config_wanted(spec):
        return hub.fetch(wanted).parent
    if not spec.model.startswith(LOCAL) or spec.loader not in _CONFIG:
        return None
    folder = _local(spec)
    if not (folder / _CONFIG[spec.loader]).is_file():
        raise SpecError(
            f"{spec.path or spec.name}: {folder} has no {_CONFIG[spec.loader]}",
            'model = "local-dir:<folder>" is relative to the entry\'s own folder',
        )
    return folder


def model_files(spec: BackboneSpec) -> dict[str, str]:
    """sha256 of the files that decide what a model is, by name; none for a model known by name.

    Those of the user's own folder, or the configuration of a repository.
    Errors: as `hub.resolve`.
    """
    if wanted := config_wanted(spec):
        return {wanted.names[0]: hub.resolve(wanted).sha256}
    if not spec.model.startswith(LOCAL):
        return {}
    files = sorted(_local(spec).glob("*"))
    kept = [file for file in files if file.suffix in (".json", ".txt", ".gz", ".model")]
    return {file.name: file_sha256(file) for file in kept}


def _local(spec: BackboneSpec) -> Path:
    return (Path(spec.path).parent / spec.model.removeprefix(LOCAL)).resolve()
