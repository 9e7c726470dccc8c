"""visaebench's own loader and its evaluator's input, against saebench, in both of its layouts.

visaebench writes no SAEs, it only loads them: files are fabricated in its simple layout, or saved
by overcomplete, with the threshold beside it. Where its loader does otherwise than overcomplete,
which wrote the file, saebench goes by overcomplete; these tests name each such place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_sae
from saebench.formats.facts import Facts
from saebench.saes import Sae
from tests.interop.common import WIDTH, Forward, assert_agree, random_rows, randomised, real_rows
from tests.interop.overcomplete_modules import forward_of, made

loader = pytest.importorskip("visaebench.hub.loader")
cache = pytest.importorskip("visaebench.data.cache")
pytestmark = pytest.mark.interop

S, K = 128, 12
KINDS: dict[str, dict[str, Any]] = {
    "topk": {"k": K},
    "batchtopk": {"k": K, "threshold": 0.75},
    "jumprelu": {},
}
LAYOUTS = [
    ("sae.pt", "config.json"),
    ("model.pt", "config.yaml"),
    ("model.safetensors", "config.yml"),
]


def simple(s: int = S, *, bias: bool = True) -> dict[str, torch.Tensor]:
    encoder, decoder = torch.nn.Linear(WIDTH, s), torch.nn.Linear(WIDTH, s)
    randomised(encoder, seed=1)
    randomised(decoder, seed=2)
    found = {
        "encoder.weight": encoder.weight.detach(),
        "encoder.bias": encoder.bias.detach(),
        "decoder.weight": decoder.weight.detach(),  # [s d], of no layer that decodes
    }
    return {**found, "decoder.bias": torch.linspace(-1, 1, WIDTH)} if bias else found


def written(
    folder: Path, state: dict[str, torch.Tensor], config: dict[str, Any], *names: str
) -> Path:
    weights, beside = names or LAYOUTS[0]
    if weights.endswith(".safetensors"):
        save_file(state, folder / weights)
    else:
        torch.save(state, folder / weights)
    (folder / beside).write_text(json.dumps(config))  # which is YAML too
    return folder / weights


def config_of(kind: str, s: int = S, **more: Any) -> dict[str, Any]:
    return {"architecture": kind, "d_model": WIDTH, "dict_size": s, **KINDS[kind], **more}


def normalisation(folder: Path, x_nd: torch.Tensor) -> tuple[torch.Tensor, float]:
    """Mean [d] and one number, as visaebench's evaluator takes them of activations."""
    torch.save(x_nd, folder / "shard_000.pt")
    return cache.compute_or_load_norm_stats([folder / "shard_000.pt"])


