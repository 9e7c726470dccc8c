"""Few-shot probes against the slow plain script: which images, and that held ones stay held."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import saebench
from tests.slow_linear_probe import features_of, images, sae_of
from tests.slow_probes import fit, ranking, scores

SAE, SHOTS, N_TEST = "tiny-vit/topk-k8", 4, 300


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 3])
def test_few_shot_rows_are_those_of_hooks_and_scikit_learn(seed: int, tmp_path: Path) -> None:
    rows = saebench.run(
        backbone="tiny-vit",
        sae=SAE,
        task="linear_probe",
        option=["linear_probe.label=genus"],
        shots=[SHOTS],
        seed=seed,
        limit=N_TEST,
        train_limit=96,  # of the full sample: a few-shot one is of the whole split
        out=tmp_path,
    )
    few = rows[rows["variant"] == f"label=genus;shots={SHOTS}"]
    found = {
        name: dict(zip(few["metric"], few[name], strict=True))
        for name in ("value", "penalty", "n_train")
    }
    train, test = (
        images("shapes", "train", 4096, "genus"),
        images("shapes", "test", N_TEST, "genus"),
    )
    seen, held = [], []
    for label in range(12):  # of each class in turn, the seed-th stretch of its images
        own = np.roll(np.flatnonzero(train.labels == label), -2 * SHOTS * seed)
        seen += own[:SHOTS].tolist()
        held += own[SHOTS : 2 * SHOTS].tolist()
    both = np.sort(seen + held)
    y, held_n = train.labels[both], np.isin(both, held)
    of_train = features_of("tiny-vit", train.images[both], sae_of(SAE), "cls")
    of_test = features_of("tiny-vit", test.images, sae_of(SAE), "cls")
    z, z_test = of_train.codes["none"], of_test.codes["none"]
    best = ranking(z[~held_n], y[~held_n])[:10]
    for metric, x_nd, x_test_nd in (
        ("probe_accuracy_x", of_train.x, of_test.x),
        ("probe_accuracy_xhat_refit", of_train.xhat, of_test.xhat),
        ("probe_accuracy_codes", z, z_test),
        ("sparse_probe_accuracy_k10", z[:, best], z_test[:, best]),
    ):
        probe = fit(x_nd, y, held_n, found["penalty"][metric], refit=False)
        expected = scores(probe.logits(x_test_nd), test.labels)
        assert found["n_train"][metric] == 12 * SHOTS
        ties = 0.1 if "sparse" in metric else 0  # where all its latents are silent
        assert found["value"][metric] == pytest.approx(expected[""], abs=3 / N_TEST + ties)
        loss = found["value"][metric.replace("accuracy", "loss")]
        assert loss == pytest.approx(expected["loss"], rel=2e-3), metric
