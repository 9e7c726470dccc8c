"""`loss_substitution` of whole runs against a slow script: forward hooks, one image at a time.

The models are loaded by timm and open_clip themselves, the SAEs computed by NumPy from their
weights, and the sums taken by Python. Nothing here uses `saebench.backbones`.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import timm
import torch
from safetensors.torch import load_file

import saebench
from saebench.data import open_dataset
from saebench.formats import write_sae
from saebench.paths import CONTENT
from saebench.registry import Registry
from saebench.saes import Sae
from tests.content import sae_entry
from tests.small import random_sae

N, N_TRAIN = 24, 12
PASSES = ("clean", "spliced", "zero", "mean")
CLS, PATCHES, ALL = slice(0, 1), slice(1, 65), slice(0, 65)

SAES = {  # name -> backbone, site, tokens
    "whole": ("tiny-vit", "blocks.2", "all"),
    "cls": ("tiny-vit", "blocks.1", "cls"),
    "late": ("tiny-vit", "blocks.3", "patches"),
    "mlp": ("tiny-vit", "blocks.2.mlp", "all"),
    "map": ("tiny-resnet", "layer3", "all"),
    "clip": ("tiny-clip", "blocks.2", "patches"),
    "bioclip": ("tiny-bioclip", "blocks.1", "all"),
    "dino": ("tiny-dinov2", "blocks.1", "all"),
}


def sae_of(name: str) -> Sae:
    return random_sae(list(SAES).index(name), k=None, d=64)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A content folder with the SAEs above."""
    root = tmp_path_factory.mktemp("content")
    for name, (backbone, site, tokens) in SAES.items():
        folder = root / "registry/saes" / backbone
        folder.mkdir(parents=True, exist_ok=True)
        write_sae(sae_of(name), folder / f"{name}.safetensors")
        entry = sae_entry(backbone, site, tokens).replace("sae.safetensors", f"{name}.safetensors")
        (folder / f"{name}.toml").write_text(entry)
    return root


def run(root: Path, out: Path, name: str, *options: str, **more: Any) -> pd.DataFrame:
    backbone = SAES[name][0]
    return saebench.run(
        backbone=backbone,
        sae=f"{backbone}/{name}",
        task="loss_substitution",
        registry=[root],
        out=out,
        limit=N,
        train_limit=N_TRAIN,
        option=[f"loss_substitution.{option}" for option in options],
        workers=0,
        **more,
    )


# --- the slow script -----------------------------------------------------------------------------


@cache
def images(split: str, n: int) -> tuple[torch.Tensor, np.ndarray]:
    data = open_dataset(Registry.load().dataset("shapes"))
    rows = data.manifest(split).order(n)
    pixels = np.stack([np.asarray(data.image(split, int(i))) for i in rows])
    x_b3hw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return (x_b3hw - 0.5) / 0.5, data.manifest(split).labels[rows]


@cache
def model_of(backbone: str) -> torch.nn.Module:
    spec = Registry.load().backbone(backbone)
    assert spec.weights.file
    weights = CONTENT / "registry/backbones" / spec.weights.file
    if "clip" in backbone:  # the two are of one architecture
        logging.disable(logging.WARNING)  # it warns that it loads no weights
        folder = CONTENT / "registry/weights/tiny-clip"
        model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
        logging.disable(logging.NOTSET)
    else:
        model = timm.create_model(spec.model, pretrained=False, **spec.model_args)
    model.load_state_dict(load_file(weights))
    return model.float().eval()