def its_forward(folder: Path, mean_d: torch.Tensor, std: float) -> Forward:
    """Of visaebench's loader, between what its evaluator does to rows and the same undone."""
    theirs = loader.load_sae(str(folder), device="cpu")

    def forward(x_nd: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z_ns = theirs.encode((x_nd - mean_d) / std)
        return z_ns, theirs.decode(z_ns) * std + mean_d

    return forward


def read(path: Path, mean_d: torch.Tensor, std: float, **said: Any) -> Sae:
    return read_sae(path, facts=Facts({"input_mean": mean_d, "input_std": std, **said}))


def assert_as_its_loader(folder: Path, path: Path, **said: Any) -> None:
    for rows_nd in (random_rows(), real_rows()):
        mean_d, std = normalisation(folder, rows_nd)
        assert_agree(read(path, mean_d, std, **said), its_forward(folder, mean_d, std), rows_nd)


# --- where its loader is right ------------------------------------------------------------------


@pytest.mark.parametrize("names", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_simple(kind: str, names: tuple[str, str], tmp_path: Path) -> None:
    state = simple()
    if kind == "jumprelu":
        state["jump_thresholds"] = torch.linspace(0.1, 1.5, S)
    assert_as_its_loader(tmp_path, written(tmp_path, state, config_of(kind), *names))


@pytest.mark.parametrize("bias", [True, False])
def test_as_many_latents_as_dimensions(bias: bool, tmp_path: Path) -> None:
    state = simple(WIDTH, bias=bias)
    assert_as_its_loader(tmp_path, written(tmp_path, state, config_of("topk", WIDTH)))


def test_simple_thresholds_are_no_logarithms(tmp_path: Path) -> None:
    state = {**simple(), "thresholds": torch.linspace(0.1, 1.5, S)}
    assert_as_its_loader(tmp_path, written(tmp_path, state, config_of("jumprelu")))


@pytest.mark.parametrize("threshold", [0.75, None])
def test_batch_top_k_of_overcomplete_with_a_running_threshold(
    threshold: float | None, tmp_path: Path
) -> None:
    """With both, the configured one holds in both."""
    sae = made("BatchTopKSAE", dictionary_params={"use_multiplier": True}).eval()
    state = {**sae.state_dict(), "_running_threshold": torch.tensor(float(sae.running_threshold))}
    config = {**config_of("batchtopk"), "threshold": threshold}
    assert_as_its_loader(tmp_path, written(tmp_path, state, config))


def test_top_k_of_overcomplete(tmp_path: Path) -> None:
    sae = made("TopKSAE").eval()
    assert_as_its_loader(tmp_path, written(tmp_path, sae.state_dict(), config_of("topk")))


# --- where its loader does otherwise than overcomplete ------------------------------------------


def as_overcomplete_and_not_as_its_loader(
    folder: Path, sae: Any, kind: str, *, in_use: bool = True, **said: Any
) -> None:
    if in_use:
        sae.eval()
    path = written(folder, dict(sae.state_dict()), config_of(kind))
    ours = read(path, torch.zeros(WIDTH), 1.0, **said)
    assert_agree(ours, forward_of(sae))
    theirs = its_forward(folder, torch.zeros(WIDTH), 1.0)
    with pytest.raises(AssertionError):
        assert_agree(ours, theirs)


def test_its_loader_takes_logarithms_for_thresholds(tmp_path: Path) -> None:
    as_overcomplete_and_not_as_its_loader(tmp_path, made("JumpSAE"), "jumprelu")


@pytest.mark.parametrize("encoder", ["mlp_bn_1", "mlp_ln_1"])
def test_its_loader_drops_the_norm_of_an_encoder(encoder: str, tmp_path: Path) -> None:
    sae = made("TopKSAE", encoder_module=encoder)
    as_overcomplete_and_not_as_its_loader(tmp_path, sae, "topk")


def test_its_loader_does_not_normalise_a_dictionary(tmp_path: Path) -> None:
    sae = made("TopKSAE")
    as_overcomplete_and_not_as_its_loader(tmp_path, sae, "topk", in_use=False, dictionary_norm="l2")


# --- where its loader invents -------------------------------------------------------------------


def test_its_loader_takes_zero_for_a_threshold_that_is_missing(tmp_path: Path) -> None:
    path = written(tmp_path, simple(), {**config_of("batchtopk"), "threshold": None})
    assert float(loader.load_sae(str(tmp_path), device="cpu").threshold) == 0
    with pytest.raises(SpecError, match="does not say: threshold"):
        read(path, torch.zeros(WIDTH), 1.0)


def test_its_loader_takes_001_for_jump_thresholds_that_are_missing(tmp_path: Path) -> None:
    path = written(tmp_path, simple(), config_of("jumprelu"))
    assert (loader.load_sae(str(tmp_path), device="cpu").jump_thresholds == 0.01).all()
    with pytest.raises(WeightsError, match="neither jump_thresholds nor thresholds"):
        read(path, torch.zeros(WIDTH), 1.0)


def test_its_loader_takes_topk_where_nothing_says_what_it_is(tmp_path: Path) -> None:
    path = written(tmp_path, simple(), {"hidden_dim": S, "k": K})
    assert loader.load_sae(str(tmp_path), device="cpu").activation == "topk"
    with pytest.raises(WeightsError, match=r"could be of several formats.*visaebench"):
        read(path, torch.zeros(WIDTH), 1.0)


def test_input_scaling_is_no_part_of_its_files_and_is_asked_for(tmp_path: Path) -> None:
    path = written(tmp_path, simple(), config_of("topk"))
    with pytest.raises(SpecError, match="does not say: input"):
        read_sae(path)
