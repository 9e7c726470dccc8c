"""The contrastive loss in blocks, beside open_clip's `ClipLoss`; blocks out of batches of any size;
captions of a dataset, embedded and kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from open_clip.loss import ClipLoss
from torch import Tensor
from torch.nn.functional import normalize

from saebench.api import source_of
from saebench.backbones import Backbone, load_backbone
from saebench.data import Dataset, open_dataset
from saebench.errors import DataError
from saebench.fit import Fitter
from saebench.metrics.bootstrap import poisson_weights
from saebench.plan import make_plan
from saebench.readouts import build_readouts
from saebench.registry import Registry
from saebench.retrieval import BLOCK, Block, Blocks, Captions, captions_of
from saebench.runconfig import RunConfig
from saebench.specs import DatasetSpec, FolderForm
from saebench.store import Store
from saebench.tiles import TILE_BYTES, Tiles
from saebench.units import SEGMENT, Source

REGISTRY = Registry.load()
N = 300


def random(n: int, d: int = 24, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


# The loss


@pytest.mark.parametrize("m", [BLOCK, 37, 2])
@pytest.mark.parametrize("scale", [1.0, 14.2857, 100.0])
def test_the_loss_is_open_clips(m: int, scale: float) -> None:
    image_md, text_nd = random(m), normalize(random(m + 9, seed=1), dim=1)
    places = list(range(5, 5 + m))
    loss_m, hit_m = Captions(text_nd, scale).pairs(image_md, places)
    assert (loss_m.dtype, hit_m.dtype, loss_m.shape) == (torch.float64, torch.bool, (m,))
    images, texts = normalize(image_md.double(), dim=1), text_nd[places].double()
    texts = normalize(texts, dim=1)
    expected = float(ClipLoss()(images, texts, scale))
    assert float(loss_m.mean()) == pytest.approx(expected, rel=1e-12)
    nearest = (images.numpy() @ texts.numpy().T).argmax(axis=1)
    assert hit_m.tolist() == (nearest == np.arange(m)).tolist()


def test_each_pairs_loss_by_hand() -> None:
    """Two images, the first at its own caption, the second between both; scale 2."""
    text_nd = torch.eye(2)
    image_md = torch.tensor([[3.0, 0.0], [1.0, 1.0]])
    h = 2 / np.sqrt(2)
    to_captions = [np.log(np.exp(2) + 1) - 2, np.log(2 * np.exp(h)) - h]
    to_images = [np.log(np.exp(2) + np.exp(h)) - 2, np.log(1 + np.exp(h)) - h]
    loss_m, hit_m = Captions(text_nd, 2.0).pairs(image_md, [0, 1])
    expected = [(a + b) / 2 for a, b in zip(to_captions, to_images, strict=True)]
    assert loss_m.tolist() == pytest.approx(expected, rel=1e-14)
    assert hit_m.tolist() == [True, False], "a tie is no hit"


def test_images_that_are_all_alike_cost_ln_m() -> None:
    text_nd = normalize(random(BLOCK), dim=1)
    for image_md in (torch.zeros(BLOCK, 24), text_nd[:1].expand(BLOCK, 24)):
        loss_m, hit_m = Captions(text_nd, 100.0).pairs(image_md, range(BLOCK))
        logits_m = 100.0 * (normalize(image_md[:1].double(), dim=1) @ text_nd.double().T)[0]
        row = float(logits_m.logsumexp(0) - logits_m.mean())
        assert float(loss_m.mean()) == pytest.approx((row + np.log(BLOCK)) / 2, rel=1e-6)
        assert int(hit_m.sum()) == int(image_md.any())


def test_an_equal_caption_is_no_rival() -> None:
    text_nd = normalize(random(4), dim=1)[[0, 1, 0, 3]]
    _, hit_m = Captions(text_nd, 10.0).pairs(text_nd, range(4))
    assert hit_m.tolist() == [True] * 4
    _, hit_m = Captions(text_nd, 10.0).pairs(text_nd[[0, 1, 3, 3]], range(4))
    assert hit_m.tolist() == [True, True, False, True]


# Blocks


def batches(present: Sequence[int], size: int) -> Iterator[tuple[int, list[int]]]:
    """Consecutive places of each batch; batches are cut at segments, as `Evaluation` cuts them."""
    for start in range(0, N, size):
        batch = [place for place in present if start <= place < start + size]
        while batch:
            n = next((i for i in range(1, len(batch)) if batch[i] != batch[i - 1] + 1), len(batch))
            yield batch[0], batch[:n]
            batch = batch[n:]


def gathered(present: Sequence[int], size: int, n_images: int = N) -> tuple[list[Block], Blocks]:
    clean_nd, zero_nd = random(N), random(N, seed=1)
    weights_nr = torch.from_numpy(poisson_weights("own", [str(i) for i in range(N)]))
    blocks, found = Blocks(), []
    for first, places in batches(present, size):
        part = {"clean": clean_nd[places], "zero": zero_nd[places]}
        found += blocks.add(first, part, weights_nr[places])
    return found + blocks.flush(n_images), blocks


ALL = list(range(N))
GONE = [p for p in ALL if p not in (0, 1, 127, 130, 131, 200, 255)]


@pytest.mark.parametrize("size", [1, 7, 64, 128, 200, 300])
@pytest.mark.parametrize("present", [ALL, GONE], ids=["all", "some did not decode"])
def test_blocks_do_not_depend_on_batches(size: int, present: list[int]) -> None:
    found, blocks = gathered(present, size)
    assert blocks.left_out == N - 2 * BLOCK
    captions = Captions(normalize(random(N, seed=2), dim=1), 20.0)
    clean_nd = random(N)
    for number, block in enumerate(found):
        places = [p for p in present if number * BLOCK <= p < (number + 1) * BLOCK]
        assert block.places == places
        assert torch.equal(block.embeddings["clean"], clean_nd[places])
        assert torch.equal(block.embeddings["zero"], random(N, seed=1)[places])
        ids = [str(place) for place in places]
        assert torch.equal(block.weights_mr, torch.from_numpy(poisson_weights("own", ids)))
        loss_m, _ = captions.pairs(block.embeddings["clean"], block.places)
        expected = ClipLoss()(
            normalize(clean_nd[places].double(), dim=1), captions.text_nd[places].double(), 20.0
        )
        assert float(loss_m.mean()) == pytest.approx(float(expected), rel=1e-6)
    assert len(found) == 2


def test_a_block_is_given_out_as_soon_as_it_is_whole() -> None:
    blocks = Blocks()
    x_nd, weights_nr = random(SEGMENT), torch.ones(SEGMENT, 3)
    assert blocks.add(0, {"clean": x_nd[:100]}, weights_nr[:100]) == []
    (one,) = blocks.add(100, {"clean": x_nd[100:128]}, weights_nr[100:128])
    assert one.places == list(range(128))
    assert blocks.add(128, {"clean": x_nd[128:130]}, weights_nr[128:130]) == []
    (two,) = blocks.add(300, {"clean": x_nd[300:310]}, weights_nr[300:310])
    assert two.places == [128, 129], "images of a later block: this one's others did not decode"
    (three,) = blocks.flush(SEGMENT)
    assert three.places == list(range(300, 310))
    assert blocks.flush(SEGMENT) == []
    assert blocks.left_out == 0


@pytest.mark.parametrize(("n_images", "left_out", "n"), [(256, 0, 2), (255, 127, 1), (100, 100, 0)])
def test_a_last_block_that_is_broken_off_is_left_out(n_images: int, left_out: int, n: int) -> None:
    found, blocks = gathered(range(n_images), 50, n_images)
    assert (len(found), blocks.left_out) == (n, left_out)


def test_a_block_lies_in_one_segment() -> None:
    assert SEGMENT % BLOCK == 0


# Captions of a dataset


def said(species: str, number: int) -> str:
    return f"a photo of a {species}." if number % 3 else f"a drawing of a {species}, long " * 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """150 drawn shapes in a folder, and a table with captions; every third one is far too long."""
    root = tmp_path_factory.mktemp("captions")
    shapes = open_dataset(REGISTRY.dataset("shapes"))
    lines = ["file,label,caption"]
    for number in range(150):
        species = shapes.class_names[shapes.manifest("test").labels[number]]
        shapes.image("test", number).save(root / f"{number:03d}.png")
        lines.append(f'{number:03d}.png,{species},"{said(species, number)}"')
    (root / "labels.csv").write_text("\n".join(lines))
    return root


def spec_of(folder: Path, **form: Any) -> DatasetSpec:
    form = {"caption": "caption", **form}
    table = FolderForm(root=str(folder), labels="labels.csv", **form)
    return DatasetSpec(name="said", source="images", folder=table, holdout=0.9)


@cache
def tiny(dtype: torch.dtype = torch.float32) -> Backbone:
    return load_backbone(REGISTRY.buildable("tiny-clip"), dtype=dtype)


def opened(folder: Path, limit: int | None = None) -> tuple[Dataset, Source]:
    source = source_of(spec_of(folder), RunConfig(limit=limit))
    assert source.dataset is not None
    return source.dataset, source


def test_captions_are_embedded_in_the_order_of_the_evaluation(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By open_clip alone, which cuts long ones off at its 24 tokens; from the store afterwards."""
    store = Store(tmp_path)
    data, source = opened(folder)
    captions = captions_of(tiny(), data, source, store)
    assert (source.n_images, captions.text_nd.shape) == (135, (135, 64))
    manifest = data.manifest("test")
    rows = manifest.order().tolist()
    texts = [said(data.class_names[manifest.labels[row]], int(manifest.ids[row])) for row in rows]
    assert len(set(texts)) < len(texts), "some are equal"
    text: Any = tiny().model.text
    model: Any = tiny().model.module
    with torch.inference_mode():
        tokens = text.tokenizer(texts)
        expected = model.encode_text(tokens, normalize=True)
    assert tokens.shape[1] == 24
    assert torch.allclose(captions.text_nd, expected, atol=2e-6, rtol=0)
    assert captions.scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert captions.columns == {"loss": "retrieval_ce", "head": "zero_shot", "temperature": "model"}
    with monkeypatch.context() as patch:
        patch.setattr(Backbone, "encode_text", lambda *_: pytest.fail("embedded again"))
        again = captions_of(tiny(), data, source, Store(tmp_path))
    assert torch.equal(again.text_nd, captions.text_nd)
    assert store.ids("caption_embeddings")
    half = captions_of(tiny(torch.bfloat16), data, source, store)
    few = captions_of(tiny(), *opened(folder, 20), store)
    assert torch.allclose(few.text_nd, captions.text_nd[:20], atol=2e-6)
    assert not torch.equal(half.text_nd, captions.text_nd)
    assert len(store.ids("caption_embeddings")) == 3


