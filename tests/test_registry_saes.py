"""The entries of published SAEs: what the recipe writes, what fits, and what stays open."""

from __future__ import annotations

import re
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from recipes import public_saes
from recipes.public_saes.entry import Entry, toml
from saebench import paths
from saebench.coders import candidates, check_fit
from saebench.errors import WeightsError
from saebench.formats import facts_of
from saebench.identity import file_sha256
from saebench.listing import listing
from saebench.registry import Origin, Registry
from saebench.saes import ARCHITECTURES
from saebench.weights import weights_bytes, weights_path, weights_sha256

REGISTRY = Registry((Origin("built-in", paths.CONTENT, trusted=True),))
FOLDER = paths.CONTENT / "registry/saes"
ENTRIES = {entry.name: entry for entry in public_saes.ENTRIES}
ALL = pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)


def embedded() -> set[str]:
    return {name for name in REGISTRY.backbones if REGISTRY.backbone(name).embedded}


# What is committed.


def test_the_committed_files_are_what_the_recipe_writes() -> None:
    written = public_saes.files()
    assert len(written) == len(public_saes.ENTRIES), "a name twice"
    committed = {
        path.relative_to(FOLDER).as_posix(): path.read_text(encoding="utf-8")
        for path in FOLDER.rglob("*.toml")
        if path.relative_to(FOLDER).parts[0] not in embedded()
    }
    assert committed == written, "python -m recipes.public_saes  writes them anew"


def test_the_page_has_the_table_of_the_entries() -> None:
    page = (paths.CONTENT / "docs/public_saes.md").read_text(encoding="utf-8")
    assert public_saes.page(page) == page, "python -m recipes.public_saes  writes it anew"
    assert page.count("\n| `") == len({entry.series for entry in public_saes.ENTRIES})