@torch.inference_mode()
def output(backbone: str, site: str, image: torch.Tensor, replace: Callable | None) -> Any:
    """(embedding, logits) of one image, with what a site gives handed through `replace`."""
    model = model_of(backbone)
    is_clip = isinstance(model, open_clip.CLIP)
    path = site.replace("blocks", "visual.transformer.resblocks") if is_clip else site
    module = model.get_submodule(path)

    def hook(_module: Any, _inputs: Any, found: torch.Tensor) -> torch.Tensor | None:
        if replace is None:
            return None
        is_map = found.ndim == 4
        x_td = found[0].flatten(1).T if is_map else found[0]
        new_td = torch.from_numpy(replace(x_td.double().numpy())).float()
        return (new_td.T.reshape(found[0].shape) if is_map else new_td)[None]

    handle = module.register_forward_hook(hook)
    try:
        if is_clip:
            embedding = model.encode_image(image[None])
            return embedding[0].double().numpy(), None
        features = model.forward_features(image[None])  # type: ignore[operator]
        embedding = model.forward_head(features, pre_logits=True)  # type: ignore[operator]
        vector = embedding[0].double().numpy()
        if not model.num_classes:
            return vector, None
        logits = model.get_classifier()(embedding)  # type: ignore[operator]
        return vector, logits[0, 10:58].double().numpy()
    finally:
        handle.remove()


def train_mean(backbone: str, site: str, part: slice) -> np.ndarray:
    """[d] of the tokens of a kind."""
    seen: list[np.ndarray] = []
    for image in images("train", N_TRAIN)[0]:
        output(backbone, site, image, lambda x_td: seen.append(x_td[part]) or x_td)
    return np.concatenate(seen).mean(0)


def reconstruction(sae: Sae, x_td: np.ndarray) -> np.ndarray:
    W_dec, bias = sae.W_dec_sd.double().numpy(), sae.b_dec_d.double().numpy()
    return np.maximum((x_td - bias) @ W_dec.T + sae.b_enc_s.double().numpy(), 0) @ W_dec + bias


def slow(
    name: str, replaced: slice, ablated: slice, kinds: Mapping[str, slice], heads: Any = None
) -> dict[str, dict[str, float]]:
    """head -> metric -> value. `heads`: name -> embedding -> logits; none: the model's own."""
    backbone, site, _ = SAES[name]
    sae = sae_of(name)
    means = {kind: train_mean(backbone, site, part) for kind, part in kinds.items()}

    def swapped(x_td: np.ndarray, part: slice, new_td: np.ndarray) -> np.ndarray:
        changed_td = x_td.copy()
        changed_td[part] = new_td[part]
        return changed_td

    def mean_of(x_td: np.ndarray) -> np.ndarray:
        mean_td = np.empty_like(x_td)
        for kind, part in kinds.items():
            mean_td[part] = means[kind]
        return mean_td

    edits: dict[str, Callable | None] = {
        "clean": None,
        "spliced": lambda x: swapped(x, replaced, reconstruction(sae, x)),
        "zero": lambda x: swapped(x, ablated, np.zeros_like(x)),
        "mean": lambda x: swapped(x, ablated, mean_of(x)),
    }
    found: dict[str, dict[str, list]] = {}
    vectors: dict[str, list[np.ndarray]] = {key: [] for key in edits}
    for image, label in zip(*images("test", N), strict=True):
        outputs = {key: output(backbone, site, image, edit) for key, edit in edits.items()}
        for key, (embedding, _) in outputs.items():
            vectors[key].append(embedding)
        for head, read in (heads or {"": None}).items():
            lists = found.setdefault(head, {})
            logits = {k: read(e) if read else own for k, (e, own) in outputs.items()}
            p = np.exp(logits["clean"]) / np.exp(logits["clean"]).sum()
            for key, row in logits.items():
                log_q = row - math.log(np.exp(row).sum())
                kl = float((p * (np.log(p) - log_q)).sum())
                values = {
                    "loss": -log_q[label],
                    "accuracy": row.argmax() == label,
                    "accuracy_top5": label in np.argsort(-row, kind="stable")[:5],
                    "agreement": row.argmax() == logits["clean"].argmax(),
                    "kl": kl,
                }
                for metric, value in values.items():
                    lists.setdefault(f"{metric}_{key}", []).append(value)
    result = {
        head: {m: math.fsum(v) / len(v) for m, v in lists.items()} for head, lists in found.items()
    }
    for values in result.values():
        clean, spliced, zero, mean = (values[f"loss_{key}"] for key in PASSES)
        values |= {"loss_increase": spliced - clean}
        values |= {"loss_recovered": (zero - spliced) / (zero - clean)}
        values |= {"loss_recovered_mean": (mean - spliced) / (mean - clean)}
        del values["agreement_clean"], values["kl_clean"]
    e = np.stack(vectors["clean"])
    for key in PASSES[1:]:
        other = np.stack(vectors[key])
        lengths = np.linalg.norm(e, axis=1) * np.linalg.norm(other, axis=1)
        result[""][f"embedding_cosine_{key}"] = float(((e * other).sum(1) / lengths).mean())
        spread = ((e - e.mean(0)) ** 2).sum()
        result[""][f"embedding_nmse_{key}"] = float(((other - e) ** 2).sum() / spread)
    return result