@torch.inference_mode()
def test_the_loss_of_a_block_is_that_of_a_plain_script(folder: Path, tmp_path: Path) -> None:
    data, source = opened(folder)
    captions = captions_of(tiny(), data, source, Store(tmp_path))
    manifest = data.manifest("test")
    rows = manifest.order().tolist()[:BLOCK]
    pictures = [data.image("test", row) for row in rows]
    pixels = np.stack([np.asarray(picture) for picture in pictures]).astype(np.float32) / 255
    model: Any = tiny().model.module
    text: Any = tiny().model.text
    texts = [data.captions("test")[row] for row in rows]
    x = (torch.from_numpy(pixels).permute(0, 3, 1, 2) - 0.5) / 0.5
    images, sentences, scale = model(x, text.tokenizer(texts))[:3]
    expected = float(ClipLoss()(images, sentences, scale))
    output = tiny().forward(torch.stack([tiny().transform(picture) for picture in pictures]))
    loss_m, hit_m = captions.pairs(output.embedding_bd, range(BLOCK))
    assert float(loss_m.mean()) == pytest.approx(expected, rel=1e-5)
    assert expected < np.log(BLOCK) - 1, "the model is better than chance"
    assert float(hit_m.double().mean()) > 10 / BLOCK


def test_a_run_has_them_where_the_backbone_reads_texts(folder: Path, tmp_path: Path) -> None:
    data, source = opened(folder)
    fitter = Fitter(
        tiny(), data, source, Store(tmp_path), lambda *sites: {}, "float32", Tiles(TILE_BYTES, 64)
    )
    found = build_readouts(tiny(), data, source, fitter)
    assert found.captions is not None
    assert found.captions.text_nd.shape == (135, 64)
    shapes = open_dataset(REGISTRY.dataset("shapes"))
    config = RunConfig()
    other = source_of(shapes.spec, config)
    assert build_readouts(tiny(), shapes, other, fitter).captions is None
    # No other head than the default changes them, so that they are not measured again beside it.
    assert build_readouts(tiny(), data, source, fitter, head="probe").captions is None
    with pytest.raises(DataError, match="'shapes' has no captions"):
        captions_of(tiny(), shapes, other, Store(tmp_path))


