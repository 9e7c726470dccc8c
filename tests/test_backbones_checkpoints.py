"""Checkpoints in the forms they are released in load as timm and open_clip themselves load them.

The expected values are the library's own: the same file, given to `timm.create_model` or
`open_clip.create_model`, whose state dict must come out bit for bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saebench.backbones import build_module
from saebench.backbones.checkpoint import load_weights, read_tensors
from saebench.errors import WeightsError
from saebench.formats.content import sniff
from saebench.specs import BackboneSpec, InputSpec, WeightsSpec

Tensors = dict[str, Tensor]


def entry(path: Path, loader: str, model: str, **args: Any) -> BackboneSpec:
    return BackboneSpec(
        name="case",
        path=str(path.parent / "case.toml"),
        family="vit",
        architecture="vit",
        pretraining="none",
        loader=loader,
        model=model,
        model_args=args,
        weights=WeightsSpec(file=path.name),
        input=InputSpec(size=args.get("img_size", 224)),
    )


def ours(spec: BackboneSpec) -> Tensors:
    module = build_module(spec)
    assert isinstance(module, nn.Module)
    load_weights(module, spec)
    return module.state_dict()


def timms(path: Path, model: str, **args: Any) -> Tensors:
    overlay = {"file": str(path), "custom_load": False}
    return timm.create_model(
        model, pretrained=True, pretrained_cfg_overlay=overlay, **args
    ).state_dict()


def assert_same(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor), name


def random_like(module: nn.Module, seed: int = 0) -> Tensors:
    """Random values under the names and shapes of a module."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(tensor.shape, generator=generator) * 0.1
        if tensor.is_floating_point()
        else tensor.clone()
        for name, tensor in module.state_dict().items()
    }


# timm ------------------------------------------------------------------------------------------

SMALL_DINO = {"embed_dim": 48, "depth": 2, "num_heads": 3}


def dinov2_names(tensors: Tensors, registers: int) -> Tensors:
    """timm's names turned into those of the original release (its documented differences)."""
    out = {"mask_token": torch.randn(1, 48)}
    for name, tensor in tensors.items():
        if name == "reg_token":
            out["register_tokens"] = tensor
        elif name == "pos_embed" and registers:
            # The release has a position for the class token; timm's has none, and adds it in.
            out["pos_embed"] = torch.cat([torch.randn(1, 1, 48), tensor], dim=1)
        else:
            out[name] = tensor
    return out


@pytest.mark.parametrize(("registers", "model"), [(0, "dinov2"), (4, "reg4_dinov2")])
def test_dinov2_in_timms_names_at_another_size(registers: int, model: str, tmp_path: Path) -> None:
    name, path = f"vit_small_patch14_{model}.lvd142m", tmp_path / "model.safetensors"
    save_file(random_like(timm.create_model(name, **SMALL_DINO)), path)
    found = ours(entry(path, "timm", name, img_size=224, **SMALL_DINO))
    assert_same(found, timms(path, name, img_size=224, **SMALL_DINO))
    assert found["pos_embed"].shape == (1, 256 if registers else 257, 48)