def test_writing_again_writes_the_same(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    page = tmp_path / "docs/public_saes.md"
    page.write_text("before\n<!-- saes -->\n<!-- end -->\nafter\n")
    public_saes.write(tmp_path)
    first = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    public_saes.write(tmp_path)
    assert {path: path.read_bytes() for path in first} == first
    assert page.read_text().startswith("before\n<!-- saes -->\n| SAEs |")
    assert page.read_text().endswith("|\n<!-- end -->\nafter\n")


def test_a_series_is_a_pattern_that_means_its_entries() -> None:
    for series in {entry.series for entry in ENTRIES.values()}:
        meant = {name for name in REGISTRY.saes if fnmatchcase(name, series)}
        assert meant == {e.name for e in ENTRIES.values() if e.series == series}


def test_as_many_as_their_makers_published() -> None:
    """Layers, widths and sparsities as in docs/sae_table.md, the packages and the model cards."""
    counts = Counter(re.split(r"/|-layer|-(?=\d+x-)", entry.name)[1] for entry in ENTRIES.values())
    assert counts["prisma-resid"] == 12 + 12  # CLIP and DINO
    assert counts["prisma-mlp"] == counts["prisma-topk64-cls"] == counts["prisma-cls"] == 12
    assert counts["prisma-patches"] == 11  # their table leaves out layer 10
    assert counts["visaebench"] == 5 * 3 * 4
    assert counts["clipscope"] == 8
    assert counts["saev"] == 3
    assert counts["saev-matryoshka"] == 6 + 6 + 6
    assert counts["saev-topk"] == 6


# Every entry.


@ALL
def test_an_entry_is_complete_and_fits_its_backbone(entry: Entry) -> None:
    spec = REGISTRY.sae(entry.name)
    backbone = REGISTRY.backbone(spec.backbone)
    site = check_fit(backbone, spec)
    assert spec.tokens == "all" or set(spec.tokens.split("+")) <= set(site.kinds)
    assert not backbone.embedded
    assert spec.architecture in ARCHITECTURES
    assert all((spec.recipe, spec.description))
    assert re.match(r"https://(arxiv\.org/abs/\d{4}\.\d{5}$|openreview|huggingface)", spec.paper)
    assert re.fullmatch(r"[0-9a-f]{40}", spec.weights.revision or "0" * 40)
    assert (spec.weights.hub is None) != (spec.weights.file is None)
    assert (spec.weights.file is None) == (not spec.weights.url)
    facts_of(spec)


@ALL
def test_what_is_not_known_is_open_and_marked(entry: Entry) -> None:
    spec, text = REGISTRY.sae(entry.name), toml(entry)
    marked = re.findall(r"^# not known: ([\w, ]+)", text, re.MULTILINE)
    open_keys = {key.strip() for line in marked for key in line.split(",")}
    named = spec.weights.filename is not None and not spec.weights.filename.endswith("/")
    assert (spec.licence == "") == ("licence" in open_keys)
    assert (spec.trained_on == "") == ("trained_on" in open_keys)
    assert (spec.weights.hub is not None and not named) == ("filename" in open_keys)
    assert "sha256" in open_keys
    assert spec.weights.sha256 is None
    assert (spec.weights.revision is None and spec.weights.hub is not None) == (
        "revision" in open_keys
    )
    assert ("\n# input = …" in text) == ("input" in entry.to_settle)


def test_an_entry_whose_file_is_not_known_is_refused_with_how_to_find_it() -> None:
    unnamed = [entry.name for entry in ENTRIES.values() if "filename" in entry.to_settle]
    assert unnamed
    for spec in map(REGISTRY.sae, unnamed):
        with pytest.raises(WeightsError, match=r"which file of .* is not known") as error:
            weights_sha256(spec)
        folder = (spec.weights.filename or "").rstrip("/")
        address = f"hf-hub:{spec.weights.hub}" + (f"/{folder}" if folder else "")
        said = f"--from {address} --backbone {spec.backbone} --site {spec.site}"
        assert said in error.value.hint


@pytest.mark.parametrize(
    "entry", [e for e in ENTRIES.values() if "file" in e.weights], ids=lambda e: e.name
)
def test_a_file_that_is_put_by_hand_is_found(
    entry: Entry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_WEIGHTS", str(tmp_path / "weights"))
    spec, file = REGISTRY.sae(entry.name), tmp_path / "weights" / entry.weights["file"]
    with pytest.raises(WeightsError, match="is not there") as error:
        weights_path(spec)
    assert entry.weights["url"] in error.value.hint
    assert str(file) in error.value.hint
    file.parent.mkdir(parents=True)
    file.write_bytes(b"weights")
    assert weights_path(spec) == file
    assert weights_bytes(spec) == 7
    assert weights_sha256(spec) == file_sha256(file)


# What others see of them.


def test_all_are_listed() -> None:
    rows, errors = listing(REGISTRY, "saes")
    assert not errors
    assert ENTRIES.keys() <= {name for name, _, _ in rows}


def test_the_embedded_benchmark_does_not_see_them() -> None:
    for name in embedded():
        found = candidates(REGISTRY, REGISTRY.backbone(name))
        assert not found.refused
        assert all(ref.sae is None or ref.sae.backbone == name for ref in found.refs)


def test_what_runs_by_default_leaves_nothing_open_and_is_little() -> None:
    default = [entry for entry in ENTRIES.values() if entry.suite == "default"]
    assert default
    assert all(not entry.to_settle for entry in default)
    assert max(Counter(entry.backbone for entry in default).values()) <= 3


# Numbers, names and facts of their makers' pages, of one entry of each kind.


@pytest.mark.parametrize(
    ("name", "fields", "weights"),
    [
        (
            "clip-vit-b32-datacomp/prisma-resid-layer2",
            {"site": "blocks.2", "tokens": "all", "l0": 717.84},
            {
                "hub": "Prisma-Multimodal/sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-2-"
                "hook_resid_post-l1-5e-05"
            },
        ),
        (
            "clip-vit-b32-datacomp/prisma-mlp-layer10",
            {"site": "blocks.10.mlp", "l0": 788.49},
            {
                "hub": "Prisma-Multimodal/sparse-autoencoder-clip-b-32-sae-vanilla-x64-layer-10-"
                "hook_mlp_out-l1-1e-05",
                "filename": "weights.pt",
                "beside": {"config.json": ""},
            },
        ),
        (
            "clip-vit-b32-datacomp/prisma-cls-layer11",
            {"tokens": "cls", "l0": 386.09},
            {
                "hub": "Prisma-Multimodal/imagenet-sweep-vanilla-x64-CLS_11-hook_resid_post-"
                "383.75-65"
            },
        ),
        (
            "clip-vit-b32-datacomp/prisma-patches-layer8",
            {"tokens": "patches", "l0": 965.12},
            {
                "hub": "Prisma-Multimodal/imagenet-sweep-vanilla-x64-Spatial_max_8-"
                "hook_resid_post-965.125-99"
            },
        ),
        (
            "dino-vitb16/prisma-resid-layer2",
            {"l0": 812.0},
            {"hub": "Prisma-Multimodal/DINO-vanilla-x64-all_patches_2-resid_post-661-95"},
        ),
        (
            "dinov2-vitb14/visaebench-16x-k192",
            {"site": "blocks.11", "tokens": "patches", "l0": 208.0},
            {"hub": "visaebench/dinov2-vitb14-saes", "filename": "batchtopk_16x_k192/"},
        ),
        (
            "clip-vit-l14-laion2b/clipscope-layer22",
            {"site": "blocks.22", "tokens": "all", "l0": 32.0, "licence": "CC-BY-4.0"},
            {"hub": "lewington/CLIP-ViT-L-scope", "filename": "22_resid/1200013184.pt"},
        ),
        (
            "dinov3-vitl16/saev-matryoshka-lnleoyf6",
            {"site": "blocks.23", "tokens": "patches"},
            {
                "hub": "osunlp/SAE_DINOv3_ViT-L-16_IN1K",
                "filename": "layer_23/lnleoyf6/sae.pt",
            },
        ),
        (
            "siglip-vit-b16/universalsae",
            {
                "site": "norm",
                "semantics": {"k": 32, "input_mean": -0.030537348240613937, "input_std": 2.2315254},
            },
            {"file": "universalsae/uni_SigLIP_checkpoint_29.pth"},
        ),
    ],
)
def test_an_entry_says_what_its_makers_page_says(
    name: str, fields: dict[str, object], weights: dict[str, object]
) -> None:
    spec = REGISTRY.sae(name)
    assert {key: getattr(spec.weights, key) for key in weights} == weights
    for key, value in fields.items():
        found = getattr(spec, key)
        assert found == (pytest.approx(value) if isinstance(value, (dict, float)) else value), key
