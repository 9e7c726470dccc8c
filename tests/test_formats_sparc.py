"""SPARC: which stream is read and written, and where k comes from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_content, write_sae
from saebench.formats.content import sniff
from saebench.formats.facts import Facts
from saebench.saes import Sae
from tests.checkpoints import inputs
from tests.checkpoints.sparc import WIDTHS, state


def read(folder: Path, weights: dict[str, Any] | None = None, **given: Any) -> Sae:
    torch.save(weights or state(WIDTHS), folder / "msae_checkpoint.pth")
    return read_content(sniff(folder / "msae_checkpoint.pth"), Facts(given))


def test_the_stream_is_asked_for_among_those_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="stream") as caught:
        read(tmp_path)
    assert '"clip_img" | "clip_txt" | "dino"' in caught.value.hint
    with pytest.raises(SpecError, match="one of clip_img, clip_txt, dino"):
        read(tmp_path, stream="siglip", k=4)


def test_one_stream_of_several_is_noted(tmp_path: Path) -> None:
    sae = read(tmp_path, stream="dino", k=4)
    assert (sae.d_model, sae.transcoder) == (WIDTHS["dino"], False)
    assert any("sum of their logits" in note for note in sae.record.notes)
    alone = read(tmp_path, state({"dino": 8}), k=4)
    assert not alone.record.notes


def test_another_target_is_a_transcoder_whose_output_keeps_its_own_length(tmp_path: Path) -> None:
    sae, x_nd = read(tmp_path, stream="clip_img", target="dino", k=4), inputs()
    assert (sae.transcoder, sae.d_out) == (True, WIDTHS["dino"])
    longer = sae.decode(sae.encode(5 * x_nd))
    torch.testing.assert_close(longer, sae.decode(sae.encode(x_nd)), rtol=1e-4, atol=1e-4)
    write_sae(sae, tmp_path / "ours")
    with pytest.raises(SpecError, match="target has to be one of"):
        read(tmp_path, stream="clip_img", target="audio", k=4)


def test_k_of_the_run_beside_it_holds(tmp_path: Path) -> None:
    (tmp_path / "run_config.json").write_text(json.dumps({"args": {"k": 6}}))
    assert read(tmp_path, stream="dino").k == 6
    with pytest.raises(SpecError, match=r"run_config.json says 6"):
        read(tmp_path, stream="dino", k=4)


def test_a_stream_that_is_not_whole_or_not_known_is_refused(tmp_path: Path) -> None:
    weights = state(WIDTHS)
    del weights["decoders.dino.weight"]
    with pytest.raises(WeightsError, match=r"no place for: encoders\.dino\.weight"):
        read(tmp_path, weights, stream="clip_img", k=4)
    with pytest.raises(WeightsError, match="no place for: gate"):
        read(tmp_path, {**state(WIDTHS), "gate": torch.zeros(2)}, stream="dino", k=4)