@pytest.mark.parametrize("size", [224, 518])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("registers", "model"), [(0, "dinov2"), (4, "reg4_dinov2")])
def test_dinov2_in_its_own_names_and_size(
    size: int, dtype: torch.dtype, registers: int, model: str, tmp_path: Path
) -> None:
    name, path = f"vit_small_patch14_{model}.lvd142m", tmp_path / "dinov2_pretrain.pth"
    native = timm.create_model(name, **SMALL_DINO)
    stored = dinov2_names(random_like(native), registers)
    torch.save({key: tensor.to(dtype) for key, tensor in stored.items()}, path)
    found = ours(entry(path, "timm", name, img_size=size, **SMALL_DINO))
    assert_same(found, timms(path, name, img_size=size, **SMALL_DINO))
    grid = (size // 14) ** 2
    assert found["pos_embed"].shape == (1, grid if registers else grid + 1, 48)
    assert torch.equal(found["norm.weight"], stored["norm.weight"].to(dtype).float())


VITS = {
    "augreg": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"embed_dim": 48, "depth": 2}),
    "deit": ("deit_tiny_distilled_patch16_224.fb_in1k", {"embed_dim": 48, "depth": 2}),
    "deit3": ("deit3_small_patch16_224.fb_in1k", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "mae": ("vit_base_patch16_224.mae", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "dino": ("vit_base_patch16_224.dino", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "dinov3": ("vit_small_patch16_dinov3.lvd1689m", {"embed_dim": 48, "depth": 2, "num_heads": 3}),
    "resnet": ("resnet18.tv_in1k", {"layers": (1, 1, 1, 1), "channels": (8, 8, 16, 16)}),
    "convnext": ("convnext_atto.d2_in1k", {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16)}),
}


def plain(tensors: Tensors) -> Any:
    return tensors


def deit_release(tensors: Tensors) -> Any:
    return {"model": tensors}


def training_script(tensors: Tensors) -> Any:
    other = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    arguments = argparse.Namespace(model="vit", lr=0.1)
    return {"epoch": 3, "args": arguments, "state_dict": other, "state_dict_ema": tensors}


def compiled_in_parallel(tensors: Tensors) -> Any:
    return {"state_dict": {f"module._orig_mod.{n}": tensor for n, tensor in tensors.items()}}


FORMS: list[Callable[[Tensors], Any]] = [plain, deit_release, training_script, compiled_in_parallel]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", ["augreg", "resnet"])
def test_wrapped_checkpoints(form: Callable[[Tensors], Any], case: str, tmp_path: Path) -> None:
    model, args = VITS[case]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / "checkpoint.pth.tar"
    torch.save(form(stored), path)
    found = ours(entry(path, "timm", model, **args))
    assert_same(found, timms(path, model, **args))
    assert_same(found, stored)


@pytest.mark.parametrize("case", VITS)
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_timms_own_files(case: str, suffix: str, tmp_path: Path) -> None:
    model, args = VITS[case]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / f"model.{suffix}"
    save_file(stored, path) if suffix == "safetensors" else torch.save(stored, path)
    found = ours(entry(path, "timm", model, **args))
    assert_same(found, timms(path, model, **args))
    assert_same(found, stored)


def test_deit3_in_its_own_names(tmp_path: Path) -> None:
    model, args = VITS["deit3"]
    stored = random_like(timm.create_model(model, **args))
    released = {
        n.replace("ls1.gamma", "gamma_1").replace("ls2.gamma", "gamma_2"): t
        for n, t in stored.items()
    }
    assert released.keys() != stored.keys()
    path = tmp_path / "deit_3_small_224_1k.pth"
    torch.save({"model": released}, path)
    found = ours(entry(path, "timm", model, **args))
    assert_same(found, timms(path, model, **args))
    assert_same(found, stored)


def test_clip_files_of_open_clip_load_into_timm(tmp_path: Path) -> None:
    """timm reads the image tower out of a whole CLIP file; its projection is timm's head."""
    clip = open_clip.model.CLIP(
        embed_dim=32,
        vision_cfg={"layers": 2, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 64},
        text_cfg={"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 64},
    )
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(random_like(clip), path)
    args = {"embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 32, "img_size": 64}
    model = "vit_base_patch32_clip_224.laion2b"
    found = ours(entry(path, "timm", model, **args))
    overlay = {"file": str(path), "num_classes": 32}
    wanted = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay, **args)
    assert_same(found, wanted.state_dict())


def test_a_classifier_that_the_model_was_built_without_is_dropped(tmp_path: Path) -> None:
    model, args = VITS["deit"]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / "model.safetensors"
    save_file(stored, path)
    found = ours(entry(path, "timm", model, num_classes=0, **args))
    assert_same(found, timms(path, model, num_classes=0, **args))
    assert stored.keys() - found.keys() == {
        "head.weight",
        "head.bias",
        "head_dist.weight",
        "head_dist.bias",
    }


def test_a_classifier_that_the_file_lacks_is_an_error(tmp_path: Path) -> None:
    model, args = VITS["augreg"]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / "model.safetensors"
    save_file({n: t for n, t in stored.items() if not n.startswith("head.")}, path)
    with pytest.raises(WeightsError, match=r"(?s)lacks head\.weight, head\.bias.*num_classes = 0"):
        ours(entry(path, "timm", model, **args))
    assert "head.weight" not in ours(entry(path, "timm", model, num_classes=0, **args))


def test_a_classifier_of_other_classes_is_an_error(tmp_path: Path) -> None:
    """timm would keep a random one."""
    model, args = VITS["augreg"]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / "model.safetensors"
    save_file(stored, path)
    with pytest.raises(WeightsError, match=r"head\.weight \(file \[1000, 48\], model \[7, 48\]\)"):
        ours(entry(path, "timm", model, num_classes=7, **args))


def test_what_is_left_over_is_named(tmp_path: Path) -> None:
    model, args = VITS["augreg"]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / "model.safetensors"
    save_file({**stored, "decoder_pred.weight": torch.zeros(2)}, path)
    with pytest.raises(WeightsError, match=r"the model lacks decoder_pred\.weight"):
        ours(entry(path, "timm", model, **args))


def test_names_under_a_frameworks_prefix_are_explained(tmp_path: Path) -> None:
    model, args = VITS["augreg"]
    path = tmp_path / "last.ckpt"
    stored = random_like(timm.create_model(model, **args))
    torch.save({"state_dict": {f"model.{n}": tensor for n, tensor in stored.items()}}, path)
    with pytest.raises(WeightsError, match=r"its names begin with 'model\.': save the file anew"):
        ours(entry(path, "timm", model, **args))


# What is resampled is said, or refused ---------------------------------------------------------

SMALL = {"embed_dim": 48, "depth": 2, "num_classes": 0}


@pytest.mark.parametrize(("stored", "model"), [(16, 32), (32, 16)])
def test_patches_of_another_size_are_refused(stored: int, model: int, tmp_path: Path) -> None:
    """timm would resample them, and what it makes of the image is another thing."""
    name, path = "vit_tiny_patch16_224", tmp_path / "model.safetensors"
    save_file(random_like(timm.create_model(name, patch_size=stored, **SMALL)), path)
    with pytest.raises(WeightsError) as error:
        ours(entry(path, "timm", name, patch_size=model, **SMALL))
    assert f"[48, 3, {stored}, {stored}]" in error.value.what
    assert f"[48, 3, {model}, {model}]" in error.value.what
    assert f"model_args.patch_size = {stored}" in str(error.value.hint)
    assert ours(entry(path, "timm", name, patch_size=stored, **SMALL))
    assert timms(path, name, patch_size=model, **SMALL), "timm's own functions are in place again"


@pytest.mark.parametrize(
    ("model", "stored", "built", "note"),
    [
        ("vit_tiny_patch16_224", 384, 224, "from 24 x 24 to 14 x 14"),
        ("vit_small_patch14_reg4_dinov2", 518, 224, "from 37 x 37 to 16 x 16"),
        ("eva02_tiny_patch14_224", 336, 224, "from 24 x 24 to 16 x 16"),
        ("vit_tiny_patch16_224", 224, 224, None),
        ("vit_small_patch16_dinov3", 256, 224, None),  # rotary: of the model's own grid
    ],
)
def test_a_position_embedding_of_another_grid_is_said(
    model: str, stored: int, built: int, note: str | None, tmp_path: Path
) -> None:
    path, args = tmp_path / "model.safetensors", {**SMALL, "num_heads": 3}
    save_file(random_like(timm.create_model(model, img_size=stored, **args)), path)
    spec = entry(path, "timm", model, img_size=built, **args)
    module = build_module(spec)
    assert isinstance(module, nn.Module)
    notes = load_weights(module, spec).notes
    assert notes == (() if note is None else (f"position embedding resampled {note}",))


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.complex64])
def test_numbers_that_are_no_floats_are_no_weights(dtype: torch.dtype, tmp_path: Path) -> None:
    model, args = VITS["augreg"]
    stored, path = random_like(timm.create_model(model, **args)), tmp_path / "model.pt"
    stored["head.weight"] = stored["head.weight"].to(dtype)
    torch.save(stored, path)
    shown = str(dtype).removeprefix("torch.")
    with pytest.raises(WeightsError, match=rf"(?s)not in the file: head\.weight \({shown}\)\n"):
        ours(entry(path, "timm", model, **args))


