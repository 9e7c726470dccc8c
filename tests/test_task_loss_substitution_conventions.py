"""The scores of other projects in `loss_substitution`: what each does, in plain NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saebench.backbones import Output
from saebench.controls import Identity, Zero
from saebench.metrics.substitution_conventions import (
    CONVENTIONS,
    Convention,
    PerImage,
    contrastive_losses,
    dictionary_learning,
    peer_value,
    prisma,
)
from saebench.readouts import LinearHead, OwnHead, ZeroShot, unit_norm
from saebench.task import Measurement
from tests.measure import finished, measured, task_class
from tests.test_task_reconstruction import topk_sae

# --- batches -------------------------------------------------------------------------------------


def test_batches_are_cut_at_fixed_positions() -> None:
    values_nq = np.random.default_rng(0).normal(size=(21, 3))
    places = [p for p in range(22) if p != 9]  # one image did not decode
    whole = PerImage()
    for low, high in ((0, 4), (4, 13), (13, 21)):
        part = PerImage()
        for i in range(low, high):
            part.add([places[i]], torch.as_tensor(values_nq[i : i + 1]))
        whole.merge(part.state())
    expected = [
        values_nq[[i for i, p in enumerate(places) if p // 8 == b]].mean(0) for b in range(3)
    ]
    np.testing.assert_allclose(whole.means(8), expected, rtol=1e-14)
    np.testing.assert_array_equal(whole.means(1), values_nq)
    np.testing.assert_array_equal(whole.places_n, places)
    assert PerImage().means(8).shape == (0, 3)


def test_a_formula_that_divides_by_zero() -> None:
    same = PerImage()
    same.add(range(4), torch.ones(4, 3))
    value, note = peer_value(Convention(dictionary_learning, "default", 2), same)
    assert (value, note) == (None, "this project's formula divides by 0 here")
    assert peer_value(Convention(prisma, "bare", 2), same)[0] == 0  # for it adds 1e-6


def test_the_contrastive_loss_is_clip_s() -> None:
    generator = torch.Generator().manual_seed(0)
    logits_bc = torch.randn(6, 4, generator=generator).double()
    labels_b = torch.tensor([0, 3, 3, 1, 2, 0])
    square = logits_bc[:, labels_b]
    target = torch.arange(6)
    cross_entropy = torch.nn.functional.cross_entropy
    expected = (cross_entropy(square, target) + cross_entropy(square.T, target)) / 2
    assert contrastive_losses(logits_bc, labels_b).mean().item() == pytest.approx(expected.item())


# --- the task ------------------------------------------------------------------------------------

D, T, C, N = 12, 5, 8, 300
KINDS = {"cls": slice(0, 1), "patches": slice(1, T)}
X = torch.randn(N, T, D, generator=torch.Generator().manual_seed(1)) + 0.5
W_DC = torch.randn(D, C, generator=torch.Generator().manual_seed(2)).double()
LABELS = (X.mean(1).double() @ W_DC).argmax(1).numpy()
SCALE = 5.0


def rest(x_btd: Tensor) -> Output:
    weights_t = torch.tensor([3.0, 1, 1, 1, 1]) / 7
    return Output((x_btd * weights_t[:, None]).sum(1) + 0.3)


def zero_shot(texts: str, temperature: str) -> ZeroShot:
    shift = 0.5 if texts == "names" else 0.0
    text_cd = unit_norm(W_DC.T + shift)
    columns = {"loss": "zero_shot_ce", "temperature": temperature, "texts": texts}
    return ZeroShot(text_cd, SCALE if temperature == "model" else 1.0, columns)


HEADS = [zero_shot(t, k) for t in ("templates", "names") for k in ("model", "1")]


def scores(coder: Any, n: int = N, batch: int = 7, **more: Any) -> dict[str, Measurement]:
    task = finished(
        "loss_substitution",
        X[:n],
        coder,
        batch=batch,
        labels=LABELS[:n],
        segments=[s for s in (128, 256) if s < n],
        batches={"rest": rest},
        conventions=True,
        **{"readouts": HEADS, "kinds": KINDS, **more},
    )
    return {
        f"{m}@{v.removeprefix('convention=')}": row for (m, _, v), row in measured(task).items()
    }


def replaced(x_btd: Tensor, other_btd: Tensor, part: slice) -> np.ndarray:
    changed_btd = x_btd.clone()
    changed_btd[:, part] = other_btd[:, part]
    return rest(changed_btd).embedding_bd.double().numpy()


def expected_scores(coder: Any) -> dict[str, float]:
    """What each project does, in NumPy."""
    recon_btd = coder.decode(coder.encode(X.flatten(0, 1))).view_as(X)
    zero_btd = torch.zeros_like(X)

    def passes(part: slice) -> list[np.ndarray]:
        return [replaced(X, other, part) for other in (X, recon_btd, zero_btd)]

    def logits(e_nd: np.ndarray, head: ZeroShot) -> np.ndarray:
        cosines = e_nd @ head.text_cd.numpy().T / np.linalg.norm(e_nd, axis=1, keepdims=True)
        return head.scale * cosines

    def ce(rows: np.ndarray, labels: np.ndarray) -> np.ndarray:
        return np.log(np.exp(rows).sum(1)) - rows[np.arange(len(rows)), labels]

    def cut(size: int, whole: bool = False) -> list[slice]:
        stop = N - N % size if whole else N
        return [slice(i, min(i + size, N)) for i in range(0, stop, size)]

    every, of_cls = passes(slice(0, T)), passes(slice(0, 1))
    c, s, z = (ce(logits(e, HEADS[0]), LABELS) for e in every)
    bare = [ce(logits(e, HEADS[3]), LABELS) for e in every]
    bc, bs, bz = (np.mean([x[b].mean() for b in cut(128)]) for x in bare)
    p = np.exp(logits(every[0], HEADS[0]))
    p /= p.sum(1, keepdims=True)
    q = [np.exp(logits(e, HEADS[0])) for e in every]
    kl = [(p * np.log(p / (x / x.sum(1, keepdims=True)))).sum(1).mean() for x in q]
    contrastive = []
    for b in cut(128, whole=True):
        square = [logits(e[b], HEADS[2])[:, LABELS[b]] for e in of_cls]
        own = np.arange(128)
        contrastive.append([(ce(x, own).mean() + ce(x.T, own).mean()) / 2 for x in square])
    lost = np.mean([(cs - cc) / (cz - cc) for cc, cs, cz in contrastive])
    return {
        "ce_recovered@prisma": (bz - bs) / (bz - bc + 1e-6) * 100,
        "ce_recovered@kissane": np.mean(
            [(z[b].mean() - s[b].mean()) / (z[b].mean() - c[b].mean()) for b in cut(8)]
        ),
        "frac_recovered@dictionary_learning": np.mean(
            [(s[b].mean() - z[b].mean()) / (c[b].mean() - z[b].mean()) for b in cut(128)]
        ),
        "ce_loss_score@saebench": (z.mean() - s.mean()) / (z.mean() - c.mean()),
        "ce_loss_score@sae_lens": (z.mean() - s.mean()) / (z.mean() - c.mean()),
        "kl_div_score@saebench": (kl[2] - kl[1]) / kl[2],
        "score@hugofry": lost,
        "score@patchsae": lost,
    }


@pytest.mark.parametrize("batch", [7, 64])
def test_each_score_equals_its_numpy_twin(batch: int) -> None:
    rows, expected = scores(topk_sae(), batch=batch), expected_scores(topk_sae())
    assert set(rows) == set(expected) == {f"{m}@{p}" for m, p in CONVENTIONS}
    for name, value in expected.items():
        assert rows[name].value == pytest.approx(value, rel=1e-6), name
        tokens = "cls" if name.startswith("score@") else "all"
        assert rows[name].columns["replaced"] == rows[name].columns["ablated"] == tokens
    assert rows["ce_recovered@prisma"].columns["temperature"] == "1"
    assert rows["ce_recovered@prisma"].columns["texts"] == "names"
    assert rows["score@hugofry"].columns["temperature"] == "model"
    assert rows["score@hugofry"].n == 256  # the last batch is not whole
    assert rows["ce_recovered@prisma"].n == N
    # The twins have to be able to tell the conventions from each other.
    values = [
        v for k, v in expected.items() if k not in ("ce_loss_score@sae_lens", "score@patchsae")
    ]
    assert len({round(v, 4) for v in values}) == len(values)


def test_known_answers() -> None:
    perfect, nothing = scores(Identity(D)), scores(Zero(D))
    for name, row in perfect.items():
        best = 0 if name.startswith("score@") else 1
        at_best = row.value / 100 if name == "ce_recovered@prisma" else row.value  # type: ignore[operator]
        assert at_best == pytest.approx(best, abs=1e-4), name
        assert nothing[name].value == pytest.approx(1 - best, abs=1e-12), name


def test_projects_that_need_texts_or_a_cls_token() -> None:
    own = OwnHead(slice(0, C))

    def classified(x_btd: Tensor) -> Output:
        embedding_bd = rest(x_btd).embedding_bd
        return Output(embedding_bd, embedding_bd @ W_DC.float())

    task = finished(
        "loss_substitution",
        X[:256],  # two batches of one size
        topk_sae(),
        batch=50,
        labels=LABELS[:256],
        batches={"rest": classified},
        conventions=True,
        readouts=[own],
    )
    rows = {(m, v): row for (m, _, v), row in measured(task).items()}
    for project in ("hugofry", "patchsae"):
        row = rows["score", f"convention={project}"]
        assert (row.value, row.note) == (
            None,
            "it needs a text tower: a label's text for each image",
        )
    # Where there are no texts, Prisma's is of the head that there is.
    found = rows["ce_recovered", "convention=prisma"]
    ours = rows["ce_loss_score", "convention=saebench"]
    assert found.columns["loss"] == "head_ce"
    assert found.value == pytest.approx(100 * ours.value, rel=1e-5)  # type: ignore[operator]
    assert found.note == "of the default head, for there is no text tower"
    assert ours.note == ""
    few = scores(topk_sae(), n=100)
    assert few["score@hugofry"].note == "no batch of images is whole"
    assert few["ce_recovered@prisma"].value is not None


def test_tokens_that_say_nothing_have_no_score() -> None:
    """A score of tokens that cannot reach what is read would be perfect for any SAE."""
    no_cls = scores(topk_sae(), sees=lambda policy, reads="any": None if policy == "cls" else True)
    assert no_cls["score@hugofry"].note == "the site test has no tokens 'cls'"
    assert no_cls["ce_recovered@prisma"].value is not None
    blind = scores(topk_sae(), sees=lambda policy, reads="any": policy == "all")
    assert blind["score@patchsae"].value is None
    assert blind["score@patchsae"].note == "vacuous: the output cannot change with the tokens 'cls'"
    all_blind = scores(topk_sae(), sees=lambda policy, reads="any": reads != "embedding")
    for row in all_blind.values():
        assert (row.value, row.n) == (None, 0)
        assert row.note.startswith("vacuous: the embedding cannot change with the tokens")
    why = "none of 'a', 'b' was trained on the tokens registers of 'test'"
    set_of_two = scores(topk_sae(), refused=lambda policy: why if policy == "all" else "")
    assert set_of_two["ce_loss_score@saebench"].note == why
    assert set_of_two["score@hugofry"].value is not None


def test_tokens_that_the_sae_was_not_trained_on_are_named() -> None:
    rows = scores(topk_sae(), foreign=lambda policy: ["patches"] if policy == "all" else [])
    note = "it was not trained on these of the replaced tokens: patches"
    for name, row in rows.items():
        of_all = not name.startswith("score@")
        assert row.note.endswith(note) == of_all, name


def test_a_head_that_is_not_the_project_s_is_said() -> None:
    probe = LinearHead(W_DC, torch.zeros(C).double(), "probe")
    rows = scores(topk_sae(), readouts=[probe], options={"head": "linear"})
    score, prisma_s = rows["score@hugofry;head=probe"], rows["ce_recovered@prisma;head=probe"]
    assert score.value is None
    assert score.note == "it needs a text tower, and another head is read here: head=probe"
    assert prisma_s.value is not None
    assert prisma_s.note == "of another head than the project's: head=probe"
    assert prisma_s.columns["loss"] == "linear_head_ce"
    assert prisma_s.columns["last_block"] == "full"


def test_classes_without_names() -> None:
    rows = scores(topk_sae(), readouts=[])
    assert {row.value for row in rows.values()} == {None}
    assert {row.note for row in rows.values()} == {
        "the classes of the dataset have no names, and so no head"
    }


def test_all_are_declared() -> None:
    task = task_class("loss_substitution")
    assert {metric for metric, _ in CONVENTIONS} <= {m.name for m in task.metrics}
    assert all(math.isfinite(r.value) for r in scores(topk_sae()).values() if r.value is not None)
