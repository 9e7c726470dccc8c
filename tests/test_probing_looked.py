"""What rows say of latents that were looked at on fewer images than probes are fitted on."""

from __future__ import annotations

from pathlib import Path

import pytest

from saebench.probing import fits, train_codes
from tests.test_probing_fits import SAE, Case, N


def test_rows_say_on_how_many_images_latents_were_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Codes that are too many to look at together: first those of 40 images, then of all."""
    case = Case(tmp_path)
    monkeypatch.setattr(fits, "SPARSE", (5,))
    monkeypatch.setattr(fits, "BEST", 40)  # latents of a probe of codes
    monkeypatch.setattr(fits, "LARGEST", 100)
    said = "latents ranked on the first 40 train images"
    of_codes = ("sparse_probe_accuracy_k5", ""), ("probe_accuracy_codes", "latents=40")
    usual = train_codes.LOOKED
    for looked, n in ((8 * 40, 40), (8 * 40, 40), (usual, N)):  # k = 8, of one token
        for module in (train_codes, fits):
            monkeypatch.setattr(module, "LOOKED", looked)
        rows = case.run(sae=SAE, overwrite="all").set_index(["metric", "variant"])
        assert rows.loc[("tree_accuracy_codes", ""), "n_train"] == n
        assert rows.loc[("probe_r_1d", ""), "n_train"] == n
        for row in of_codes:
            assert rows.loc[row, "n_train"] == N
            assert (said in rows.loc[row, "note"]) == (n == 40)
        assert said not in rows.loc[("probe_accuracy_x", ""), "note"]