@pytest.mark.parametrize("version", [2, 3, 4, 5])
def test_a_header_whose_length_looks_like_a_pickle(version: int, tmp_path: Path) -> None:
    """A header of 640 bytes is 80 02 00 …, as a pickle of protocol 2 begins."""
    path, length = tmp_path / "model.safetensors", 128 + 256 * version
    stored = {"a": torch.arange(4.0)}
    save_file(stored, path, {"text": ""})
    # The header is padded to a multiple of 8 bytes, and free text in it makes up the length.
    shortest = int.from_bytes(path.read_bytes()[:8], "little")
    save_file(stored, path, {"text": "x" * (length - shortest)})
    assert path.read_bytes().startswith(bytes([0x80, version]))
    assert_same(read_tensors(path), stored)
    assert sniff(path).container == "safetensors"


# open_clip -------------------------------------------------------------------------------------


@pytest.fixture
def tiny_clips(tmp_path: Path) -> Any:
    """Small configurations under names that open_clip knows, until the test ends."""
    import json

    before = dict(open_clip.factory._MODEL_CONFIGS)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 16, "image_size": 64}
    text = {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 64}
    timm_vision = {
        "timm_model_name": "test_vit",
        "timm_pool": "avg",
        "timm_proj": "linear",
        "image_size": 160,
    }
    configs = {
        "small-clip": {"embed_dim": 32, "vision_cfg": vision, "text_cfg": text},
        "small-siglip": {
            "embed_dim": 32,
            "init_logit_bias": -10,
            "custom_text": True,
            "vision_cfg": timm_vision,
            "text_cfg": text,
        },
    }
    for name, config in configs.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(config))
        open_clip.factory._MODEL_CONFIGS[name] = config
    yield configs
    open_clip.factory._MODEL_CONFIGS.clear()
    open_clip.factory._MODEL_CONFIGS.update(before)


