"""What is collected of train images for probes: plain arrays, and a run that is disturbed."""

from __future__ import annotations

import errno
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL.Image import Image
from torch import Tensor

from saebench import atomic, evaluation
from saebench.api import config_of, source_of
from saebench.backbones import Backbone, load_backbone
from saebench.codes import Codes
from saebench.controls import Identity, Pca
from saebench.data.shapes import Shapes
from saebench.entries import read_manifest
from saebench.errors import DataError, ImageError, WriteError
from saebench.fit import Fitter
from saebench.loading import Loaded, load_coders
from saebench.plan import make_plan
from saebench.probe_features import Pooling, feature_of
from saebench.probing import chunks, features, tables
from saebench.probing.collect import Asked, Collected, Collector
from saebench.probing.sample import Sample, sample_of
from saebench.registry import Registry
from saebench.saes import Sae
from saebench.store import Store
from saebench.tiles import Tiles
from saebench.units import Source, Unit, backbone_identity
from tests.small import LATENTS, WIDTH, activations, add_sae, random_sae, setting

N = 56  # images: three chunks and a half
CHUNK, SEGMENT, BATCH = 16, 8, 4


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = setting(tmp_path_factory.mktemp("content"))
    add_sae(root, "coder", replace(random_sae(7), transcoder=True))
    add_sae(root, "dead", replace(random_sae(8, k=None), b_enc_s=torch.full((LATENTS,), -1e6)))
    return root


@pytest.fixture(scope="module")
def registry(root: Path) -> Registry:
    return Registry.load([root])


@pytest.fixture(scope="module")
def backbone(registry: Registry) -> Backbone:
    return load_backbone(registry.buildable("small"), device="cpu")


@pytest.fixture(scope="module")
def source(registry: Registry) -> Source:
    return source_of(registry.dataset("shapes"), config_of(train_limit=N))


@pytest.fixture(scope="module")
def x_ntd(root: Path) -> np.ndarray:
    return activations(root, "shapes", "train", N)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (evaluation, chunks):
        monkeypatch.setattr(module, "SEGMENT", SEGMENT)
    monkeypatch.setattr(chunks, "CHUNK", CHUNK)
    monkeypatch.setattr(atomic, "_flush", lambda path: None)  # which guards from power cuts alone


@dataclass
class Case:
    """A store, and units on the small backbone."""

    root: Path
    registry: Registry
    backbone: Backbone
    source: Source
    fitted: Store  # what controls are made from
    store: Store
    seen: int = 0
    batch: int = BATCH

    def units(self, *names: str, **options: Any) -> list[Unit]:
        config = config_of(
            backbone="small", sae=names, task="rows", train_limit=N, registry=self.root, **options
        )
        plan = make_plan(config, self.registry, lambda spec, config: self.source)
        by_name = {u.coder.name: u for u in plan.units if u.coder.tokens == "all"}
        by_name = {u.coder.name: u for u in plan.units} | by_name
        return [by_name[name] for name in names]

    def loaded(self, units: Sequence[Unit]) -> Loaded:
        assert self.source.dataset is not None
        fitter = Fitter(
            self.backbone,
            self.source.dataset,
            self.source,
            self.fitted,
            lambda *sites: backbone_identity(self.backbone.spec, *sites),
            "float32",
            Tiles(2**22, 64),
        )
        refs = [unit.coder for unit in units]
        parts = {"backbone": self.backbone, "registry": self.registry, "fitter": fitter}
        return load_coders(refs, seed=0, **parts)

    def add(self, split: str, row: int, why: str) -> None:
        raise AssertionError(f"{split}, row {row}: {why}")

    def sample(self, n: int = N) -> Sample:
        assert self.source.dataset is not None
        return sample_of(self.source.dataset.manifest("train"), n=n)

    def collector(self, **more: Any) -> Collector:
        def count(n: int) -> None:
            self.seen += n

        assert self.source.dataset is not None
        parts = (self.backbone, self.source.dataset, self.source, self.store, "float32")
        return Collector(*parts, Tiles(2**22, self.batch), on_images=count, **more)

    def asked(self, units: Sequence[Unit], feature: str = "auto") -> list[Asked]:
        found = []
        for unit in units:
            layout = self.backbone.spec.sites["blocks.1"].kinds
            kinds = layout if unit.coder.tokens == "all" else {"cls": slice(0, 1)}
            found.append(Asked(unit, feature_of(feature, kinds, unit.coder.name)))
        return found

    def collect(
        self, *names: str, feature: str = "auto", n: int = N, **more: Any
    ) -> tuple[list[Asked], Collected]:
        units = self.units(*names)
        asked = self.asked(units, feature)
        loaded = self.loaded(units)
        return asked, self.collector(**more).collect(asked, self.sample(n), loaded)


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(tmp_path_factory.mktemp("fitted"))


