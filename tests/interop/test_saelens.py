"""SAELens's own code writes files of all its architectures and norms; saebench reads them alike.

What only a run in progress writes (batchtopk, expected_average_only_in, covariance_whitening) is
held to what the run itself computes, or to the file that the library makes of it at its end.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from saebench.errors import WeightsError
from saebench.formats import read_sae
from tests.interop.common import WIDTH, Forward, assert_agree, random_rows, randomised, real_rows

saelens = pytest.importorskip("sae_lens")
pytestmark = [
    pytest.mark.interop,
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning"),
]

S, K, OUT, SCALE = 128, 12, 48, 0.37
NORMS = ("none", "layer_norm", "constant_norm_rescale")
INFERENCE: dict[str, dict[str, Any]] = {
    "standard": {},
    "topk": {"k": K},
    "topk beyond the positive": {"k": 100},
    "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K},
    "abstopk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "jumprelu": {},
    "gated": {},
}
TRANSCODERS = (
    "transcoder",
    "skip_transcoder",
    "jumprelu_transcoder",
    "jumprelu_skip_transcoder",
)
TRAINED: dict[str, dict[str, Any]] = {
    "standard": {},
    "gated": {},
    "jumprelu": {},
    "topk": {"k": K},
    "topk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "abstopk": {"k": K},
    "abstopk rescaled": {"k": K, "rescale_acts_by_decoder_norm": True},
    "batchtopk": {"k": K},
    "matryoshka_batchtopk": {"k": K, "matryoshka_widths": [32, 64, S]},
}
BATCH = ("batchtopk", "matryoshka_batchtopk")
REFUSED = ("matching_pursuit", "temporal")


def filled(sae: Any) -> Any:
    randomised(sae)
    if hasattr(sae, "threshold"):
        sae.threshold.data.copy_(torch.linspace(0, 2, sae.cfg.d_sae))
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.9)
    return sae.eval()


def inference(name: str, **changes: Any) -> Any:
    sae_class, config_class = saelens.registry.get_sae_class(name.split()[0])
    config = {"d_in": WIDTH, "d_sae": S, **INFERENCE.get(name, {}), **changes}
    return filled(sae_class(config_class(**config)))


def training(name: str, **changes: Any) -> Any:
    sae_class, config_class = saelens.registry.get_sae_training_class(name.split()[0])
    config = {"d_in": WIDTH, "d_sae": S, **TRAINED.get(name, {}), **changes}
    return filled(sae_class(config_class(**config)))


def forward_of(sae: Any) -> Forward:
    def forward(x_nd: Tensor) -> tuple[Tensor, Tensor]:
        z_ns = sae.encode(x_nd)  # decode needs the norms that encode took
        return z_ns, sae.decode(z_ns)

    return forward


def test_no_architecture_is_forgotten() -> None:
    registry = saelens.registry
    read = {name.split()[0] for name in (*INFERENCE, *TRANSCODERS)}
    assert set(registry.SAE_CLASS_REGISTRY) == {*read, *REFUSED}
    trained = {name.split()[0] for name in TRAINED}
    assert set(registry.SAE_TRAINING_CLASS_REGISTRY) == {*trained, "matching_pursuit"}


@pytest.mark.parametrize("name", REFUSED)
def test_an_architecture_that_is_not_read_is_refused_by_name(name: str, tmp_path: Path) -> None:
    saes = [inference(name, **({"n_heads": 4, "bottleneck_factor": 4} if "temp" in name else {}))]
    if name in saelens.registry.SAE_TRAINING_CLASS_REGISTRY:
        saes.append(training(name))
    for i, sae in enumerate(saes):
        path, _ = sae.save_model(tmp_path / str(i))
        with pytest.raises(WeightsError, match=f"SAELens's {name} is not read"):
            read_sae(path)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", INFERENCE)
def test_inference(name: str, norm: str, tmp_path: Path) -> None:
    sae = inference(name, normalize_activations=norm)
    path, _ = sae.save_model(tmp_path)
    assert_agree(read_sae(path), forward_of(sae))


@pytest.mark.parametrize("name", INFERENCE)
def test_without_pre_bias_and_square(name: str, tmp_path: Path) -> None:
    changes = {"k": 9} if "k" in INFERENCE[name] else {}
    sae = inference(name, apply_b_dec_to_input=False, **{"d_sae": WIDTH, **changes})
    path, _ = sae.save_model(tmp_path)
    assert_agree(read_sae(path), forward_of(sae))


@pytest.mark.parametrize("dtype", ["float64", "float16", "bfloat16"])
def test_stored_in_another_precision_computed_in_float32(dtype: str, tmp_path: Path) -> None:
    sae = inference("topk", dtype=dtype).to(getattr(torch, dtype))
    path, _ = sae.save_model(tmp_path)
    ours = read_sae(path)
    assert ours.stored_dtype == dtype
    sae.cfg.dtype = "float32"
    sae.dtype = torch.float32
    assert_agree(ours, forward_of(sae.float()))


@pytest.mark.parametrize("name", ["standard", "jumprelu", "gated"])
def test_after_its_decoder_was_folded_to_unit_rows(name: str, tmp_path: Path) -> None:
    sae = inference(name)
    sae.fold_W_dec_norm()
    path, _ = sae.save_model(tmp_path)
    assert_agree(read_sae(path), forward_of(sae))


def test_heads_side_by_side(tmp_path: Path) -> None:
    sae = inference("standard", reshape_activations="hook_z")
    path, _ = sae.save_model(tmp_path)

    def forward(x_nd: Tensor) -> tuple[Tensor, Tensor]:
        z_ns = sae.encode(x_nd.unflatten(1, (4, WIDTH // 4)))
        return z_ns, sae.decode(z_ns).flatten(1)

    assert_agree(read_sae(path), forward)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", TRANSCODERS)
def test_transcoders(name: str, norm: str, tmp_path: Path) -> None:
    """Their norms are of the input alone: the library does not undo them."""
    sae = inference(name, d_out=OUT, apply_b_dec_to_input=False, normalize_activations=norm)
    path, _ = sae.save_model(tmp_path)
    ours = read_sae(path)
    assert (ours.transcoder, ours.d_out) == (True, OUT)
    assert_agree(ours, lambda x_nd: (sae.encode(x_nd), sae(x_nd)))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("name", [name for name in TRAINED if name not in BATCH])
def test_the_file_of_a_run_and_the_one_for_inference(name: str, norm: str, tmp_path: Path) -> None:
    sae = training(name, normalize_activations=norm)
    path, _ = sae.save_model(tmp_path / "run")
    assert_agree(read_sae(path), forward_of(sae))
    path, _ = sae.save_inference_model(tmp_path / "inference")
    assert_agree(read_sae(path), forward_of(saelens.SAE.load_from_disk(tmp_path / "inference")))


@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("name", BATCH)
def test_batchtopk_is_what_the_library_makes_of_it_for_inference(
    name: str, rescaled: bool, tmp_path: Path
) -> None:
    """In training its codes depend on the batch; both of its files have one threshold instead."""
    sae = training(name, rescale_acts_by_decoder_norm=rescaled)
    run, _ = sae.save_model(tmp_path / "run")
    done, _ = sae.save_inference_model(tmp_path / "inference")
    peer = forward_of(saelens.SAE.load_from_disk(tmp_path / "inference"))
    for ours in map(read_sae, (run, done)):
        assert_agree(ours, peer)
        assert ours.architecture == name.replace("_", "-")
        assert ours.prefixes == ((32, 64, S) if "matryoshka" in name else ())


def scaler_of(norm: str) -> Any:
    scaler = saelens.training.activation_scaler.ActivationScaler()
    if norm == "expected_average_only_in":
        scaler.scaling_factor = SCALE
    else:
        batches = (real_rows() + 0.1 * random_rows(len(real_rows()), seed=i) for i in range(9))
        scaler.estimate_whitening(WIDTH, batches, n_batches_for_norm_estimate=9)
    return scaler


@pytest.mark.parametrize("norm", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("name", [name for name in TRAINED if name not in BATCH])
def test_a_run_in_progress_and_the_file_at_its_end(name: str, norm: str, tmp_path: Path) -> None:
    sae, scaler = training(name, normalize_activations=norm), scaler_of(norm)
    path, _ = sae.save_model(tmp_path / "run")
    scaler.save(str(tmp_path / "run" / "activation_scaler.json"))

    def forward(x_nd: Tensor) -> tuple[Tensor, Tensor]:
        z_ns = sae.encode(scaler.scale(x_nd))
        return z_ns, scaler.unscale(sae.decode(z_ns))

    ours = read_sae(path)
    assert_agree(ours, forward)
    if norm == "expected_average_only_in":
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
    else:
        white = scaler.whitening
        sae.fold_activation_whitening(white.mean, white.matrix, white.inverse_matrix)
    path, _ = sae.save_model(tmp_path / "end")
    assert read_sae(path).scaling.is_affine
    assert_agree(read_sae(path), forward_of(sae))


OLD = {
    "architecture": "standard",
    "d_in": WIDTH,
    "d_sae": S,
    "activation_fn_str": "relu",
    "hook_name": "blocks.2.hook_resid_post",
    "hook_layer": 2,
    "model_name": "gpt2",
    "dtype": "torch.float32",
    "device": "cpu",
    "finetuning_scaling_factor": False,
}


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("standard", {}),
        ("standard", {"apply_b_dec_to_input": False}),
        ("standard", {"normalize_activations": None}),
        ("standard", {"normalize_activations": False}),
        ("standard", {"normalize_activations": "layer_norm"}),
        ("standard", {"scaling_factor": True}),
        ("topk", {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}}),
        ("jumprelu", {"architecture": "jumprelu"}),
        ("gated", {"architecture": "gated"}),
    ],
)
def test_flat_files_as_the_library_migrates_them(
    name: str, changes: dict[str, Any], tmp_path: Path
) -> None:
    """It writes none any more. A TopK that is called standard, a missing pre-bias flag, nulls."""
    from safetensors.torch import load_file, save_file

    path, config = inference(name).save_model(tmp_path)
    if changes.get("scaling_factor"):
        save_file({**load_file(path), "scaling_factor": torch.ones(S)}, path)
    config.write_text(json.dumps({**OLD, **changes}))
    assert_agree(read_sae(path), forward_of(saelens.SAE.load_from_disk(tmp_path)))