def clips(path: Path, model: str, **args: Any) -> Tensors:
    return open_clip.create_model(model, pretrained=str(path), **args).state_dict()


@pytest.mark.parametrize("model", ["small-clip", "small-siglip"])
@pytest.mark.parametrize("suffix", ["safetensors", "bin", "pt"])
def test_open_clips_own_files(model: str, suffix: str, tiny_clips: Any, tmp_path: Path) -> None:
    stored = random_like(open_clip.create_model(model))
    path = tmp_path / f"open_clip_pytorch_model.{suffix}"
    if suffix == "safetensors":
        save_file(stored, path)
    elif suffix == "bin":
        torch.save(stored, path)
    else:  # its training script, in parallel
        wrapped = {f"module.{name}": tensor for name, tensor in stored.items()}
        torch.save({"epoch": 1, "name": "run", "state_dict": wrapped}, path)
    found = ours(entry(path, "open_clip", model))
    assert_same(found, clips(path, model))
    assert_same(found, stored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_open_clip_at_another_size_and_context(
    dtype: torch.dtype, tiny_clips: Any, tmp_path: Path
) -> None:
    """open_clip cannot resample a float16 file on a CPU: it is given the same values as float32."""
    path, args = tmp_path / "half.bin", {"force_image_size": 96, "force_context_length": 5}
    stored = {n: t.to(dtype) for n, t in random_like(open_clip.create_model("small-clip")).items()}
    torch.save(stored, path)
    found = ours(entry(path, "open_clip", "small-clip", **args))
    torch.save({name: tensor.float() for name, tensor in stored.items()}, tmp_path / "float.bin")
    assert_same(found, clips(tmp_path / "float.bin", "small-clip", **args))
    assert found["visual.positional_embedding"].shape == (37, 64)
    assert found["positional_embedding"].shape == (5, 32)


def test_what_open_clip_resamples_is_said(tiny_clips: Any, tmp_path: Path) -> None:
    path = tmp_path / "clip.bin"
    torch.save(random_like(open_clip.create_model("small-clip")), path)

    def notes(**args: Any) -> tuple[str, ...]:
        spec = entry(path, "open_clip", "small-clip", **args)
        module = build_module(spec)
        assert isinstance(module, nn.Module)
        return load_weights(module, spec).notes

    assert notes() == ()
    assert notes(force_image_size=96, force_context_length=5) == (
        "position embedding resampled from 4 x 4 to 6 x 6",
        "text position embedding resampled from 8 to 5 tokens",
    )


def test_open_clip_names_of_before_text_towers(tiny_clips: Any, tmp_path: Path) -> None:
    """A CLIP file into a model whose text tower is a module of its own."""
    path = tmp_path / "open_clip_pytorch_model.bin"
    torch.save(random_like(open_clip.create_model("small-clip")), path)
    args = {"force_custom_text": True}
    found = ours(entry(path, "open_clip", "small-clip", **args))
    assert_same(found, clips(path, "small-clip", **args))
    assert "text.positional_embedding" in found


def test_openais_settings_among_the_tensors_are_dropped(tiny_clips: Any, tmp_path: Path) -> None:
    stored = random_like(open_clip.create_model("small-clip"))
    settings = {"input_resolution": 64, "context_length": 8, "vocab_size": 64}
    path = tmp_path / "open_clip_model.safetensors"
    save_file(stored | {name: torch.tensor(value) for name, value in settings.items()}, path)
    assert_same(ours(entry(path, "open_clip", "small-clip")), stored)


def test_a_missing_logit_bias_is_not_made_up(tiny_clips: Any, tmp_path: Path) -> None:
    stored = random_like(open_clip.create_model("small-siglip"))
    del stored["logit_bias"]
    path = tmp_path / "open_clip_model.safetensors"
    save_file(stored, path)
    with pytest.raises(WeightsError, match="the file lacks logit_bias"):
        ours(entry(path, "open_clip", "small-siglip"))


# What is no checkpoint of weights --------------------------------------------------------------


class Program:
    """What a malicious pickle does when it is read: here it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path.with_suffix(".ran"),))


def scripted(path: Path) -> None:
    torch.jit.script(nn.Linear(2, 2)).save(str(path))


def with_code(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "hook": Program(path)}, path)


def with_numpy(path: Path) -> None:
    torch.save({"state_dict": {"a": torch.zeros(1)}, "best": np.float64(0.5)}, path)


def archive(path: Path) -> None:
    with path.open("wb") as file:
        np.savez(file, a=np.zeros(3))


def cut(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:2000])


REFUSED: list[tuple[Callable[[Path], None], str]] = [
    (scripted, r"TorchScript archive.*timm/vit_base_patch32_clip_224\.openai"),
    (with_code, r"needs code to be read: .*pathlib.*save the weights alone"),
    (with_numpy, r"needs code to be read: .*numpy.*save the weights alone"),
    (archive, r"NumPy archive.*safetensors"),
    (cut, r"cannot be read as a PyTorch checkpoint.*truncated"),
    (lambda path: torch.save([torch.zeros(1)], path), r"but a list.*state_dict\(\)"),
    (
        lambda path: torch.save({"teacher": {"a": torch.zeros(1)}, "epoch": 3}, path),
        r"but teacher \(dict\), epoch \(int\).*the one model",
    ),
]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")
@pytest.mark.parametrize(("write", "message"), REFUSED)
def test_what_is_not_weights_alone_is_refused(
    write: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    write(path := tmp_path / "model.pt")
    with pytest.raises(WeightsError, match=f"(?s){message}"):
        read_tensors(path)
    assert not path.with_suffix(".ran").exists()


def test_a_checkpoint_is_known_by_its_content(tmp_path: Path) -> None:
    """Its suffix says nothing: a .bin that is safetensors, a .safetensors that is a pickle."""
    tensors = {"a": torch.arange(3.0)}
    save_file(tensors, tmp_path / "pytorch_model.bin")
    torch.save(tensors, tmp_path / "model.safetensors")
    for name in ("pytorch_model.bin", "model.safetensors"):
        assert_same(read_tensors(tmp_path / name), tensors)


def test_an_entry_that_is_another_models_says_so(tmp_path: Path) -> None:
    model, args = VITS["resnet"]
    path = tmp_path / "model.safetensors"
    save_file(random_like(timm.create_model(model, **args)), path)
    vit, vit_args = VITS["augreg"]
    with pytest.raises(WeightsError, match="does not fit the model"):
        ours(replace(entry(path, "timm", vit, **vit_args)))
