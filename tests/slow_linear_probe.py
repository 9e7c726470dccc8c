"""The slow plain way to measure `linear_probe`: forward hooks, NumPy and scikit-learn.

The models are loaded by timm and open_clip themselves, the SAE (TopK, on all tokens of its site) is
computed by NumPy from its file, and every probe is scikit-learn's, run to its optimum. saebench
gives the pixels, the labels, and the order of the images. Nothing here uses `saebench.probe`,
`saebench.probing` or `saebench.backbones`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import open_clip
import torch
from safetensors import safe_open
from sklearn.tree import DecisionTreeClassifier

from saebench.data import Manifest, open_dataset
from saebench.paths import CONTENT
from saebench.registry import Registry
from tests.slow_probes import fit, level_scores, macro, one_latent, ranking, scores
from tests.slow_substitution import model_of

DEPTH = 10  # of the tree
SITES = {name: ("blocks.2", 0) for name in ("tiny-clip", "tiny-bioclip", "tiny-dinov2", "tiny-vit")}
SITES |= {"tiny-resnet": ("layer3", None)}  # site, where CLS is


@dataclass(frozen=True)
class Labelled:
    """n images [n 3 h w], and a class for each."""

    images: torch.Tensor
    labels: np.ndarray


@cache
def images(dataset: str, split: str, n: int, label: str = "") -> Labelled:
    data = open_dataset(Registry.load().dataset(dataset))
    manifest = data.manifest(split)
    rows = manifest.order(n)
    pixels = np.stack([np.asarray(data.image(split, int(i)).convert("RGB")) for i in rows])
    x_b3hw = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return Labelled((x_b3hw - 0.5) / 0.5, labels_of(manifest, label)[rows])


def labels_of(manifest: Manifest, label: str) -> np.ndarray:
    return manifest.levels[label] if label else manifest.labels


@cache
def sae_of(name: str) -> Mapping[str, Any]:
    """The weights of an SAE's file in float64, and its k."""
    path = CONTENT / "registry/saes" / f"{name}.safetensors"
    with safe_open(path, "np") as file:
        config = json.loads(file.metadata()["config"])
        assert config["architecture"] == "topk"
        assert (config["pre_bias"], config["scale"], config["signed"]) == (True, 1.0, False)
        return {key: file.get_tensor(key).astype(np.float64) for key in file.keys()} | {  # noqa: SIM118
            "k": config["k"]
        }


def codes_of(sae: Mapping[str, Any], x_btd: np.ndarray) -> np.ndarray:
    """[b t s]: the k largest of a row, where they are positive."""
    pre_bts = (x_btd - sae["b_dec"]) @ sae["W_enc"] + sae["b_enc"]
    least_bt1 = np.partition(pre_bts, -sae["k"], axis=2)[:, :, -sae["k"], None]
    return np.where((pre_bts >= least_bt1) & (pre_bts > 0), pre_bts, 0)


def reconstruction(sae: Mapping[str, Any], x_btd: np.ndarray) -> np.ndarray:
    return codes_of(sae, x_btd) @ sae["W_dec"] + sae["b_dec"]


