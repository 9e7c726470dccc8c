"""Probes as linear heads: held to scikit-learn on the same features, fitted once, in one pass."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from torch import Tensor

from saebench.api import config_of, source_of
from saebench.backbones import Backbone, load_backbone
from saebench.data import Dataset
from saebench.data.loader import batches
from saebench.errors import ImageError, Mismatch
from saebench.fit import Fitter
from saebench.fits import SiteMean
from saebench.linear_head import ProbeFit
from saebench.readouts import LinearHead, OwnHead, build_readouts, fits_ahead
from saebench.registry import Registry
from saebench.store import Artifact, Store
from saebench.tiles import Tiles
from saebench.units import backbone_identity

N = 300  # train images


class Case:
    """A backbone on a dataset, with a store and fitters of its own."""

    def __init__(self, name: str, dataset: str, tmp_path: Path, n: int = N, **spec: Any) -> None:
        registry = Registry.load()
        self.spec = registry.buildable(name)
        if spec:
            self.spec = replace(self.spec, head=replace(self.spec.head, **spec))
        self.backbone = load_backbone(self.spec, device="cpu")
        self.source = source_of(registry.dataset(dataset), config_of(train_limit=n))
        assert self.source.dataset is not None
        self.dataset: Dataset = self.source.dataset
        self.store = Store(tmp_path / "store")
        self.seen = 0

    def fitter(self, batch_size: int = 64, **options: Any) -> Fitter:
        def count(n: int) -> None:
            self.seen += n

        identity = partial(backbone_identity, self.spec)
        parts = (self.backbone, self.dataset, self.source, self.store, identity, "float32")
        return Fitter(*parts, Tiles(4 * 2**20, batch_size), on_images=count, **options)

    def head(self, how: str = "auto", **options: Any) -> LinearHead:
        made = build_readouts(
            self.backbone, self.dataset, self.source, self.fitter(**options), head=how
        )
        assert isinstance(made.heads[0], LinearHead)
        return made.heads[0]

    def probe(self) -> Artifact:
        (found,) = self.fitter().fit([self.maker])
        return found

    @property
    def maker(self) -> Callable[[], ProbeFit]:
        return partial(ProbeFit, self.backbone, len(self.dataset.class_names))

    def features(self, split: str, n: int) -> tuple[np.ndarray, np.ndarray]:
        """[n d] float64 by plain forward passes, and labels."""
        manifest = self.dataset.manifest(split)
        order = manifest.order(n)
        stream = batches(self.dataset, split, order, self.backbone.transform, 64, 0)
        read = [self.backbone.forward(images).read_bd for _, images in stream]
        return torch.cat(read).double().numpy(), manifest.labels[order]


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("tiny-dinov2", "digits", tmp_path_factory.mktemp("dinov2"))


def test_a_probe_is_that_of_scikit_learn(dinov2: Case) -> None:
    head, arrays = dinov2.head(), dinov2.probe().arrays
    x, y = dinov2.features("train", N)
    centred = x - x.mean(axis=0)
    scaled = centred / np.sqrt((centred**2).mean())
    penalty = float(arrays["penalty"])
    model = LogisticRegression(C=1 / (penalty * N), tol=1e-9, max_iter=50_000).fit(scaled, y)
    logits = x @ head.W_dc.numpy() + head.b_c.numpy()
    expected = log_loss(y, model.predict_proba(scaled))
    assert float(arrays["loss_train"]) == pytest.approx(expected, rel=2e-3)
    assert (logits.argmax(1) == y).mean() == pytest.approx(float(arrays["accuracy_train"]))
    assert bool(arrays["converged"])
    test_x, test_y = dinov2.features("test", 300)
    theirs = model.predict((test_x - x.mean(axis=0)) / np.sqrt((centred**2).mean()))
    mine = (test_x @ head.W_dc.numpy() + head.b_c.numpy()).argmax(1)
    assert (mine == theirs).mean() > 0.99
    assert (mine == test_y).mean() > 0.8
    assert float(arrays["accuracy_validation"]) > 0.6  # of 60 images


def test_it_is_fitted_once_for_all(dinov2: Case) -> None:
    first = dinov2.head()
    seen = dinov2.seen
    again = dinov2.head()
    assert dinov2.seen == seen
    assert torch.equal(first.W_dc, again.W_dc)
    assert first.columns == {
        "loss": "linear_head_ce",
        "head": "probe",
        "temperature": "model",
        "feature": "embedding",
        "solver": "logistic",
    }
    assert first.note.startswith("a probe of ")
    assert first.n_classes == 10


def test_it_reads_the_features_of_the_entry(tmp_path: Path) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path, n=60, features=("cls", "patches"))
    head = case.head()
    assert head.W_dc.shape == (128, 10)
    output = case.backbone.forward(torch.zeros(2, 3, 32, 32))
    assert torch.equal(head.logits(output), output.read_bd.double() @ head.W_dc + head.b_c)


def test_any_backbone_can_be_read_by_one(tmp_path: Path) -> None:
    case = Case("tiny-clip", "digits", tmp_path)
    head = case.head("linear")
    assert torch.equal(head.W_dc, torch.from_numpy(case.probe().arrays["W_dc"]))
    x, y = case.features("test", 200)
    assert ((x @ head.W_dc.numpy() + head.b_c.numpy()).argmax(1) == y).mean() > 0.8


def test_what_is_asked_for_together_is_one_pass(tmp_path: Path) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path)
    case.source = replace(case.source, n_train=100, n_probe=150)
    site = case.spec.site
    mean, probe = case.fitter().fit([partial(SiteMean, case.backbone, site), case.maker])
    assert case.seen == 150
    assert int(mean.arrays["n_k"][0]) == 100
    apart = Case("tiny-dinov2", "digits", tmp_path / "apart")
    apart.source = case.source
    assert probe.id == apart.probe().id
    for name, array in apart.probe().arrays.items():
        np.testing.assert_array_equal(probe.arrays[name], array)


def test_one_that_is_asked_for_later_is_fitted_in_a_pass_that_is_due(tmp_path: Path) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path)
    case.source = replace(case.source, n_train=100, n_probe=150)
    ahead = fits_ahead(case.backbone, case.dataset)
    mean = partial(SiteMean, case.backbone, case.spec.site)
    case.fitter(ahead=ahead).fit([mean])
    assert case.seen == 150
    case.head()
    case.fitter(ahead=ahead).fit([mean])
    assert case.seen == 150
    assert fits_ahead(case.backbone, case.dataset, head="linear") != []
    classifier = Case("tiny-vit", "shapes", tmp_path, n=20)
    assert fits_ahead(classifier.backbone, classifier.dataset) == []


def test_what_fails_of_it_fails_when_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path, n=60)

    def fails(*args: Any, **options: Any) -> NoReturn:
        raise ValueError("no such probe")

    monkeypatch.setattr("saebench.linear_head.fit_probe", fails)
    ahead = fits_ahead(case.backbone, case.dataset)
    fitter = case.fitter(ahead=ahead)
    (mean,) = fitter.fit([partial(SiteMean, case.backbone, case.spec.site)])
    assert int(mean.arrays["n_k"][0]) == 60
    with pytest.raises(ValueError, match="no such probe"):
        fitter.fit([case.maker])


def test_a_pass_that_runs_out_of_memory_begins_again(
    dinov2: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path)
    forward, calls = Backbone.forward, []

    def fails(self: Backbone, images_b3hw: Tensor) -> Any:
        calls.append(len(images_b3hw))
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory")
        return forward(self, images_b3hw)

    monkeypatch.setattr(Backbone, "forward", fails)
    case.head(batch_size=64)
    assert calls[2:5] == [64, 32, 32]
    found, expected = case.probe().arrays, dinov2.probe().arrays
    assert float(found["loss_train"]) == pytest.approx(float(expected["loss_train"]), rel=1e-4)


def test_images_that_do_not_decode_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path, n=50)
    bad = int(case.dataset.manifest("train").order(50)[7])
    decode = type(case.dataset)._decode

    def fails(self: Dataset, split: str, index: int) -> Any:
        if (split, index) == ("train", bad):
            raise ImageError("not an image")
        return decode(self, split, index)

    monkeypatch.setattr(type(case.dataset), "_decode", fails)
    told: list[int] = []
    options: Mapping[str, Any] = {
        "bad_images": "skip",
        "on_bad": lambda split, row, why: told.append(row),
    }
    (found,) = case.fitter(**options).fit([case.maker])
    assert told == [bad]
    assert "left_out" in found.meta["fields"]
    monkeypatch.undo()
    whole = case.probe()
    assert whole.id != found.id
    assert "left_out" not in whole.meta["fields"]
    assert not np.array_equal(whole.arrays["W_dc"], found.arrays["W_dc"])


def test_too_few_images_are_told(tmp_path: Path) -> None:
    case = Case("tiny-dinov2", "digits", tmp_path, n=4)
    with pytest.warns(UserWarning, match="the probe of 'tiny-dinov2'") as told:
        head = case.head()
    said = " ".join(str(one.message) for one in told)
    assert "saw no image of 6 of its 10 classes" in said
    assert "too few images to choose its penalty by" in said
    assert "--train-limit" in said
    assert torch.isfinite(head.logits(case.backbone.forward(torch.zeros(1, 3, 32, 32)))).all()


def test_one_that_did_not_converge_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("saebench.probe.logistic.PASSES", 2)
    case = Case("tiny-dinov2", "digits", tmp_path, n=60)
    with pytest.warns(UserWarning, match="the probe of 'tiny-dinov2' on 'digits' did not converge"):
        case.head()
    with pytest.warns(UserWarning, match="did not converge"):  # also of one from the store
        case.head()


def test_no_warning_where_all_is_well(dinov2: Case) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dinov2.head()


def test_a_classifier_of_other_classes_is_refused(tmp_path: Path) -> None:
    case = Case("tiny-vit", "shapes", tmp_path, n=20, classes={"shapes": (0, 10)})
    with pytest.raises(Mismatch) as refused:
        build_readouts(case.backbone, case.dataset, case.source, case.fitter())
    assert "gives 'shapes' 10 outputs, and the dataset has 48 classes" in str(refused.value)
    right = Case("tiny-vit", "shapes", tmp_path, n=20)
    made = build_readouts(right.backbone, right.dataset, right.source, right.fitter())
    assert isinstance(made.heads[0], OwnHead)