@pytest.fixture
def case(
    root: Path,
    registry: Registry,
    backbone: Backbone,
    source: Source,
    fitted: Store,
    tmp_path: Path,
) -> Case:
    return Case(root, registry, backbone, source, fitted, Store(tmp_path / "store"))


def plain(sae: Sae, x_ntd: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [n t s] and reconstructions [n t d] of a TopK SAE, float64."""
    tensors = (sae.W_enc_ds, sae.b_enc_s, sae.W_dec_sd, sae.b_dec_d)
    W_ds, b_s, W_sd, b_d = (tensor.double().numpy() for tensor in tensors)
    pre = (x_ntd.astype(np.float64) - b_d) @ W_ds + b_s
    least = np.sort(pre, axis=-1)[..., -(sae.k or 0)][..., None]
    z = np.where(pre >= least, np.maximum(pre, 0), 0)
    return z, z @ W_sd + b_d


def dense(found: Collected, asked: Asked, pooling: Pooling, s: int = LATENTS) -> np.ndarray:
    offsets, latents, values = found.codes(asked, pooling)
    return Codes(s, offsets, latents, values).dense().numpy()


def test_it_is_what_plain_arrays_say(case: Case, x_ntd: np.ndarray) -> None:
    (a, b), found = case.collect("small/a", "small/b", feature="mean")
    assert found.present.tolist() == list(range(N))
    assert (found.left_out, found.errors) == ("", {})
    assert case.seen == N
    for asked, seed, k in ((a, 0, 4), (b, 1, 8)):
        z, recon = plain(random_sae(seed, k=k), x_ntd)
        clean = np.concatenate(found.dense(asked, "x"))
        assert clean.dtype == np.float32
        np.testing.assert_allclose(clean, x_ntd[:, 1:].mean(axis=1), rtol=1e-4, atol=1e-5)
        xhat = np.concatenate(found.dense(asked, "xhat"))
        np.testing.assert_allclose(xhat, recon[:, 1:].mean(axis=1), rtol=1e-4, atol=1e-4)
        pooled: dict[Pooling, np.ndarray] = {"max": z[:, 1:].max(axis=1)}
        pooled["mean"] = z[:, 1:].mean(axis=1)
        for pooling, of in pooled.items():
            np.testing.assert_allclose(dense(found, asked, pooling), of, rtol=1e-3, atol=1e-4)
            offsets, latents, values = found.codes(asked, pooling)
            assert (offsets.dtype, latents.dtype) == (torch.int64, torch.int64)
            assert values.dtype == torch.float32
            assert (values != 0).all()
            assert offsets.shape == (N + 1,)
            assert offsets[-1] == len(values) == len(latents)


@pytest.mark.parametrize("feature", ["cls", "cls+mean", "embedding"])
def test_every_feature(case: Case, x_ntd: np.ndarray, feature: str) -> None:
    (a, same, zero), found = case.collect("small/a", "identity", "zero", feature=feature)
    z, recon = plain(random_sae(0), x_ntd)
    clean = np.concatenate(found.dense(a, "x"))
    if feature == "embedding":
        assert case.source.dataset is not None
        sample, dataset = case.sample(), case.source.dataset
        images = [case.backbone.transform(dataset.image("train", int(i))) for i in sample.rows]
        expected = case.backbone.forward(torch.stack(images)).embedding_bd.numpy()
        assert clean.shape == (N, WIDTH)
        np.testing.assert_allclose(clean, expected, rtol=1e-4, atol=1e-4)
        assert not np.allclose(np.concatenate(found.dense(a, "xhat")), expected, atol=1e-2)
    else:
        parts = [slice(0, 1), slice(1, 17)][: feature.count("+") + 1]
        expected = np.concatenate([x_ntd[:, part].mean(axis=1) for part in parts], axis=1)
        np.testing.assert_allclose(clean, expected, rtol=1e-4, atol=1e-5)
        expected = np.concatenate([recon[:, part].mean(axis=1) for part in parts], axis=1)
        xhat = np.concatenate(found.dense(a, "xhat"))
        np.testing.assert_allclose(xhat, expected, rtol=1e-4, atol=1e-4)
        pooling = a.feature.poolings[0]
        expected = np.concatenate([z[:, part].max(axis=1) for part in parts], axis=1)
        codes = dense(found, a, pooling, LATENTS * len(parts))
        np.testing.assert_allclose(codes, expected, rtol=1e-3, atol=1e-4)
    for x, xhat in zip(found.dense(same, "x"), found.dense(same, "xhat"), strict=True):
        assert np.array_equal(x, xhat)  # to the last bit
    assert found.missing == {a.unit: {}, same.unit: {}, zero.unit: {"codes": "it has no latents"}}


def test_clean_features_are_shared_and_the_backbone_runs_once(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    passed: list[int] = []
    acts = Backbone.acts

    def counted(self: Backbone, images_b3hw: Tensor, sites: Sequence[str]) -> Any:
        passed.append(len(images_b3hw))
        return acts(self, images_b3hw, sites)

    units = case.units("small/a", "small/b", "small/relu", "small/cls")
    loaded, asked = case.loaded(units), case.asked(units)
    monkeypatch.setattr(Backbone, "acts", counted)
    found = case.collector().collect(asked, case.sample(), loaded)
    assert sum(passed) == N
    # x of all tokens and of CLS alone; four reconstructions, four codes of one token.
    kinds = {kind: len(case.store.ids(kind)) for kind in (tables.FEATURES, tables.CODES)}
    assert kinds == {tables.FEATURES: 4 * (2 + 4), tables.CODES: 4 * 4}
    paths = [
        {str(getattr(part, "filename", "")) for part in found.dense(one, "x")} for one in asked
    ]
    assert paths[0] == paths[1] == paths[2] != paths[3]
    again = case.collector().collect(case.asked(case.units("small/b")), case.sample(), loaded)
    assert (sum(passed), case.seen) == (N, N)
    assert again.present.tolist() == list(range(N))


def test_a_new_sae_is_measured_beside_the_clean_features_that_are_there(
    case: Case, tmp_path: Path
) -> None:
    case.collect("small/a")
    (b,), found = case.collect("small/b")
    assert len(case.store.ids(tables.FEATURES)) == 4 * 3
    (other,), alone = replace(case, store=Store(tmp_path / "alone")).collect("small/b")
    for what in ("x", "xhat"):
        ours, theirs = found.dense(b, what), alone.dense(other, what)  # type: ignore[arg-type]
        assert np.array_equal(np.concatenate(ours), np.concatenate(theirs))


def test_more_images_go_on_from_the_chunks_that_are_there(case: Case) -> None:
    case.collect("small/a", n=2 * CHUNK)
    assert case.seen == 2 * CHUNK
    _, found = case.collect("small/a")
    assert case.seen == N
    assert found.present.tolist() == list(range(N))
    _, few = case.collect("small/a", n=CHUNK)
    assert case.seen == N
    assert len(np.concatenate(few.dense(_[0], "x"))) == CHUNK


class Killed(BaseException):
    """As a signal ends a process: nothing of saebench catches it."""


def test_a_killed_run_finds_its_finished_chunks(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    units = case.units("small/a", "small/relu")
    loaded, asked = case.loaded(units), case.asked(units, "mean")
    honest, seen = features.pooled_codes, []

    def dying(batch: Any, *more: Any) -> Codes:
        seen.append(batch.first)
        if batch.first >= 2 * CHUNK + BATCH:
            raise Killed
        return honest(batch, *more)

    with monkeypatch.context() as patch:
        patch.setattr("saebench.probing.jobs.pooled_codes", dying)
        with pytest.raises(Killed):
            case.collector().collect(asked, case.sample(), loaded)
    assert len(case.store.ids(tables.FEATURES)) == 2 * 3
    assert not list(case.store.root.glob("shards/*/.*"))  # what was being written is gone
    case.seen = 0
    found = case.collector().collect(asked, case.sample(), loaded)
    assert case.seen == N - 2 * CHUNK
    whole = replace(case, store=Store(tmp_path / "whole"))
    expected = whole.collector().collect(asked, case.sample(), loaded)
    assert_same(found, expected, asked)


def assert_same(
    found: Collected, expected: Collected | list[np.ndarray], asked: Sequence[Asked]
) -> None:
    """To the last bit."""
    theirs = arrays(expected, asked) if isinstance(expected, Collected) else expected
    for mine, other in zip(arrays(found, asked), theirs, strict=True):
        assert np.array_equal(mine, other)


def arrays(found: Collected, asked: Sequence[Asked]) -> list[np.ndarray]:
    """All of it, in memory."""
    whole = [found.present]
    for one in asked:
        whole += [np.concatenate(found.dense(one, "x")), np.concatenate(found.dense(one, "xhat"))]
        for pooling in one.feature.poolings:
            whole += [tensor.numpy() for tensor in found.codes(one, pooling)]
    return whole


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Rows of the train split that do not decode."""
    rows: set[int] = set()
    honest = Shapes._decode

    def decode(shapes: Shapes, split: str, index: int) -> Image:
        if split == "train" and index in rows:
            raise ImageError(f"image {index} is broken")
        return honest(shapes, split, index)

    monkeypatch.setattr(Shapes, "_decode", decode)
    return rows


def test_images_that_do_not_decode(case: Case, broken: set[int], tmp_path: Path) -> None:
    units = case.units("small/a", bad_images="skip")
    loaded, asked = case.loaded(units), case.asked(units)
    sample = case.sample()
    bad = [3, CHUNK + 1, CHUNK + 2]
    broken |= {int(sample.rows[place]) for place in bad}
    with pytest.raises(ImageError):
        case.collector().collect(asked, sample, loaded)
    told: list[tuple[str, int]] = []
    skip: dict[str, Any] = {
        "bad_images": "skip",
        "on_bad": lambda split, row, why: told.append((split, row)),
    }
    case.seen = 0
    found = case.collector(**skip).collect(asked, sample, loaded)
    assert case.seen == N - 3
    assert told == [("train", int(sample.rows[place])) for place in bad]
    assert found.present.tolist() == [place for place in range(N) if place not in bad]
    assert found.left_out
    # Only a pass tells which images still do not decode: chunks 0 and 1 are seen again.
    again = case.collector(**skip).collect(asked, sample, loaded)
    assert case.seen == N - 3 + 2 * CHUNK - 3
    assert again.left_out == found.left_out
    assert_same(again, found, asked)
    broken.clear()
    mended = case.collector(**skip).collect(asked, sample, loaded)
    assert (mended.left_out, len(mended.present)) == ("", N)
    x = np.concatenate(mended.dense(asked[0], "x"))
    assert np.array_equal(x[found.present], np.concatenate(found.dense(asked[0], "x")))
    # Nothing of a sound run is lost by one image that breaks later: all tables of its chunk
    # are made anew, those that were there too.
    broken.add(int(sample.rows[0]))
    units = case.units("small/b", bad_images="skip")
    asked_b = case.asked(units)
    both = case.collector(**skip).collect(
        [*asked, *asked_b], sample, case.loaded([*units, *[a.unit for a in asked]])
    )
    for one in (*asked, *asked_b):
        assert len(np.concatenate(both.dense(one, "x"))) == N - 1
        assert np.array_equal(np.concatenate(both.dense(one, "x")), x[1:])
        assert len(np.concatenate(both.dense(one, "xhat"))) == N - 1
    broken |= set(map(int, sample.rows))
    case.store = Store(tmp_path / "none")
    with pytest.raises(DataError, match="none of the 56 images"):
        case.collector(**skip).collect(asked, sample, loaded)


def test_two_waves_agree_on_what_was_left_out(case: Case, broken: set[int]) -> None:
    collector = case.collector(bad_images="skip")
    units = case.units("small/a", "small/b", bad_images="skip")
    a, b = case.asked(units)
    loaded = case.loaded(units)
    broken.add(int(case.sample().rows[5]))
    first = collector.collect([a], case.sample(), loaded)
    case.seen = 0
    second = collector.collect([b], case.sample(), loaded)
    assert case.seen == N - 1
    assert len(case.store.ids(tables.FEATURES)) == 4 * 3  # of x the same tables
    assert first.left_out == second.left_out


def test_an_error_of_one_sae_is_its_own(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    units = case.units("small/a", "small/relu")
    loaded = case.loaded(units)
    good, bad = case.asked(units)
    honest, calls = Sae.encode, []

    def encode(sae: Sae, x_nd: Tensor, **more: Any) -> Codes:
        if sae.architecture == "relu":
            calls.append(len(x_nd))
            if len(calls) > 5:
                raise RuntimeError("no such kernel")
        return honest(sae, x_nd, **more)

    monkeypatch.setattr(Sae, "encode", encode)
    found = case.collector().collect([bad, good], case.sample(), loaded)
    assert list(found.errors) == [bad.unit]
    assert "no such kernel" in str(found.errors[bad.unit])
    assert len(calls) == 6
    assert len(np.concatenate(found.dense(good, "xhat"))) == N
    assert bad.unit not in found.missing
    alone = case.collector().collect([bad], case.sample(), loaded)
    assert list(alone.errors) == [bad.unit]
    assert not len(alone.present)


def test_what_an_sae_does_not_have(case: Case, root: Path) -> None:
    (coder, meta, dead), found = case.collect(
        "small/coder", "small/meta", "small/dead", feature="mean"
    )
    assert "transcoder" in found.missing[coder.unit]["xhat"]
    assert dense(found, coder, "max").shape == (N, LATENTS)
    # x of an SAE on an SAE are the codes of the one below.
    (a,), below = case.collect("small/a", feature="mean")
    clean = np.concatenate(found.dense(meta, "x"))
    np.testing.assert_allclose(clean, dense(below, a, "mean"), rtol=1e-5, atol=1e-6)
    for pooling in ("max", "mean"):
        offsets, latents, _ = found.codes(dead, pooling)
        assert offsets.tolist() == [0] * (N + 1)
        assert not len(latents)
    seen = case.seen
    case.collect("small/coder", "small/meta", "small/dead", feature="mean")
    assert case.seen == seen  # what is missing is not looked for again


def test_memory_that_runs_out(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = case.units("small/a")
    asked, loaded = case.asked(units, "mean"), case.loaded(units)
    honest = Sae.encode

    def encode(sae: Sae, x_nd: Tensor, **more: Any) -> Codes:
        if len(x_nd) > 2 * 17:
            raise torch.OutOfMemoryError("out of memory")
        return honest(sae, x_nd, **more)

    expected = case.collector().collect(asked, case.sample(), loaded)
    case.store, case.seen = Store(tmp_path / "short"), 0
    monkeypatch.setattr(Sae, "encode", encode)
    collector = case.collector()
    found = collector.collect(asked, case.sample(), loaded)
    assert collector.tiles.batch_size == 2
    assert case.seen == N  # what was begun again counts once
    x = np.concatenate(found.dense(asked[0], "x"))
    np.testing.assert_allclose(x, np.concatenate(expected.dense(asked[0], "x")), atol=1e-5)


def same_to_the_bit(found: Collected, asked: Asked) -> list[bool]:
    """Of each chunk, whether x̂ of the identity control is x."""
    parts = zip(found.dense(asked, "x"), found.dense(asked, "xhat"), strict=True)
    return [np.array_equal(x, xhat) for x, xhat in parts]


def test_x_and_its_reconstruction_are_of_the_same_batches(case: Case) -> None:
    case.collect("small/a", feature="mean")  # clean features, which the next could read
    case.batch, case.seen = BATCH - 1, 0
    (one,), found = case.collect("identity", feature="mean")
    assert case.seen == N
    assert found.batch == BATCH - 1
    assert all(same_to_the_bit(found, one))
    case.collect("small/a", "identity", feature="mean")
    assert case.seen == 2 * N  # only what the identity has was there in this size
    case.batch, case.seen = BATCH, 0
    _, found = case.collect("small/a", feature="mean")
    assert (case.seen, found.batch) == (0, BATCH)


def test_no_chunk_is_of_batches_of_two_sizes(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clean features are there, and memory runs out in the second chunk."""
    case.collect("small/a", feature="mean")
    honest, n_encoded = Identity.encode, [0]

    def encode(self: Identity, x_nd: Tensor, **more: Any) -> Codes:
        n_encoded[0] += len(x_nd)
        if n_encoded[0] > CHUNK * 17 and len(x_nd) > 17:
            raise torch.OutOfMemoryError("out of memory")
        return honest(self, x_nd, **more)

    monkeypatch.setattr(Identity, "encode", encode)
    (one,), found = case.collect("identity", feature="mean")
    assert found.batch == (BATCH, *[1] * (-(-N // CHUNK) - 1))
    assert all(same_to_the_bit(found, one))
    clean = [
        manifest["fields"]
        for id in case.store.ids(tables.FEATURES)
        if (manifest := read_manifest(case.store.root / "shards" / tables.FEATURES / id))
        and manifest["fields"]["what"] == "x"
    ]
    later = {fields["images"] for fields in clean if fields["batch"] == 1}
    assert len(later) == -(-N // CHUNK) - 1


def test_a_damaged_table_is_named_and_built_anew(case: Case) -> None:
    units = case.units("small/a")
    asked, loaded = case.asked(units, "mean"), case.loaded(units)
    expected = arrays(case.collector().collect(asked, case.sample(), loaded), asked)
    for kind in (tables.FEATURES, tables.COUNTS, tables.CODES):
        folder = case.store.root / "shards" / kind / case.store.ids(kind)[0]
        (file,) = folder.glob("*.safetensors")
        file.write_bytes(file.read_bytes()[:-1] + b"?")
        case.seen = 0
        with pytest.warns(UserWarning, match="is built anew") as told:
            found = case.collector().collect(asked, case.sample(), loaded)
        assert len(told) == 1
        assert str(folder) in str(told[0].message)
        assert 0 < case.seen <= CHUNK  # of its chunk alone
        assert_same(found, expected, asked)
        assert not case.store.verify()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            case.collector().collect(asked, case.sample(), loaded)


def test_a_disk_that_is_full(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    units = case.units("small/a")
    asked, loaded = case.asked(units, "mean"), case.loaded(units)
    expected = case.collector().collect(asked, case.sample(), loaded)
    case.store, case.seen = Store(tmp_path / "full"), 0
    writes: list[str] = []

    def write(path: Path, data: bytes, **more: Any) -> None:
        writes.append(path.name)
        if len(writes) > 15:
            raise WriteError(f"cannot write {path}: {errno.ENOSPC}")
        path.write_bytes(data)

    monkeypatch.setattr("saebench.shards.write_bytes", write)
    with pytest.warns(UserWarning, match="kept in memory: cannot write") as told:
        found = case.collector().collect(asked, case.sample(), loaded)
    assert len(told) == 1
    assert 0 < len(case.store.ids(tables.FEATURES)) < 8
    assert case.seen == N
    assert_same(found, expected, asked)
    monkeypatch.setattr(tables, "MEMORY_BYTES", 1000)
    case.store = Store(tmp_path / "full too")
    with (
        pytest.warns(UserWarning, match="in memory"),
        pytest.raises(WriteError, match="GiB of memory"),
    ):
        case.collector().collect(asked, case.sample(), loaded)


def test_what_identifies_a_table(case: Case) -> None:
    collector = case.collector()
    a, b, random = case.units("small/a", "small/b", "small/a@random")
    (other,) = case.units("small/a@random", seed=1)
    coders = case.loaded([a, b, random]).coders
    coders[other.coder] = coders[random.coder]  # of the same name
    one, all_of_it = case.sample(CHUNK), case.sample()
    cls, mean = (
        feature_of(f, {"cls": slice(0, 1), "patches": slice(1, 17)}, "") for f in ("cls", "mean")
    )

    def key(unit: Unit, feature: Any = mean, what: Any = "x", sample: Sample = all_of_it) -> str:
        found = collector.key(unit, feature, what, sample, coders[unit.coder])
        return str(sorted(found.items()))

    assert key(a) == key(b) == key(random)
    assert key(a) != key(a, cls)
    assert key(a) != key(a, sample=one)
    usual = key(a)
    collector.tiles.batch_size //= 2
    assert key(a) != usual
    for what in ("xhat", "codes"):
        keys = {key(unit, what=what) for unit in (a, b, random, other)}
        assert len(keys) == 4
        assert not keys & {key(a), key(a, cls, what)}


def test_a_control_is_known_by_what_its_fit_came_to(case: Case) -> None:
    """The same images by name may give another PCA: some that did not decode were mended."""
    (pca,) = case.units("pca-4")
    key = case.collector().key
    feature = case.asked([pca], "mean")[0].feature
    coder = case.loaded([pca]).coders[pca.coder]
    assert isinstance(coder, Pca)
    again = Pca(coder.mean_d.clone(), coder.basis_dk.clone())
    others = [Pca(coder.mean_d + 1e-6, coder.basis_dk), Pca(coder.mean_d, -coder.basis_dk)]
    for what in ("xhat", "codes"):
        of = [str(key(pca, feature, what, case.sample(), one)) for one in (coder, again, *others)]
        assert of[0] == of[1]
        assert len(set(of)) == 3
    clean = [str(key(pca, feature, "x", case.sample(), one)) for one in (coder, *others)]
    assert len(set(clean)) == 1


def test_two_runs_at_once_do_no_harm(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    units = case.units("small/a")
    asked, loaded = case.asked(units, "mean"), case.loaded(units)
    others: list[Collected] = []
    honest = Sae.encode

    def encode(sae: Sae, x_nd: Tensor, **more: Any) -> Codes:
        monkeypatch.setattr(Sae, "encode", honest)  # in the midst of one, all of another
        others.append(case.collector().collect(asked, case.sample(), loaded))
        return honest(sae, x_nd, **more)

    monkeypatch.setattr(Sae, "encode", encode)
    found = case.collector().collect(asked, case.sample(), loaded)
    assert case.seen == N + CHUNK  # the later chunks were there when the first one came to them
    assert_same(found, others[0], asked)
    assert not case.store.verify()


def test_any_rows_of_any_split_can_be_shown(case: Case) -> None:
    assert case.source.dataset is not None
    manifest = case.source.dataset.manifest("val")
    rows = np.array([30, 2, 17, 4, 1, 9, 8, 7, 11, 100])  # a segment and a bit
    parts = (case.backbone, case.source.dataset, case.source)
    how: dict[str, Any] = {"workers": 0, "bad_images": "fail", "bad": case, "split": "val"}
    stream = evaluation.Evaluation(*parts, rows=rows, **how)
    shown = [batch for i in range(2) for batch in stream.batches(i, ["blocks.1"], 4)]
    assert [batch.first for batch in shown] == [0, 4, 8]
    assert [id for batch in shown for id in batch.ids] == [manifest.ids[row] for row in rows]
    labels = np.concatenate([batch.labels for batch in shown])
    assert np.array_equal(labels, manifest.labels[rows])
    levels = np.concatenate([batch.levels["colour"] for batch in shown])
    assert np.array_equal(levels, manifest.levels["colour"][rows])
    whole = evaluation.Evaluation(*parts, **how)
    assert np.array_equal(whole.order, manifest.order())
    with pytest.raises(ValueError, match="evaluation split alone"):
        evaluation.Evaluation(*parts, rows=rows, tokens=case.store, **how)


def test_processes_that_decode_change_nothing(case: Case, tmp_path: Path) -> None:
    units = case.units("small/a")
    asked, loaded = case.asked(units, "mean"), case.loaded(units)
    expected = case.collector().collect(asked, case.sample(), loaded)
    case.store = Store(tmp_path / "again")
    middle = replace(case.sample(), rows=case.sample().rows[CHUNK : 2 * CHUNK])
    middle = replace(middle, ids=case.sample().ids[CHUNK : 2 * CHUNK])
    case.collector().collect(asked, middle, loaded)  # the chunks to come do not lie side by side
    found = case.collector(workers=1).collect(asked, case.sample(), loaded)
    assert case.seen == 2 * N
    assert_same(found, expected, asked)
