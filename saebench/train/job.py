"""What a call of `saebench train` asks for, looked up: specs, recipes, names, what is to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saebench.coders import chain_of, on_decoder, parent_of, token_kinds
from saebench.errors import Mismatch, UsageError
from saebench.formats import read_entry, read_sae
from saebench.registry import Registry
from saebench.saes import Sae
from saebench.scaffold import check_name
from saebench.specs import BackboneSpec, SaeSpec, semantic_fields
from saebench.strict import read_spec
from saebench.train.config import Start, TrainConfig, recipes, sae_name
from saebench.train.convert import architecture_of
from saebench.train.entry import Place, entry_path, is_done
from saebench.train.identity import identity_of, rows_identity
from saebench.train.recipe import Recipe
from saebench.weights import file_sha256, weights_sha256


@dataclass(frozen=True)
class Job:
    """A resolved call: where the rows come from, and the SAEs to train on them."""

    backbone: BackboneSpec
    site: str  # of the backbone; the entry's own may be that of a parent SAE
    kinds: tuple[str, ...]
    parents: tuple[SaeSpec, ...]  # outermost last
    datasets: tuple[str, ...]
    start: Sae | None
    place: Place
    rows: dict[str, Any]  # everything that decides the rows and the start, as plain JSON
    todo: dict[str, Recipe]  # entry name -> recipe
    done: dict[str, Recipe]


def resolve(config: TrainConfig, registry: Registry, out: Path) -> Job:
    """Names to specs, and what is left to train. Errors: UsageError, NotFound, Mismatch."""
    if config.name:
        check_name("sae", config.name)
    parents: tuple[SaeSpec, ...] = ()
    if config.on:
        name = parent_of(f"{config.on}/codes") if config.on.startswith("sae:") else config.on
        assert name is not None
        parents = chain_of(registry, registry.sae(name))
        if below := next((link for link in parents if on_decoder(link)), None):
            raise Mismatch(
                f"'{below.name}' reads the decoder of another SAE: nothing is trained on its codes",
                "train on an SAE that reads activations or codes",
            )
    backbone = registry.buildable(_backbone_name(config, parents))
    site, tokens = (
        (parents[-1].site, parents[-1].tokens)
        if parents
        else (config.site or backbone.site, config.tokens)
    )
    if site not in backbone.sites:
        raise Mismatch(
            f"'{backbone.name}' has no site '{site}'",
            f"its sites: {', '.join(backbone.sites) or 'none'}",
        )
    layout = backbone.sites[site]
    kinds = token_kinds(layout, tokens, who="--tokens")
    datasets = config.dataset or ((backbone.dataset,) if backbone.dataset else ())
    if not datasets:
        raise UsageError(f"'{backbone.name}' has no dataset of its own", "give --dataset NAME")
    limit = f"[:{config.train_limit}]" if config.train_limit else ""
    place = Place(
        backbone.name,
        f"sae:{parents[0].name}/codes" if parents else site,
        tokens,
        "+".join(f"{name}/{registry.dataset(name).train}{limit}" for name in datasets),
    )
    d_model = read_entry(parents[0]).d_sae if parents else layout.width
    start, start_sae, semantics = _start(config, registry, d_model)
    named = _named(config, recipes(config, d_model, start), backbone)
    rows = rows_identity(config, registry, backbone, site, kinds, parents, datasets, d_model) | {
        "start": semantics
    }
    done = (
        {}
        if config.overwrite
        else {
            name: recipe
            for name, recipe in named.items()
            if is_done(
                registry,
                entry_path(out, name),
                name,
                place,
                recipe,
                identity_of(recipe, rows, config.save_dtype),
            )
        }
    )
    todo = {name: recipe for name, recipe in named.items() if name not in done}
    return Job(backbone, site, kinds, parents, tuple(datasets), start_sae, place, rows, todo, done)


def _backbone_name(config: TrainConfig, parents: Sequence[SaeSpec]) -> str:
    if parents:
        if config.backbone not in ("", parents[0].backbone):
            raise Mismatch(
                f"'{parents[0].name}' sits on '{parents[0].backbone}', not on '{config.backbone}'",
                "leave --backbone away",
            )
        if config.site or config.tokens != "all":
            raise UsageError("with --on, site and tokens are those of the SAE below")
        return parents[0].backbone
    if not config.backbone:
        raise UsageError("which backbone?", "give --backbone NAME  (saebench ls backbones)")
    return config.backbone


def _named(
    config: TrainConfig, found: Sequence[Recipe], backbone: BackboneSpec
) -> dict[str, Recipe]:
    return {
        f"{backbone.name}/{sae_name(config, recipe, backbone.site, len(found))}": recipe
        for recipe in found
    }


def _start(
    config: TrainConfig, registry: Registry, d_model: int
) -> tuple[Start | None, Sae | None, dict[str, Any]]:
    """What the SAE to start from decides, that SAE, and how its entry says to read it.

    It is named or lies at a path. The hash of its weights is part of the recipe.
    """
    if not config.init:
        return None, None, {}
    path = Path(config.init).expanduser()
    if path.suffix == ".toml" and path.is_file():
        spec = read_spec(SaeSpec, path, path.stem)
    elif path.is_file():
        spec = None
    else:
        spec = registry.sae(config.init)
    sae = read_entry(spec) if spec else read_sae(path)
    sha256 = weights_sha256(spec) if spec else file_sha256(path)
    if sae.d_model != d_model:
        raise Mismatch(
            f"'{config.init}' reads {sae.d_model} dimensions, and there are {d_model} here",
            "is it the right backbone, site or file?",
        )
    arch = architecture_of(sae, config.init)
    k = sae.k or (round(spec.l0) if spec and spec.l0 else None)
    semantics = semantic_fields(spec)["semantics"] if spec else {}
    return Start(arch, k, sae.d_sae, sha256 or ""), sae, semantics