def compare(
    rows: pd.DataFrame,
    expected: Mapping[str, Mapping[str, float]],
    tokens: str = "",
    no_share: tuple[str, ...] = (),
) -> None:
    """Every row has to be in the expected ones.

    tokens: of the variant, what is not the default. no_share: metrics without a value.
    """
    assert len(rows) == sum(len(values) for values in expected.values())
    for head, values in expected.items():
        variant = ";".join(sorted(filter(None, [*head.split(";"), *tokens.split(";")])))
        chosen = rows[rows["variant"] == variant].set_index("metric")
        for metric, value in values.items():
            row = chosen.loc[metric]
            if pd.isna(row["value"]):
                assert metric in no_share
                assert row["note"].startswith("|loss_")
                assert "below its standard error" in row["note"]
                continue
            tight = not metric.startswith(("loss_recovered", "loss_increase"))
            assert row["value"] == pytest.approx(value, rel=2e-6 if tight else 1e-4, abs=1e-6), (
                metric,
                variant,
            )
            assert row["n"] == row["n_images"] == N


# --- comparisons ---------------------------------------------------------------------------------

TOKENS = {"cls": CLS, "patches": PATCHES}


@pytest.mark.parametrize(
    ("name", "options", "replaced", "ablated"),
    [
        ("whole", (), ALL, ALL),
        ("mlp", (), ALL, ALL),
        ("whole", ("replaced=patches",), PATCHES, PATCHES),
        ("whole", ("ablated=cls",), ALL, CLS),
        ("cls", (), CLS, CLS),
        ("cls", ("replaced=all",), ALL, ALL),
        ("cls", ("replaced=patches", "ablated=all"), PATCHES, ALL),
    ],
)
def test_a_vit(
    root: Path, tmp_path: Path, name: str, options: tuple[str, ...], replaced: slice, ablated: slice
) -> None:
    rows = run(root, tmp_path, name, *options)
    no_share = ("loss_recovered", "loss_recovered_mean") if name == "mlp" else ()
    compare(rows, slow(name, replaced, ablated, TOKENS), ";".join(options), no_share)
    assert set(rows["loss"].dropna()) == {"head_ce"}
    if "replaced=all" in options:
        (note,) = set(rows.loc[rows["metric"] == "loss_spliced", "note"])
        assert note == "it was not trained on these of the replaced tokens: patches"


def test_a_resnet(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path, "map")
    grid = slice(0, 16)
    compare(rows, slow("map", grid, grid, {"grid": grid}))


def clip_heads(backbone: str) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Variant -> logits, by the entry's templates and bare names, at two temperatures."""
    registry, model = Registry.load(), model_of(backbone)
    assert isinstance(model, open_clip.CLIP)
    folder = CONTENT / "registry/weights/tiny-clip"
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    merges = folder / config["text_cfg"]["tokenizer_kwargs"]["bpe_path"]
    tokenizer: Any = open_clip.get_tokenizer(f"local-dir:{folder}", bpe_path=str(merges))
    templates = registry.backbone(backbone).head.templates["shapes"]
    names = open_dataset(registry.dataset("shapes")).class_names
    scale = model.logit_scale.exp().item()
    heads = {}
    for texts, sentences in {"": templates, "texts=names": ("{}",)}.items():
        classes = []
        for name in names:
            with torch.inference_mode():
                tokens = tokenizer([s.format(name) for s in sentences])
                text = model.encode_text(tokens, normalize=True).double().mean(0).numpy()
            classes.append(text / np.linalg.norm(text))
        W = np.stack(classes)
        for temperature, factor in {"": scale, "temperature=1": 1.0}.items():

            def logits(e: np.ndarray, W: np.ndarray = W, factor: float = factor) -> np.ndarray:
                return factor * (W @ (e / np.linalg.norm(e)))

            heads[";".join(filter(None, [temperature, texts]))] = logits
    return heads


