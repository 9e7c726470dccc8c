"""Codes of train images in parts, against dense NumPy; in memory and streamed."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from saebench.probing import train_codes
from saebench.probing.train_codes import TrainCodes

N, D, C = 60, 12, 3
Y = torch.arange(N) % C
CPU = torch.device("cpu")


@pytest.fixture(params=["in memory", "streamed"])
def how(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "streamed":
        monkeypatch.setattr(train_codes, "IN_MEMORY", 10)
    return request.param


def made(parts: int = 4) -> tuple[np.ndarray, TrainCodes]:
    """Dense z [N D], a third of it not zero, and the same in parts that end within an image."""
    rng = np.random.default_rng(0)
    z_nd = rng.gamma(1.0, size=(N, D)).astype(np.float32) * (rng.random((N, D)) < 0.3)
    z_nd[[0, 17, 59]] = 0  # images without a code
    images_m, latents_m = z_nd.nonzero()
    offsets_n1 = np.concatenate([[0], np.bincount(images_m, minlength=N).cumsum()])
    cuts = np.linspace(0, len(latents_m), parts + 1).astype(int)
    values_m = z_nd[images_m, latents_m]
    cut = [slice(a, b) for a, b in pairwise(cuts)]
    found = [(latents_m[one].astype(np.int32), values_m[one]) for one in cut]
    return z_nd, TrainCodes(offsets_n1, found, D)


def scaled(x_nd: np.ndarray) -> np.ndarray:
    centred = x_nd.astype(np.float64) - x_nd.astype(np.float64).mean(axis=0)
    return centred / np.sqrt((centred**2).mean())


def test_rows_of_a_probe(how: str) -> None:
    z_nd, codes = made()
    rows = codes.rows(Y, CPU)
    assert codes.large == (how == "streamed")
    assert (rows.n, rows.y_n.tolist()) == (N, Y.tolist())
    W_dc = torch.randn(D, C)
    found = torch.cat([block.times(W_dc) for block in rows.blocks()])
    np.testing.assert_allclose(found, scaled(z_nd) @ W_dc.double().numpy(), atol=1e-5)


def test_a_few_latents(how: str, tmp_path: Path) -> None:
    z_nd, codes = made()
    some = torch.tensor([1, 4, 7, 11])
    few = codes.only(some, tmp_path)
    assert list(tmp_path.iterdir()) == []  # they have no names
    np.testing.assert_array_equal(
        few.looked(torch.ones(N, dtype=torch.bool)).dense(), z_nd[:, some]
    )
    W_kc = torch.randn(4, C)
    found = torch.cat([block.times(W_kc) for block in few.rows(Y, CPU).blocks()])
    np.testing.assert_allclose(found, scaled(z_nd[:, some]) @ W_kc.double().numpy(), atol=1e-5)


def test_dense_columns_stand_in_the_order_given(how: str) -> None:
    z_nd, codes = made()
    for some in ([7], [9, 2, 0]):
        rows = codes.columns(torch.tensor(some), Y, CPU)
        found = torch.cat([block.times(torch.eye(len(some))) for block in rows.blocks()])
        np.testing.assert_allclose(found, scaled(z_nd[:, some]), atol=1e-5)
        assert rows.y_n.tolist() == Y.tolist()


def test_a_latent_that_no_image_has(how: str) -> None:
    _, codes = made()
    wide = TrainCodes(codes.offsets_n1, codes.parts, D + 2)
    few = wide.only(torch.tensor([D, D + 1]))
    assert few.offsets_n1.tolist() == [0] * (N + 1)
    assert not few.looked(torch.ones(N, dtype=torch.bool)).dense().any()


def test_the_images_that_are_looked_at_together(monkeypatch: pytest.MonkeyPatch) -> None:
    z_nd, codes = made()
    keep_n = torch.arange(N) % 5 != 4
    assert codes.n_looked == N
    np.testing.assert_array_equal(codes.looked(keep_n).dense(), z_nd[keep_n.numpy()])
    monkeypatch.setattr(train_codes, "LOOKED", int(codes.offsets_n1[23]))
    assert codes.n_looked == 23
    first = keep_n.numpy() & (np.arange(N) < 23)
    np.testing.assert_array_equal(codes.looked(keep_n).dense(), z_nd[first])
    monkeypatch.setattr(train_codes, "LOOKED", 1)  # fewer than the second image has
    assert codes.n_looked == 1
