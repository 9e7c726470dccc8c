"""SAEs on the decoder of another, and decoding through SAEs that normalise rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import saebench
from saebench.codes import Codes
from saebench.errors import Mismatch, UsageError
from saebench.images import Images, View
from saebench.inputs import LayerNorm, Length, RowNorm, Scaling
from saebench.loading import check_widths, stacked
from saebench.meta import MetaSae
from saebench.saes import Sae
from saebench.specs import SaeSpec, WeightsSpec
from tests.small import activations, add_sae, random_sae, setting
from tests.test_saes import make, numbers

D, S = 8, 24
X = 2 * numbers(40, D, seed=3) + 1


def above(**scaling: object) -> Sae:
    """An SAE of 12 latents that reads rows of 8, with a bias and a scaling that have to count."""
    sae = random_sae(7, k=3, d=D, s=12)
    return replace(sae, scaling=Scaling(**scaling), b_dec_d=numbers(D, seed=8), b_pre_d=None)  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [None, LayerNorm(), Length()])
@pytest.mark.parametrize("name", ["topk, signed", "relu"])
def test_it_is_the_sae_below_with_the_decoder_that_the_one_above_leaves(
    name: str, rows: RowNorm | None
) -> None:
    below = make(name, pre_bias=True, scale=0.5, mean_d=numbers(D, seed=8))
    below = replace(below, scaling=replace(below.scaling, rows=rows))
    meta = MetaSae(below, above(mean_d=numbers(D, seed=9), scale=1.5))
    rebuilt = meta.above.decode(meta.above.encode(below.W_dec_sd))
    expected = replace(below, W_dec_sd=rebuilt)
    codes = meta.encode(X)
    torch.testing.assert_close(
        meta.decode(codes), expected.decode(expected.encode(X)), rtol=1e-4, atol=1e-4
    )
    z_ns = below.encode(X).dense().double()
    m_sq = meta.above.encode(below.W_dec_sd).dense().double()
    np.testing.assert_allclose(codes.dense(), z_ns @ m_sq, atol=1e-4)
    np.testing.assert_allclose(
        meta.decoder_norms_s, meta.above.W_dec_sd.double().norm(dim=1) / 1.5 / 0.5, rtol=1e-6
    )


def test_tiles_and_single_rows_change_nothing() -> None:
    meta = MetaSae(make("topk", pre_bias=True), above())
    whole = meta.encode(X)
    for other in (
        meta.encode(X, tile_bytes=4 * S * 5),
        Codes.cat([meta.encode(row_d[None]) for row_d in X]),
    ):
        torch.testing.assert_close(other.dense(), whole.dense())
        torch.testing.assert_close(meta.decode(other), meta.decode(whole))
    assert meta.encode(X[:0]).n_rows == 0


def test_codes_without_their_frame_are_not_decoded() -> None:
    meta = MetaSae(make("topk", pre_bias=True), above())
    codes = meta.encode(X)
    again = Codes.from_dense(codes.dense(), frame=codes.frame)
    torch.testing.assert_close(meta.decode(again), meta.decode(codes))
    with pytest.raises(UsageError, match="what their rows were normalised by"):
        meta.decode(Codes.from_dense(codes.dense()))


def test_an_sae_that_normalises_rows_cannot_sit_on_a_decoder() -> None:
    with pytest.raises(Mismatch, match="normalises its rows"):
        MetaSae(make("relu"), above(rows=LayerNorm()))


def link(name: str, site: str) -> SaeSpec:
    return SaeSpec(name=name, path=f"{name}.toml", backbone="b", site=site, weights=WeightsSpec())


def test_a_chain_is_stacked_from_the_backbone_up() -> None:
    saes = {"a": make("topk"), "m": above(), "c": random_sae(1, d=12, s=20)}
    chain = (link("c", "sae:m/codes"), link("m", "sae:a/decoder"), link("a", "blocks.1"))
    check_widths(chain, saes, D, "blocks.1")
    below, top = stacked(chain, saes)
    assert isinstance(below, MetaSae)
    assert top is saes["c"]
    again = (link("n", "sae:m/decoder"), *chain[1:])
    with pytest.raises(Mismatch, match="reads the decoder of an SAE that reads a decoder"):
        stacked(again, {**saes, "n": above()})
    with pytest.raises(Mismatch, match=r"'c'.* reads 12 dimensions, and the site 'sae:a/decoder'"):
        check_widths((link("c", "sae:a/decoder"), chain[2]), saes, D, "blocks.1")


def test_an_sae_on_codes_is_decoded_through_row_norms() -> None:
    below = replace(make("topk", pre_bias=True), scaling=Scaling(rows=LayerNorm()))
    view = View(_no_images(), "site", {"patches": slice(0, 5)}, X.unflatten(0, (8, 5)))
    above_view = view.above(below, "sae:a/codes", 2**20)
    root, x_btd = above_view.to_backbone(above_view.x_btd)
    assert root is view
    expected = below.decode(below.encode(X))
    torch.testing.assert_close(x_btd.flatten(0, 1), expected)
    with pytest.raises(UsageError, match="what their rows were normalised by"):
        below.decode(Codes.from_dense(above_view.x_nd))


def _no_images() -> Images:
    class Spec:
        name = "b"

    class Backbone:
        spec = Spec()

    return Images(Backbone(), "d", ["0"], np.zeros(1), {}, 0, {})  # type: ignore[arg-type]


# --- in a run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pd.DataFrame]:
    root = setting(tmp_path_factory.mktemp("meta"))
    add_sae(root, "directions", random_sae(5, k=3, s=24), site="sae:small/a/decoder")
    rows = saebench.run(
        backbone="small",
        sae=["small/a", "small/directions"],
        task=["reconstruction", "sparsity"],
        registry=[root],
        out=root / "results",
        limit=64,
    )
    return root, rows


def value(rows: pd.DataFrame, sae: str, metric: str) -> float:
    picked = rows[(rows["sae"] == sae) & (rows["metric"] == metric) & (rows["group"] == "all")]
    return float(picked[picked["variant"] == ""]["value"].iloc[0])


def test_rows_of_an_sae_on_a_decoder(measured: tuple[Path, pd.DataFrame]) -> None:
    root, rows = measured
    x = activations(root, "shapes", "test", 64).reshape(-1, 16)
    x_nd = torch.from_numpy(x).float()
    below, meta = random_sae(0), random_sae(5, k=3, s=24)
    rebuilt = replace(below, W_dec_sd=meta.decode(meta.encode(below.W_dec_sd)))
    recon = rebuilt.decode(rebuilt.encode(x_nd)).double().numpy()
    expected = ((x - recon) ** 2).sum() / ((x - x.mean(axis=0)) ** 2).sum()
    assert value(rows, "small/directions", "fvu") == pytest.approx(expected, rel=1e-3)
    z = below.encode(x_nd).dense().double() @ meta.encode(below.W_dec_sd).dense().double()
    l0 = float((z != 0).sum(dim=1).double().mean())
    assert value(rows, "small/directions", "l0") == pytest.approx(l0, rel=1e-3)
    assert set(rows[rows["sae"] == "small/directions"]["depth"]) == {2}


def test_its_size_is_that_of_the_sae_above() -> None:
    meta = MetaSae(random_sae(0), random_sae(5, k=3, s=24))
    assert (meta.d_model, meta.d_sae, meta.architecture) == (16, 24, "topk")
    assert meta.n_bytes > meta.below.n_bytes + meta.above.n_bytes


def test_check_says_how_well_the_directions_are_reconstructed(
    measured: tuple[Path, pd.DataFrame],
) -> None:
    from saebench.registry import Registry
    from saebench.testing.sae import check_sae

    root, _ = measured
    checks = {c.name: c for c in check_sae(Registry.load([root]), "small/directions")}
    below, meta = random_sae(0), random_sae(5, k=3, s=24)
    W = below.W_dec_sd.double().numpy()
    left = W - meta.decode(meta.encode(below.W_dec_sd)).double().numpy()
    fvu = (left**2).sum() / ((W - W.mean(axis=0)) ** 2).sum()
    found = checks["it reconstructs the directions below"]
    assert f"fvu {fvu:.{3 if fvu >= 1 else 4}{'g' if fvu >= 1 else 'f'}}" in found.detail
    assert found.passed == (fvu < 1)
