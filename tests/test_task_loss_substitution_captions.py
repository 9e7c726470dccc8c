"""Image-text retrieval in `loss_substitution`: fixed blocks of the evaluation order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import saebench
from saebench.backbones import Output
from saebench.controls import Identity, Zero
from saebench.data import open_dataset
from saebench.readouts import OwnHead, unit_norm
from saebench.registry import Registry
from saebench.retrieval import BLOCK, Captions
from saebench.task import Measurement
from tests.content import write
from tests.measure import finished, measured
from tests.test_task_reconstruction import topk_sae

D, T, N = 12, 5, 2 * BLOCK + 44
X = torch.randn(N, T, D, generator=torch.Generator().manual_seed(1)) + 0.5
MEAN = X.mean(0)
TEXT = unit_norm(X.mean(1) + 0.7 * torch.randn(N, D, generator=torch.Generator().manual_seed(2)))
CAPTIONS = Captions(TEXT.float(), 8.0)
PASSES = ("clean", "spliced", "zero", "mean")


def rest(x_btd: Tensor) -> Output:
    embedding_bd = x_btd.mean(1) + 0.2
    return Output(embedding_bd, embedding_bd[:, :6])


def rows_of(coder: object, n: int = N, batch: int = 50, **more: object) -> dict:
    task = finished(
        "loss_substitution",
        X[:n],
        coder,  # type: ignore[arg-type]
        batch=batch,
        segments=[s for s in (BLOCK, 2 * BLOCK) if s < n],
        labels=np.zeros(n, dtype=np.int64),
        batches={"rest": rest, "mean_td": MEAN},
        **{"captions": CAPTIONS, "readouts": [OwnHead(slice(0, 6))], **more},
    )
    return {(m, v): row for (m, _, v), row in measured(task).items()}


def twin() -> tuple[dict[str, float], dict[str, float]]:
    """Loss and accuracy of each pass, block by block in NumPy."""
    sae = topk_sae()
    recon_btd = sae.decode(sae.encode(X.flatten(0, 1))).view_as(X)
    others = (X, recon_btd, torch.zeros_like(X), MEAN.expand_as(X))
    text = TEXT.float().double().numpy()
    text /= np.linalg.norm(text, axis=1, keepdims=True)
    loss, accuracy = {}, {}
    for name, x_btd in zip(PASSES, others, strict=True):
        e = rest(x_btd).embedding_bd.double().numpy()
        e /= np.linalg.norm(e, axis=1, keepdims=True)
        losses, hits = [], []
        for start in (0, BLOCK):
            part = slice(start, start + BLOCK)
            square = 8.0 * e[part] @ text[part].T
            for i, row in enumerate(square):
                to_text = np.log(np.exp(row).sum()) - row[i]
                to_image = np.log(np.exp(square[:, i]).sum()) - row[i]
                losses.append((to_text + to_image) / 2)
                hits.append(row.argmax() == i)
        loss[name], accuracy[name] = float(np.mean(losses)), float(np.mean(hits))
    return loss, accuracy


@pytest.mark.parametrize("batch", [7, BLOCK, N])
def test_losses_and_hits_equal_a_numpy_twin(batch: int) -> None:
    loss, accuracy = twin()
    rows = rows_of(topk_sae(), batch=batch)
    variant = "loss=retrieval_ce"
    for name in PASSES:
        assert rows[f"loss_{name}", variant].value == pytest.approx(loss[name], rel=1e-6)
        assert rows[f"accuracy_{name}", variant].value == pytest.approx(accuracy[name], abs=1e-12)
    share = (loss["zero"] - loss["spliced"]) / (loss["zero"] - loss["clean"])
    row: Measurement = rows["loss_recovered", variant]
    assert row.value == pytest.approx(share, rel=1e-5)
    assert row.n == 2 * BLOCK
    assert row.note == "44 images of a last block that is not whole are left out"
    assert row.columns["loss"] == "retrieval_ce"
    assert row.columns["replaced"] == "sae_tokens"
    assert row.replicates is not None
    assert len({m for m, v in rows if v == variant}) == 11
    assert 0.1 < accuracy["clean"] < 0.9  # so that a wrong caption would show


def test_known_answers() -> None:
    identity, zero = rows_of(Identity(D)), rows_of(Zero(D))
    assert identity["loss_recovered", "loss=retrieval_ce"].value == 1
    assert zero["loss_recovered", "loss=retrieval_ce"].value == 0


def test_too_few_images_for_one_block() -> None:
    rows = rows_of(topk_sae(), n=60)
    for metric in ("loss_clean", "loss_recovered", "accuracy_spliced"):
        row = rows[metric, "loss=retrieval_ce"]
        assert row.value is None
        assert row.note == "no images; 60 images of a last block that is not whole are left out"


def test_captions_without_a_head() -> None:
    """The classes have no names: what needs none is measured all the same."""
    rows = rows_of(topk_sae(), readouts=[])
    own = rows_of(topk_sae())
    assert {v for _, v in rows} == {"", "loss=retrieval_ce"}
    assert {m for m, v in rows if not v} == {m for m, _ in own if m.startswith("embedding_")}
    for key, row in rows.items():
        assert row.value == own[key].value


def test_vacuous_tokens_are_so_for_captions_too() -> None:
    rows = rows_of(topk_sae(), sees=lambda policy, reads="any": reads == "features")
    assert rows["loss_clean", "loss=retrieval_ce"].value is not None
    assert rows["loss_recovered", "loss=retrieval_ce"].note.startswith("vacuous")


@pytest.mark.parametrize("conventions", [False, True])
def test_a_text_tower_on_classes_without_names(tmp_path: Path, conventions: bool) -> None:
    """Retrieval and the measures without labels need none."""
    shapes = open_dataset(Registry.load().dataset("shapes"))
    folder = tmp_path / "pictures"
    folder.mkdir()
    lines = ["file,label,title"]
    for i in range(3 * BLOCK):
        shapes.image("test", i).save(folder / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,{i % 3},picture {i}")
    (folder / "all.csv").write_text("\n".join(lines))
    entry = f'''
source = "images"
holdout = 0.5
[folder]
root = "{folder}"
labels = "all.csv"
caption = "title"
'''
    write(tmp_path, {"registry/datasets/numbered.toml": entry})
    with pytest.warns(UserWarning, match="no loss over classes: .* has no class names"):
        rows = saebench.run(
            backbone="tiny-clip",
            sae="identity",
            dataset="numbered",
            task="loss_substitution",
            registry=[tmp_path],
            out=tmp_path / "r",
            workers=0,
            conventions=conventions,
        )
    ours = rows[rows["convention"].isna()] if conventions else rows
    assert set(ours["loss"].dropna()) == {"retrieval_ce"}
    assert set(ours["metric"]) >= {"loss_recovered", "embedding_cosine_zero"}
    found = dict(zip(ours["metric"], ours["value"], strict=True))
    assert found["loss_recovered"] == found["embedding_cosine_spliced"] == 1
    if conventions:
        peers = rows[rows["convention"].notna()]
        assert peers["value"].isna().all()
        assert set(peers["note"]) == {"the classes of the dataset have no names, and so no head"}