def test_texts_are_part_of_what_a_unit_is(folder: Path, tmp_path: Path) -> None:
    """Of units that read them: captions, and what classes are called, which no manifest tells."""
    entries = tmp_path / "mine/registry/datasets"
    entries.mkdir(parents=True)
    (entries / "said.toml").write_text('source = "images"\nholdout = 0.9\n')
    registry = Registry.load((str(tmp_path / "mine"),))
    table = folder / "labels.csv"
    written = table.read_text()
    last = max(line.split(",")[1] for line in written.splitlines()[1:])  # keeps its number

    def ids(backbone: str, old: str, new: str, *option: str, caption: bool = True) -> set[str]:
        config = RunConfig(
            backbone=(backbone,), task=("loss_substitution",), dataset=("said",), option=option
        )
        spec = spec_of(folder, **({} if caption else {"caption": None}))
        table.write_text(written.replace(old, new))
        try:
            made = make_plan(config, registry, lambda *_: source_of(spec, config))
        finally:
            table.write_text(written)
        return {unit.id for unit in made.units}

    captions, name = ("a drawing", "a sketch"), (f",{last},", f",{last} or so,")
    nothing, linear = ("", ""), "loss_substitution.head=linear"
    plain = ids("tiny-clip", *nothing)
    assert plain == ids("tiny-clip", *nothing)
    assert not plain & ids("tiny-clip", *captions)
    assert not plain & ids("tiny-clip", *name)
    assert not plain & ids("tiny-clip", *nothing, caption=False)
    assert ids("tiny-clip", *name, linear) == ids("tiny-clip", *nothing, linear)
    for change in (captions, name):
        assert ids("tiny-vit", *change) == ids("tiny-vit", *nothing, caption=False)
