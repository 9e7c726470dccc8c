"""What a probe reads of an image, against dense NumPy on every layout of tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.codes import Codes
from saebench.controls import Identity, Zero
from saebench.errors import UsageError
from saebench.probe_features import Feature, feature_of
from saebench.probing import features as module
from saebench.probing.features import clean_features, pooled_codes, reconstructed_features
from tests.measure import LocalBatch

B, D, S = 5, 6, 9
LAYOUTS: dict[str, dict[str, slice]] = {
    "vit": {"cls": slice(0, 1), "patches": slice(1, 8)},
    "registers": {"cls": slice(0, 1), "registers": slice(1, 4), "patches": slice(4, 9)},
    "grid": {"grid": slice(0, 6)},
    "pooled": {"pooled": slice(0, 1)},
    "registers only": {"registers": slice(0, 3)},
    "patches only": {"patches": slice(0, 5)},
    "cls only": {"cls": slice(0, 1)},
    "cls and registers": {"cls": slice(0, 1), "registers": slice(1, 4)},
    "registers and patches": {"registers": slice(0, 2), "patches": slice(2, 7)},
}
# layout, option's value -> name, the tokens of each part, written out
CASES: list[tuple[str, str, str, list[list[int]]]] = [
    ("vit", "auto", "cls", [[0]]),
    ("vit", "cls", "cls", [[0]]),
    ("vit", "mean", "mean", [[1, 2, 3, 4, 5, 6, 7]]),
    ("vit", "cls+mean", "cls+mean", [[0], [1, 2, 3, 4, 5, 6, 7]]),
    ("registers", "auto", "cls", [[0]]),
    ("registers", "mean", "mean", [[4, 5, 6, 7, 8]]),
    ("registers", "cls+mean", "cls+mean", [[0], [4, 5, 6, 7, 8]]),
    ("grid", "auto", "mean", [[0, 1, 2, 3, 4, 5]]),
    ("grid", "mean", "mean", [[0, 1, 2, 3, 4, 5]]),
    ("pooled", "auto", "pooled", [[0]]),
    ("pooled", "mean", "mean", [[0]]),
    ("registers only", "auto", "mean", [[0, 1, 2]]),
    ("patches only", "auto", "mean", [[0, 1, 2, 3, 4]]),
    ("cls only", "auto", "cls", [[0]]),
    ("cls and registers", "auto", "cls", [[0]]),
    ("registers and patches", "auto", "mean", [[2, 3, 4, 5, 6]]),
]
REFUSED = [
    ("grid", "cls", "cls"),
    ("grid", "cls+mean", "cls"),
    ("pooled", "cls", "cls"),
    ("pooled", "cls+mean", "cls"),
    ("patches only", "cls", "cls"),
    ("registers only", "cls+mean", "cls"),
    ("cls only", "mean", "patches or grid"),
    ("cls only", "cls+mean", "patches or grid"),
    ("cls and registers", "mean", "patches or grid"),
]


@dataclass(frozen=True)
class Given(Zero):
    """A coder whose codes of the rows are given."""

    z_ns: Tensor | None = None

    def encode(self, x_nd: Tensor, *, tile_bytes: int = 0) -> Codes:
        assert self.z_ns is not None
        return Codes.from_dense(self.z_ns)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sparse(t: int, *, seed: int = 1) -> Tensor:
    """[b t s]: about half is silent; latent 0 on no token, 1 on all, 2 negative on all."""
    z_bts = drawn(B, t, S, seed=seed) * (drawn(B, t, S, seed=seed + 1) > 0)
    z_bts[..., 0] = 0
    z_bts[..., 1] = drawn(B, t, seed=3).abs() + 0.1
    z_bts[..., 2] = -drawn(B, t, seed=4).abs() - 0.1
    z_bts[1] = 0  # an image without any code
    z_bts[2, :, 3] = -0.5  # silent on one token, below 0 elsewhere
    z_bts[2, -1, 3] = 0
    return z_bts


def batch_of(kinds: Mapping[str, slice], **more: Any) -> LocalBatch:
    t = max(part.stop for part in kinds.values())
    z_bts = more.pop("z_bts", sparse(t))
    x_btd = more.pop("x_btd", drawn(B, t, D) + 0.5)
    coder = Given(D, d_sae=S, z_ns=z_bts.flatten(0, 1))
    labels = np.zeros(len(x_btd), dtype=np.int64)
    ids = [str(i) for i in range(len(x_btd))]
    return LocalBatch(ids, 0, kinds, more.pop("coder", coder), x_btd, labels, **more)


def pooled(z_bts: Tensor, parts: list[list[int]], pooling: str) -> np.ndarray:
    """[b parts·s] float64, every entry by itself."""
    z = z_bts.double().numpy()
    found = np.zeros((len(z), len(parts), z.shape[2]))
    for image, part, latent in np.ndindex(found.shape):
        values = [z[image, token, latent] for token in parts[part]]
        found[image, part, latent] = max(values) if pooling != "mean" else np.mean(values)
    return found.reshape(len(z), -1)


def as_list(parts: tuple[slice, ...]) -> list[list[int]]:
    return [list(range(part.start, part.stop)) for part in parts]


@pytest.mark.parametrize(("layout", "chosen", "name", "parts"), CASES)
def test_features_of_every_layout(
    layout: str, chosen: str, name: str, parts: list[list[int]]
) -> None:
    batch = batch_of(LAYOUTS[layout])
    feature = feature_of(chosen, batch.kinds, "it")
    assert (feature.name, as_list(feature.parts)) == (name, parts)
    assert as_list(feature.code_parts) == parts
    x = batch.x_btd.double().numpy()
    expected = np.concatenate([x[:, tokens].mean(1) for tokens in parts], axis=1)
    found = clean_features(cast("Any", batch), feature)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected, rtol=2e-7, atol=1e-8)
    if all(len(tokens) == 1 for tokens in parts):
        assert np.array_equal(found.numpy(), expected.astype(np.float32))  # as it is
    several = any(len(tokens) > 1 for tokens in parts)
    assert feature.poolings == (("max", "mean") if several else ("none",))
    for pooling in feature.poolings:
        codes = pooled_codes(cast("Any", batch), feature, pooling)
        expected = pooled(sparse(batch.x_btd.shape[1]), parts, pooling)
        assert codes.dense().shape == (B, len(parts) * S) == (codes.n_rows, codes.d_sae)
        assert codes.values_m.dtype == torch.float32
        np.testing.assert_allclose(codes.dense().numpy(), expected, rtol=2e-7, atol=1e-8)
        assert codes.n_nonzero == np.count_nonzero(codes.dense())
        if pooling != "mean":
            assert np.array_equal(codes.dense().numpy(), expected.astype(np.float32))
        for i in range(B):  # latents of a row ascend, each once
            assert (codes[i : i + 1].indices_m.diff() > 0).all()


@pytest.mark.parametrize(("layout", "chosen", "missing"), REFUSED)
def test_tokens_that_are_not_covered_are_refused(layout: str, chosen: str, missing: str) -> None:
    with pytest.raises(UsageError, match=f"reads {missing}, and the SAE covers") as caught:
        feature_of(chosen, LAYOUTS[layout], "the SAE")
    assert "auto, cls, mean, cls+mean, pooled, embedding" in caught.value.hint


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_embedding_is_that_of_the_pass_and_its_codes_are_the_usual(layout: str) -> None:
    def rest(x_btd: Tensor) -> Output:
        return Output(x_btd.double().sum(dim=1).tanh(), None)

    batch = batch_of(LAYOUTS[layout], rest=rest)
    feature = feature_of("embedding", batch.kinds, "it")
    usual = feature_of("auto", batch.kinds, "it")
    assert feature == Feature("embedding", (), usual.parts)
    x_btd = batch.x_btd.double()
    clean = clean_features(cast("Any", batch), feature)
    assert clean.dtype == torch.float32
    assert torch.equal(clean, x_btd.sum(dim=1).tanh().float())
    zero = reconstructed_features(cast("Any", batch), feature)  # the coder decodes to 0
    assert torch.equal(zero, torch.zeros_like(clean))
    for pooling in feature.poolings:
        ours = pooled_codes(cast("Any", batch), feature, pooling)
        theirs = pooled_codes(cast("Any", batch), usual, pooling)
        assert torch.equal(ours.dense(), theirs.dense())


def test_identity_gives_the_same_bits_however_x_lies_in_memory() -> None:
    many = 64
    base_btd = drawn(many, 10, 40, seed=5) * torch.exp(4 * drawn(many, 10, 40, seed=6))
    for x_btd in (
        base_btd,
        base_btd[:, 1:],  # tokens of a longer sequence
        base_btd.transpose(1, 2).contiguous().transpose(1, 2),  # a map: channels first
    ):
        kinds = {"patches": slice(0, x_btd.shape[1])}
        batch = batch_of(kinds, x_btd=x_btd, coder=Identity(40))
        assert torch.equal(batch.recon_btd, x_btd)
        feature = feature_of("auto", kinds, "it")
        clean = clean_features(cast("Any", batch), feature)
        assert torch.equal(reconstructed_features(cast("Any", batch), feature), clean)


def test_clean_features_are_made_once_for_all_who_see_the_same() -> None:
    batch = batch_of(LAYOUTS["vit"])
    whole, cls = (feature_of(name, batch.kinds, "it") for name in ("cls+mean", "cls"))
    first = clean_features(cast("Any", batch), whole)
    assert clean_features(cast("Any", batch), whole) is first
    assert clean_features(cast("Any", batch), cls).shape == (B, D)


def codes_of(z_bts: Tensor, pooling: str, kinds: Mapping[str, slice] | None = None) -> Codes:
    kinds = kinds or {"patches": slice(0, z_bts.shape[1])}
    b, t, s = z_bts.shape
    coder = Given(D, d_sae=s, z_ns=z_bts.flatten(0, 1))
    batch = batch_of(kinds, x_btd=drawn(b, t, D), coder=coder, z_bts=z_bts)
    return pooled_codes(cast("Any", batch), feature_of("auto", kinds, "it"), cast("Any", pooling))


def test_silence_on_a_token_counts_as_zero() -> None:
    z_bts = torch.tensor([[[-1.0, -1.0, 2.0, 1.0, 0.0], [-3.0, 0.0, 0.0, -1.0, 0.0]]])
    assert codes_of(z_bts, "max").dense().tolist() == [[-1.0, 0.0, 2.0, 1.0, 0.0]]
    assert codes_of(z_bts, "mean").dense().tolist() == [[-2.0, -0.5, 1.0, 0.0, 0.0]]
    # What cancels, or is below what a silent token has, is not stored.
    assert codes_of(z_bts, "max").indices_m.tolist() == [0, 2, 3]
    assert codes_of(z_bts, "mean").indices_m.tolist() == [0, 1, 2]


@pytest.mark.parametrize("pooling", ["max", "mean"])
@pytest.mark.parametrize("layout", ["vit", "grid"])
def test_codes_without_any_value(layout: str, pooling: str) -> None:
    kinds = LAYOUTS[layout]
    t = max(part.stop for part in kinds.values())
    empty = codes_of(torch.zeros(B, t, S), pooling, kinds)
    assert empty.offsets_n1.tolist() == [0] * (B + 1)
    assert (empty.d_sae, empty.n_nonzero) == (S, 0)
    batch = batch_of(kinds, coder=Zero(D))
    for chosen in ("auto", "cls+mean") if layout == "vit" else ("auto",):
        feature = feature_of(chosen, kinds, "it")
        none = pooled_codes(cast("Any", batch), feature, cast("Any", pooling))
        assert (none.n_rows, none.d_sae, none.n_nonzero) == (B, 0, 0)
        assert none.dense().shape == (B, 0)


@pytest.mark.parametrize("pooling", ["max", "mean"])
def test_tiles_and_batches_change_no_bit(monkeypatch: pytest.MonkeyPatch, pooling: str) -> None:
    z_bts = sparse(8)
    kinds = LAYOUTS["vit"] | {}
    whole = codes_of(z_bts, pooling, {"patches": slice(0, 8)}).dense()
    alone = [codes_of(z_bts[i : i + 1], pooling).dense() for i in range(B)]
    assert torch.equal(torch.cat(alone), whole)
    batch = batch_of(kinds)
    feature = feature_of("cls+mean", kinds, "it")
    both = pooled_codes(cast("Any", batch), feature, cast("Any", pooling)).dense()
    for cells in (1, 2 * S, 3 * S + 1):
        monkeypatch.setattr(module, "CELLS", cells)
        assert torch.equal(codes_of(z_bts, pooling).dense(), whole)
        tiled = pooled_codes(cast("Any", batch), feature, cast("Any", pooling)).dense()
        assert torch.equal(tiled, both)


def test_sums_of_a_gpu_are_those_of_numpy() -> None:
    """The way that keeps their order, on whatever device is here."""
    generator = torch.Generator().manual_seed(0)
    cell_m = torch.randint(0, 50, (400,), generator=generator)
    value_m = drawn(400, seed=8)
    expected = np.bincount(cell_m.numpy(), value_m.double().numpy(), minlength=60)
    np.testing.assert_allclose(module._ordered_sums(cell_m, value_m, 60).numpy(), expected)
    assert module._ordered_sums(cell_m[:0], value_m[:0], 3).tolist() == [0, 0, 0]
