"""Accumulators: states that restore and merge without losing a bit."""

from __future__ import annotations

import numpy as np
import torch

from saebench.metrics import Contracted, ImageSums, Sums, Total, defined, per_kind, ratio


def test_total() -> None:
    total = Total()
    assert total.mean() is None
    total.add(torch.tensor(3.0), 2)
    total.add(1.0, 2)
    fresh = Total()
    fresh.merge(total.state())
    assert (fresh.sum, fresh.n, fresh.mean()) == (4, 4, 1)


def test_sums() -> None:
    sums = Sums(a=(2,), b=())
    sums.add(a=torch.tensor([1.0, 2.0]), b=np.array(0.5))
    fresh = Sums(a=(2,), b=())
    fresh.merge(sums.state())
    fresh.merge(sums.state())
    assert fresh.values["a"].tolist() == [2, 4]
    assert float(fresh.values["b"]) == 1


def test_image_sums_are_those_of_the_resampled_images() -> None:
    generator = np.random.default_rng(0)
    terms_gbq = generator.normal(size=(2, 9, 3))
    weights_br = generator.poisson(1, (9, 500)).astype(float)
    sums = ImageSums(2, 3)
    for part in (slice(0, 4), slice(4, 9)):
        batch = torch.from_numpy(terms_gbq[:, part]), torch.from_numpy(weights_br[part])
        sums.add(Contracted.of(*batch))
    np.testing.assert_allclose(sums.totals_gq, terms_gbq.sum(1))
    drawn = np.repeat(np.arange(9), weights_br[:, 3].astype(int))
    np.testing.assert_allclose(sums.replicates_grq[:, 3], terms_gbq[:, drawn].sum(1))
    fresh = ImageSums(2, 3)
    fresh.merge(sums.state())
    for name, array in sums.state().items():
        np.testing.assert_array_equal(fresh.state()[name], array)


def test_per_kind() -> None:
    terms_btq = torch.arange(12.0).view(2, 3, 2)
    found = per_kind(terms_btq, [slice(0, 1), slice(1, 3)])
    assert torch.equal(found[0], terms_btq[:, 0])
    assert torch.equal(found[1], terms_btq[:, 1] + terms_btq[:, 2])


def test_undefined_is_none() -> None:
    assert defined(ratio(np.array(1.0), np.array(0.0))) is None
    assert defined(float("inf")) is None
    assert defined(ratio(np.array(1.0), np.array(4.0))) == 0.25