@torch.inference_mode()
def forward(
    backbone: str, images_b3hw: torch.Tensor, replace: Callable[[np.ndarray], np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """What the site gives [b t d], and the embedding [b e], with it handed through `replace`."""
    model = model_of(backbone)
    site, _ = SITES[backbone]
    is_clip = isinstance(model, open_clip.CLIP)
    path = site.replace("blocks", "visual.transformer.resblocks") if is_clip else site
    seen: list[np.ndarray] = []

    def hook(_module: Any, _inputs: Any, found: torch.Tensor) -> torch.Tensor | None:
        x_btd = found.flatten(2).transpose(1, 2) if found.ndim == 4 else found
        seen.append(x_btd.double().numpy())
        if replace is None:
            return None
        new_btd = torch.from_numpy(replace(seen[-1])).float()
        return new_btd.transpose(1, 2).reshape(found.shape) if found.ndim == 4 else new_btd

    handle = model.get_submodule(path).register_forward_hook(hook)
    try:
        outputs = []
        for some in images_b3hw.split(100):
            if is_clip:
                outputs.append(model.encode_image(some))  # type: ignore[operator]
            else:
                features = model.forward_features(some)  # type: ignore[operator]
                outputs.append(model.forward_head(features, pre_logits=True))  # type: ignore[operator]
    finally:
        handle.remove()
    return np.concatenate(seen), torch.cat(outputs).double().numpy()


@dataclass(frozen=True)
class Features:
    """x, x̂: [n f]; codes: pooling -> [n s]."""

    x: np.ndarray
    xhat: np.ndarray
    codes: Mapping[str, np.ndarray]


def features_of(
    backbone: str, images_b3hw: torch.Tensor, sae: Mapping[str, Any], feature: str
) -> Features:
    """feature: cls, mean, cls+mean or embedding."""
    x_btd, embedding_be = forward(backbone, images_b3hw, None)
    _, cls = SITES[backbone]
    own = slice({"tiny-dinov2": 5, "tiny-resnet": 0}.get(backbone, 1), None)  # patches, or the grid
    pooled = {"max": lambda z_btd: z_btd.max(1), "mean": lambda z_btd: z_btd.mean(1)}

    def read(name: str, how: str, of: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        tokens = {"cls": slice(0, 1), "mean": own}
        return np.concatenate(
            [pooled[how](of(x_btd[:, tokens[p]])) for p in name.split("+")], axis=1
        )

    usual = "mean" if cls is None else "cls"
    of_codes = usual if feature == "embedding" else feature
    ways = {"none": "max"} if of_codes == "cls" else {"max": "max", "mean": "mean"}
    codes = {
        way: read(of_codes, how, lambda some: codes_of(sae, some)) for way, how in ways.items()
    }
    if feature == "embedding":
        spliced_be = forward(backbone, images_b3hw, lambda some: reconstruction(sae, some))[1]
        return Features(embedding_be, spliced_be, codes)
    xhat = read(feature, "mean", lambda some: reconstruction(sae, some))
    return Features(read(feature, "mean", lambda some: some), xhat, codes)


@dataclass(frozen=True)
class Slow:
    """One SAE of a backbone on a dataset: the first images of its two splits."""

    sae: str
    dataset: str
    n_train: int
    n_test: int
    feature: str
    label: str = ""
    ks: tuple[int, ...] = ()
    levels: tuple[str, ...] = ()

    @cached_property
    def train(self) -> Labelled:
        return images(self.dataset, "train", self.n_train, self.label)

    @cached_property
    def test(self) -> Labelled:
        return images(self.dataset, "test", self.n_test, self.label)

    @cached_property
    def held_n(self) -> np.ndarray:
        return np.arange(self.n_train) % 5 == 4

    @cached_property
    def features(self) -> tuple[Features, Features]:
        backbone, sae = self.sae.split("/")[0], sae_of(self.sae)
        train, test = self.train.images, self.test.images
        return tuple(features_of(backbone, some, sae, self.feature) for some in (train, test))  # type: ignore[return-value]

    def level_c(self, level: str) -> np.ndarray:
        """The level's value of each class."""
        manifest = open_dataset(Registry.load().dataset(self.dataset)).manifest("train")
        label_n, level_n = labels_of(manifest, self.label), manifest.levels[level]
        return np.array([level_n[label_n == c][0] for c in range(label_n.max() + 1)])

    def rows(
        self, penalties: Mapping[tuple[str, str], float] | None = None
    ) -> dict[tuple[str, str], float]:
        """(metric, variant) -> value. penalties: of the accuracies, another's choices."""
        train, test = self.features
        y, held, stated = self.train.labels, self.held_n, penalties or {}
        on_x = fit(train.x, y, held, stated.get(("probe_accuracy_x", "")))
        on_xhat = fit(train.xhat, y, held, stated.get(("probe_accuracy_xhat_refit", "")))
        logits = {
            ("probe", "x", ""): on_x.logits(test.x),
            ("probe", "xhat_frozen", ""): on_x.logits(test.xhat),
            ("probe", "xhat_refit", ""): on_xhat.logits(test.xhat),
        }
        default = next(iter(train.codes))
        for pooling, z_ns in train.codes.items():
            variant = "" if pooling == default else f"pooling={pooling}"
            own = fit(z_ns, y, held, stated.get(("probe_accuracy_codes", variant)))
            logits["probe", "codes", variant] = own.logits(test.codes[pooling])
        best_s = ranking(train.codes[default][~held], y[~held])
        for k in self.ks:
            z_nk, penalty = (
                train.codes[default][:, best_s[:k]],
                stated.get((f"sparse_probe_accuracy_k{k}", "")),
            )
            own = fit(z_nk, y, held, penalty)
            logits["sparse_probe", f"k{k}", ""] = own.logits(test.codes[default][:, best_s[:k]])
        found: dict[tuple[str, str], float] = {}
        for variant in ("", *self.levels):
            found |= self.rows_of(logits, variant)
        return found | self.tree_rows(
            found["probe_accuracy_x", ""], found["probe_accuracy_x_macro", ""]
        )

    def rows_of(self, logits: Mapping[Any, np.ndarray], level: str) -> dict[tuple[str, str], float]:
        """Of the probes' logits; at a higher level, if one is named: of the default pooling."""
        y = self.test.labels
        scored = {
            key: level_scores(own, y, self.level_c(level)) if level else scores(own, y)
            for key, own in logits.items()
            if not level or (key[0] == "probe" and not key[2])
        }
        x = scored["probe", "x", ""]
        found: dict[tuple[str, str], float] = {}
        for (kind, who, variant), own in scored.items():
            name = ";".join(filter(None, [f"level={level}" if level else "", variant]))
            for measure, value in own.items():
                metric = "loss_" + who if measure == "loss" else f"accuracy_{who}{measure}"
                found[f"{kind}_{metric}", name] = value
                change = who.removeprefix("xhat_")
                metric = (
                    "loss_increase_" + change if measure == "loss" else f"delta_{change}{measure}"
                )
                if who != "x":
                    found[f"{kind}_{metric}", name] = value - x[measure]
        return found

    def tree_rows(self, x: float, x_macro: float) -> dict[tuple[str, str], float]:
        train, test = self.features
        default = next(iter(train.codes))
        tree = DecisionTreeClassifier(max_depth=DEPTH, random_state=0)
        tree.fit(train.codes[default].astype(np.float32), self.train.labels)
        y = self.test.labels
        right_n = tree.predict(test.codes[default].astype(np.float32)) == y
        accuracy, by_class = float(right_n.mean()), macro(right_n, y)
        return {
            ("tree_accuracy_codes", ""): accuracy,
            ("tree_accuracy_codes_macro", ""): by_class,
            ("tree_delta_codes", ""): accuracy - x,
            ("tree_delta_codes_macro", ""): by_class - x_macro,
        }

    def r_1d(self) -> float:
        """Mean over classes of 1 − CE/CE(prevalence), by the best single latent of each."""
        train, test = self.features
        default = next(iter(train.codes))
        z_ns, y, y_test = train.codes[default], self.train.labels, self.test.labels
        found = []
        for label in range(y.max() + 1):
            own_n, p = y == label, (y == label).mean()
            with np.errstate(invalid="ignore", divide="ignore"):
                r_s = np.abs(np.nan_to_num(np.corrcoef(z_ns.T, own_n)[-1, :-1]))
            tried = [
                (*one_latent(z_ns[:, s], own_n), s)
                for s in np.argsort(-r_s.round(9), kind="stable")[:32]
            ]
            _, (a, b), s = min(tried, key=lambda fitted: fitted[0])
            test_n = y_test == label
            by_latent = np.logaddexp(
                0, np.where(test_n, -1, 1) * (a * test.codes[default][:, s] + b)
            )
            by_share = -np.where(test_n, np.log(p), np.log(1 - p))
            found.append(1 - by_latent.sum() / by_share.sum())
        return float(np.mean(found))
