"""`saebench check sae`: what a wrong entry, a wrong file and a wrong SAE look like."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from saebench.activations import TopK
from saebench.codes import Codes
from saebench.controls import shuffled_decoder
from saebench.errors import NotFound
from saebench.inputs import LayerNorm, Length, Scaling
from saebench.registry import Registry
from saebench.saes import Sae
from saebench.testing import Check, check_sae, print_check
from saebench.testing.sae import _on_activations
from saebench.trunk import Block, Trunk
from tests import asking_format
from tests.asking_format import asking as asking
from tests.checkpoints import inputs, numbers
from tests.content import sae_entry, write
from tests.small import LATENTS, WIDTH, activations, add_sae, random_sae, setting

GATE = "it reconstructs better than the mean"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


@pytest.fixture(scope="module")
def good(root: Path) -> Sae:
    """Eight principal directions and their opposites: better than the mean, whatever x is."""
    x_nd = torch.from_numpy(activations(root, "shapes", "val", 64)).reshape(-1, WIDTH)
    mean_d = x_nd.mean(dim=0)
    directions = torch.linalg.svd(x_nd - mean_d, full_matrices=False).Vh[:8]
    W_dec_sd = torch.cat([directions, -directions])
    return Sae(W_dec_sd.T, torch.zeros(16), W_dec_sd, mean_d, TopK(8), "topk", mean_d)


def checks(root: Path, name: str) -> dict[str, Check]:
    return {check.name: check for check in check_sae(Registry.load([root]), name)}


def failed(found: dict[str, Check]) -> list[str]:
    return [name for name, check in found.items() if not check.passed]


def test_a_good_one(root: Path, good: Sae) -> None:
    add_sae(root, "good", good, l0=8.0)
    found = checks(root, "small/good")
    assert failed(found) == []
    assert len(found) == 15
    assert "NOT DECLARED" in found["its bytes are the entry's"].detail
    assert "explained variance 0." in found[GATE].detail
    assert "mean cosine of encoder and decoder 1.000" in (
        found["encoder and decoder point the same way"].detail
    )


def test_an_entry_that_is_none(root: Path) -> None:
    write(root, {"registry/saes/small/bad.toml": 'backbon = "small"\n'})
    found = checks(root, "small/bad")
    assert list(found) == failed(found) == ["its entry is one"]
    assert "did you mean 'backbone'" in found["its entry is one"].detail
    with pytest.raises(NotFound, match="small/nothing"):
        checks(root, "small/nothing")


def test_bytes_that_are_others(root: Path) -> None:
    file = add_sae(root, "altered", random_sae(0))
    entry = file.with_suffix(".toml")
    entry.write_text(entry.read_text() + f'\nsha256 = "{"0" * 64}"\n')
    assert failed(checks(root, "small/altered")) == ["its bytes are the entry's"]


def test_a_configuration_that_is_another(root: Path) -> None:
    file = add_sae(root, "beside", random_sae(0))
    entry = file.with_suffix(".toml")
    entry.write_text(entry.read_text() + f'\n[weights.beside]\n"cfg.json" = "{"0" * 64}"\n')
    found = checks(root, "small/beside")
    assert "'cfg.json' is not beside the weights" in found["its bytes are the entry's"].detail


@pytest.mark.parametrize(
    ("entry", "failing"),
    [
        ({"site": "blocks.7"}, "its site and tokens are the backbone's"),
        ({"tokens": "registers"}, "its site and tokens are the backbone's"),
        ({"backbone": "nothing"}, "its site and tokens are the backbone's"),
        ({"l0": 40.0}, "its codes are sparse"),
    ],
)
def test_what_an_entry_says_wrong(
    root: Path, good: Sae, entry: dict[str, Any], failing: str
) -> None:
    add_sae(root, "wrong", good, **entry)
    assert failed(checks(root, "small/wrong")) == [failing]


def test_another_width(root: Path) -> None:
    add_sae(root, "wide", random_sae(0, d=24))
    assert failed(checks(root, "small/wide")) == ["its width is the site's"]


def test_a_permuted_decoder(root: Path, good: Sae) -> None:
    add_sae(root, "permuted", shuffled_decoder(good, torch.Generator().manual_seed(0)))
    found = checks(root, "small/permuted")
    assert GATE in failed(found)
    assert "wrong site, wrong tokens" in found[GATE].detail


def test_a_chain(root: Path) -> None:
    found = checks(root, "small/meta")
    assert found["its width is the site's"].passed
    assert found["real activations reach it"].passed
    assert "small/a" not in failed(found)


@pytest.mark.usefixtures("asking")
def test_facts_and_the_gate_of_a_scaling_that_is_in_question(root: Path) -> None:
    W_ds = numbers(WIDTH, LATENTS, seed=2)
    asking_format.write(root / "registry/saes/small/sae.safetensors", W_ds, W_ds.T, scaling="norm")
    entry = root / "registry/saes/small/asked.toml"
    entry.write_text(sae_entry())
    found = checks(root, "small/asked")
    assert failed(found) == ["its file is read, and finite"]
    assert 'input = "raw", or input_mean' in found["its file is read, and finite"].detail
    assert "saebench estimate" in found["its file is read, and finite"].detail

    entry.write_text(f'{sae_entry()}\n[semantics]\ninput = "raw"\n')
    found = checks(root, "small/asked")
    assert "input        = raw     (entry)" in found["what decides its output"].detail
    assert GATE in failed(found)
    assert "its input is said to be raw: saebench estimate" in found[GATE].detail

    entry.write_text(f"{sae_entry()}\n[semantics]\ninput_std = 2.5\n")
    found = checks(root, "small/asked")
    assert 'another input scaling than input_std (entry): try  input = "raw"' in found[GATE].detail


# SAEs whose files saebench need not know


def of(sae: Sae) -> dict[str, Check]:
    return {c.name: c for c in _on_activations(sae, sae, inputs(WIDTH, n=64), None)}


@pytest.mark.parametrize("norm", [LayerNorm(), Length()], ids=["layer norm", "length"])
def test_rows_that_are_normalised(norm: Any) -> None:
    found = of(replace(random_sae(0), scaling=Scaling(rows=norm)))
    assert found["a row encodes and decodes alike in any company"].passed


def test_an_sae_whose_output_depends_on_other_rows() -> None:
    class Batchwise(Sae):
        def decode(self, codes: Codes) -> torch.Tensor:
            recon_nd = super().decode(codes)
            return recon_nd - recon_nd.mean(dim=0)

    sae = random_sae(0)
    batchwise = Batchwise(**{name: getattr(sae, name) for name in sae.__dataclass_fields__})
    check = of(batchwise)["a row encodes and decodes alike in any company"]
    assert not check.passed
    assert "a row's reconstruction differ" in check.detail


def test_a_transcoder_is_not_compared_with_what_it_reads() -> None:
    sae = random_sae(0)
    transcoder = Sae(
        sae.W_enc_ds,
        sae.b_enc_s,
        numbers(LATENTS, 5, seed=1),
        torch.zeros(5),
        sae.activation,
        "topk",
        transcoder=True,
    )
    found = of(transcoder)
    assert failed(found) == []
    assert "no estimate of what it reads" in found[GATE].detail
    assert "not compared" in found["encoder and decoder point the same way"].detail


def test_hidden_layers_have_no_orientation() -> None:
    sae = random_sae(0)
    trunk = Trunk((Block(numbers(WIDTH, 12, seed=1), torch.zeros(12)),))
    deep = Sae(
        -numbers(12, LATENTS, seed=3),
        sae.b_enc_s,
        sae.W_dec_sd,
        sae.b_dec_d,
        sae.activation,
        "topk",
        trunk=trunk,
    )
    found = of(deep)
    assert found["encoder and decoder point the same way"].passed
    assert "hidden layers" in found["encoder and decoder point the same way"].detail


def test_dead_latents_are_counted_and_no_code_at_all_fails() -> None:
    sae = random_sae(0)
    dead = replace(sae, b_enc_s=torch.full((LATENTS,), -1e3).index_fill(0, torch.tensor([0]), 1e3))
    found = of(dead)
    assert found["its latents fire"].detail.startswith("97.9%")
    silent = of(replace(sae, b_enc_s=torch.full((LATENTS,), -1e3)))
    assert {"its latents fire", "its codes are sparse"} <= set(failed(silent))


def test_overflow_is_not_finite() -> None:
    sae = random_sae(0)
    found = of(replace(sae, W_dec_sd=sae.W_dec_sd * 3e38, W_enc_ds=sae.W_enc_ds * 1e3))
    assert "its output is finite" in failed(found)


def test_the_report_and_its_exit_status(root: Path, good: Sae) -> None:
    def printed(name: str) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=80)
        code = print_check(Registry.load([root]), "sae", name, console)
        assert isinstance(console.file, io.StringIO)
        return code, console.file.getvalue()

    add_sae(root, "good", good)
    code, text = printed("small/good")
    assert code == 0
    assert text.count("\nok   ") == 14
    add_sae(root, "wide", random_sae(0, d=24))
    code, text = printed("small/wide")
    assert code == 1
    assert "FAIL its width is the site's: " in text
    assert text.endswith("1 checks of small/wide failed\n")