@pytest.mark.parametrize(("name", "part"), [("clip", PATCHES), ("bioclip", ALL)])
def test_a_clip_model_by_four_heads(root: Path, tmp_path: Path, name: str, part: slice) -> None:
    rows = run(root, tmp_path, name)
    compare(rows, slow(name, part, part, TOKENS, clip_heads(SAES[name][0])))
    assert set(rows["loss"].dropna()) == {"zero_shot_ce"}


@pytest.mark.filterwarnings("ignore:the probe of")  # so few images lack some classes
def test_a_model_without_a_head_by_its_probe(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_STORE", str(tmp_path / "store"))
    rows = run(root, tmp_path / "out", "dino")
    (probe,) = (tmp_path / "store/artifacts/linear_head").glob("*/data.safetensors")
    arrays = {name: array.double().numpy() for name, array in load_file(probe).items()}
    heads = {"": lambda e: e @ arrays["W_dc"] + arrays["b_c"]}
    tokens = {"cls": slice(0, 1), "registers": slice(1, 5), "patches": slice(5, 69)}
    everything = slice(0, 69)
    compare(rows, slow("dino", everything, everything, tokens, heads))
    assert set(rows["loss"].dropna()) == {"linear_head_ce"}


# --- what a whole run has to keep ----------------------------------------------------------------


def test_patches_at_the_last_block_are_vacuous(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path, "late")
    clean = rows["metric"].str.endswith("_clean")
    assert rows.loc[clean, "value"].notna().all()
    assert rows.loc[~clean, "value"].isna().all()
    assert rows.loc[~clean, "note"].str.startswith("vacuous").all()
    seen = run(root, tmp_path, "late", "replaced=cls")
    assert seen["value"].notna().all()


def test_tokens_that_are_not_there(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path, "whole", "replaced=registers")
    row = rows[rows["metric"] == "loss_recovered"].iloc[0]
    assert pd.isna(row["value"])
    assert row["note"] == "the site blocks.2 has no tokens 'registers'"


def values(rows: pd.DataFrame) -> pd.DataFrame:
    key = ["metric", "variant"]
    return rows.sort_values(key).set_index(key)[["value", "ci_low", "ci_high", "n"]]


def test_batches_of_another_size_agree_and_shared_passes_change_nothing(
    root: Path, tmp_path: Path
) -> None:
    """Contract (c), 1e-6 on sums; and an SAE alone has the bits that it has among others."""
    alone = run(root, tmp_path / "alone", "whole")
    parts = values(run(root, tmp_path / "parts", "whole", batch_size=7))
    for key, row in values(alone).iterrows():
        tight = not str(key[0]).startswith("loss_recovered")  # type: ignore[index]
        assert parts.loc[key, "value"] == pytest.approx(  # type: ignore[index]
            row["value"], rel=1e-6 if tight else 1e-5, abs=1e-7
        ), key
    together = saebench.run(
        backbone="tiny-vit",
        sae=["tiny-vit/whole", "tiny-vit/mlp", "tiny-vit/cls", "zero"],
        task="loss_substitution",
        registry=[root],
        out=tmp_path / "together",
        limit=N,
        train_limit=N_TRAIN,
        workers=0,
    )
    same = values(together[together["sae"] == "tiny-vit/whole"])
    pd.testing.assert_frame_equal(same, values(alone), check_exact=True)
