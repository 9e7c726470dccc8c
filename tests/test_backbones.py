"""Activations and outputs are the upstream library's own, and a pass resumes where it stopped."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from saebench.backbones import Backbone, load_backbone, timm_models
from saebench.errors import SpecError
from saebench.specs import BackboneSpec, InputSpec, SiteSpec, WeightsSpec
from tests.backbone_cases import CASES, backbone_of, images, load, randomise, spec_of, upstream

ALL = pytest.mark.parametrize("name", CASES)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("backbones")


def images_of(name: str) -> Tensor:
    return images(size=CASES[name].size)


def upstream_of(name: str, folder: Path) -> Any:
    """The same model made by the library alone, in evaluation mode."""
    return upstream(CASES[name], folder / name)


def hooked_upstream(model: nn.Module, site: SiteSpec, run: Any) -> Tensor:
    """What a plain forward hook sees, as [b t d]: the reference that every paper's code uses."""
    seen: list[Any] = []
    module = model.get_submodule(site.path)
    if site.side == "input":
        handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0].clone()))
    else:

        def keep(_: nn.Module, __: Any, output: Any) -> None:
            output = output[0] if isinstance(output, tuple) else output
            seen.append(output.clone())

        handle = module.register_forward_hook(keep)
    with torch.inference_mode():
        run()
    handle.remove()
    (x,) = seen
    if site.layout == "map":
        b, d, h, w = x.shape
        return x.permute(0, 2, 3, 1).reshape(b, h * w, d)
    return x.reshape(len(x), -1, x.shape[-1])


@ALL
def test_forward_equals_the_librarys_own(name: str, folder: Path) -> None:
    backbone, x = backbone_of(name, folder), images_of(name)
    model = upstream_of(name, folder)
    output = backbone.forward(x)
    with torch.inference_mode():
        if CASES[name].loader == "timm":
            features = model.forward_features(x)
            assert torch.equal(output.embedding_bd, model.forward_head(features, pre_logits=True))
            if CASES[name].model_args.get("num_classes", 1000) == 0:
                assert output.logits_bc is None
            else:
                assert output.logits_bc is not None
                assert torch.equal(output.logits_bc, model(x))
        else:
            assert torch.equal(output.embedding_bd, model.encode_image(x))
            assert output.logits_bc is None


@ALL
def test_acts_equal_a_plain_forward_hook_of_the_library(name: str, folder: Path) -> None:
    backbone, x = backbone_of(name, folder), images_of(name)
    model = upstream_of(name, folder)
    run = (lambda: model(x)) if CASES[name].loader == "timm" else (lambda: model.encode_image(x))
    captures = backbone.acts(x, list(backbone.spec.sites))
    for site_name, site in backbone.spec.sites.items():
        acts_btd = captures[site_name].acts_btd
        assert acts_btd.shape == (3, site.tokens, site.width)
        assert torch.equal(acts_btd, hooked_upstream(model, site, run)), site_name


@ALL
def test_resume_equals_the_full_forward_bit_for_bit(name: str, folder: Path) -> None:
    backbone, x = backbone_of(name, folder), images_of(name)
    full = backbone.forward(x)
    for site, capture in backbone.acts(x, list(backbone.spec.sites)).items():
        # A reconstruction is a new, contiguous tensor, whatever the captured one was.
        acts_btd = capture.acts_btd.clone(memory_format=torch.contiguous_format)
        before = acts_btd.clone()
        output = backbone.resume(site, acts_btd, capture.state)
        assert torch.equal(output.embedding_bd, full.embedding_bd), site
        if full.logits_bc is not None:
            assert output.logits_bc is not None
            assert torch.equal(output.logits_bc, full.logits_bc), site
        assert torch.equal(acts_btd, before), f"{site}: the given activations were overwritten"


@ALL
def test_resume_equals_an_override_in_the_library(name: str, folder: Path) -> None:
    """Changed activations: the same as a hook that replaces the module's output upstream."""
    backbone, x = backbone_of(name, folder), images_of(name)
    model = upstream_of(name, folder)
    for site_name, site in backbone.spec.sites.items():
        if site.side == "input" or site.layout == "pooled":
            continue
        capture = backbone.acts(x, [site_name])[site_name]
        changed_btd = 0.5 * capture.acts_btd + 0.1

        def change(_: nn.Module, __: Any, output: Any) -> Any:
            if isinstance(output, tuple):
                return (0.5 * output[0] + 0.1, *output[1:])
            return 0.5 * output + 0.1

        handle = model.get_submodule(site.path).register_forward_hook(change)
        with torch.inference_mode():
            wanted = model(x) if CASES[name].loader == "timm" else model.encode_image(x)
        handle.remove()
        output = backbone.resume(site_name, changed_btd, capture.state)
        found = output.embedding_bd if output.logits_bc is None else output.logits_bc
        assert torch.equal(found, wanted), site_name
        clean = backbone.forward(x)
        assert not torch.equal(output.embedding_bd, clean.embedding_bd), site_name


@ALL
def test_sites_in_any_order_are_the_same(name: str, folder: Path) -> None:
    backbone, x = backbone_of(name, folder), images_of(name)
    names = list(backbone.spec.sites)
    captures = backbone.acts(x, names)
    backwards = backbone.acts(x, names[::-1])
    assert list(backwards) == names[::-1]
    for site in names:
        alone = backbone.acts(x, [site])[site]
        assert torch.equal(captures[site].acts_btd, backwards[site].acts_btd)
        assert torch.equal(captures[site].acts_btd, alone.acts_btd)


@pytest.mark.parametrize("name", ["vit", "vit-registers", "resnet-bottleneck", "clip"])
def test_only_what_is_needed_runs(name: str, folder: Path) -> None:
    """A pass ends at the last site asked for, and a resumed one runs only what comes after it."""
    backbone, x = backbone_of(name, folder), images_of(name)
    ran: list[str] = []
    modules = dict(backbone.model.module.named_modules())
    everything = {path for step in backbone.model.steps for path in step.modules} & set(modules)
    handles = [
        modules[path].register_forward_hook(lambda *_, path=path: ran.append(path))
        for path in everything
    ]
    try:
        for site, spec in backbone.spec.sites.items():
            if spec.kind != "bottleneck" or spec.side != "output":
                continue
            capture = backbone.acts(x, [site])[site]
            # How a map lies in memory is found once, at the first resume of one.
            backbone.resume(site, capture.acts_btd, capture.state)
            ran.clear()
            backbone.acts(x, [site])
            first = set(ran)
            ran.clear()
            backbone.resume(site, capture.acts_btd, capture.state)
            assert not first & set(ran), site
            assert first | set(ran) == everything, site
    finally:
        for handle in handles:
            handle.remove()


def test_a_bottleneck_is_not_copied(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    captures = backbone.acts(images(), ["all blocks", "blocks.2"])
    first, second = captures["all blocks"].acts_btd, captures["blocks.2"].acts_btd
    assert first.data_ptr() == second.data_ptr()
    assert captures["blocks.2"].state == {}


def test_a_branch_keeps_the_bottleneck_before_it(folder: Path) -> None:
    backbone = backbone_of("vit", folder)
    captures = backbone.acts(images(), ["blocks.1", "mlp"])
    (entry,) = captures["mlp"].state.values()
    assert torch.equal(entry, captures["blocks.1"].acts_btd)


def test_input_and_output_of_an_mlp_differ(folder: Path) -> None:
    captures = backbone_of("vit", folder).acts(images(), ["mlp", "mlp in"])
    assert not torch.equal(captures["mlp"].acts_btd, captures["mlp in"].acts_btd)


def test_patches_alone_at_the_last_block_cannot_change_a_model_that_reads_cls(
    folder: Path,
) -> None:
    backbone, x = backbone_of("vit", folder), images()
    capture = backbone.acts(x, ["blocks.2"])["blocks.2"]
    changed = capture.acts_btd.clone()
    changed[:, backbone.spec.sites["blocks.2"].kinds["patches"]] = 0.0
    output = backbone.resume("blocks.2", changed, capture.state)
    assert torch.equal(output.embedding_bd, backbone.forward(x).embedding_bd)


def test_resnet_stages_are_not_negative(folder: Path) -> None:
    captures = backbone_of("resnet-bottleneck", folder).acts(images(), ["layer1", "layer4"])
    assert all(capture.acts_btd.min() == 0 for capture in captures.values())


def test_a_map_is_read_row_by_row(folder: Path) -> None:
    backbone, x = backbone_of("resnet10t", folder), images()
    model = upstream_of("resnet10t", folder)
    with torch.inference_mode():
        layer1_bchw = model.layer1(model.maxpool(model.act1(model.bn1(model.conv1(x)))))
    acts_btd = backbone.acts(x, ["layer1"])["layer1"].acts_btd
    assert torch.equal(acts_btd[1, 8 * 3 + 5], layer1_bchw[1, :, 3, 5])


@pytest.mark.parametrize("name", ["resnet10t", "resnet-bottleneck"])
def test_a_channels_last_model_resumes_in_its_own_memory_format(name: str, folder: Path) -> None:
    contiguous = backbone_of(name, folder)
    upstream = upstream_of(name, folder).to(memory_format=torch.channels_last)
    x = images().contiguous(memory_format=torch.channels_last)
    model = timm_models.stepped(upstream)
    assert model is not None
    backbone = Backbone(contiguous.spec, model)
    full = backbone.forward(x)
    with torch.inference_mode():
        assert full.logits_bc is not None
        assert torch.equal(full.logits_bc, upstream(x))
    for site, capture in backbone.acts(x, list(backbone.spec.sites)).items():
        acts_btd = capture.acts_btd.clone(memory_format=torch.contiguous_format)
        output = backbone.resume(site, acts_btd, capture.state)
        assert torch.equal(output.embedding_bd, full.embedding_bd), site
        assert torch.equal(capture.acts_btd, acts_btd), site

    seen: list[Tensor] = []
    upstream.layer2[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    backbone.resume("layer1", torch.randn(3, 64, backbone.spec.sites["layer1"].width), {})
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "name",
    ["vit-registers", "resnet10t", "clip", "dinov3", "eva02", "convnext", "clip-resnet"],
)
def test_half_precision_computes_in_that_dtype(name: str, dtype: torch.dtype, folder: Path) -> None:
    whole = backbone_of(name, folder)
    half = load_backbone(whole.spec, dtype=dtype)
    x = images_of(name)
    full = half.forward(x)
    assert full.embedding_bd.dtype == dtype
    model = upstream_of(name, folder).to(dtype)
    with torch.inference_mode():
        run = model if whole.spec.loader == "timm" else model.encode_image
        found = full.embedding_bd if full.logits_bc is None else full.logits_bc
        assert torch.equal(found, run(x.to(dtype)))
    for site, capture in half.acts(x, list(whole.spec.sites)).items():
        assert capture.acts_btd.dtype == dtype
        output = half.resume(site, capture.acts_btd.float(), capture.state)  # from a float32 SAE
        assert torch.equal(output.embedding_bd, full.embedding_bd), site
    exact = whole.forward(x).embedding_bd
    error = (full.embedding_bd.float() - exact).norm() / exact.norm()
    assert 0 < error < 0.1


@pytest.mark.parametrize("name", ["dinov3", "eva02", "eva-learned-rotary"])
def test_rotary_tables_follow_a_model_to_another_dtype(name: str, folder: Path) -> None:
    backbone_of(name, folder)
    model = timm_models.stepped(upstream_of(name, folder), CASES[name].size)
    assert model is not None
    x, spec = images_of(name), backbone_of(name, folder).spec
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        backbone = Backbone(spec, model, dtype=dtype)
        with torch.inference_mode():
            wanted = model.module(x.to(dtype))
        capture = backbone.acts(x, ["blocks.0"])["blocks.0"]
        assert capture.state == {}
        output = backbone.resume("blocks.0", capture.acts_btd, capture.state)
        assert output.logits_bc is not None
        assert torch.equal(output.logits_bc, wanted)


def test_a_table_of_rotations_is_made_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DINOv3 takes any image size, so timm computes the table in every pass; here it is kept."""
    (folder / "dinov3").mkdir(exist_ok=True)
    backbone = load(CASES["dinov3"], folder / "dinov3")
    x = images_of("dinov3")
    capture = backbone.acts(x, ["blocks.0"])["blocks.0"]
    rope: Any = backbone.model.module.rope
    monkeypatch.setattr(rope, "get_embed", None)
    output = backbone.resume("blocks.0", capture.acts_btd, capture.state)
    monkeypatch.undo()
    assert torch.equal(output.embedding_bd, backbone.forward(x).embedding_bd)


def test_text_embeddings_equal_open_clips_own(folder: Path) -> None:
    backbone = backbone_of("clip", folder)
    model = upstream_of("clip", folder)
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder / 'clip' / 'clip'}")
    texts = ["a photo of a cat.", "Two  dogs", "ein Hund"]
    with torch.inference_mode():
        wanted = model.encode_text(tokenizer(texts), normalize=True)
    found = backbone.encode_text(texts)
    assert torch.equal(found, wanted)
    assert torch.allclose(found.norm(dim=-1), torch.ones(3))
    many = backbone.encode_text(texts * 100)
    assert torch.allclose(many, wanted.repeat(100, 1), atol=1e-6)
    assert backbone.logit_scale == pytest.approx(float(model.logit_scale.detach().exp()))
    assert backbone.logit_bias == 0.0


def test_the_logit_scale_is_that_of_the_weights_even_in_half_precision(folder: Path) -> None:
    whole = backbone_of("clip", folder)
    half = load_backbone(whole.spec, dtype=torch.bfloat16)
    assert half.logit_scale == whole.logit_scale
    assert half.encode_text(["a cat"]).dtype == torch.float32


def test_a_vocabulary_lies_beside_the_configuration(tmp_path: Path, monkeypatch: Any) -> None:
    """open_clip alone would look for `bpe_path` in the working directory."""
    spec = spec_of(CASES["clip"], tmp_path)
    config = json.loads((tmp_path / "clip/open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {
        "vocab_size": 516,
        "tokenizer_kwargs": {"bpe_path": "merges.txt.gz"},
    }
    (tmp_path / "clip/open_clip_config.json").write_text(json.dumps(config))
    with gzip.open(tmp_path / "clip/merges.txt.gz", "wt") as file:
        file.write("#version: 0.2\nc a\nca t</w>")
    model = randomise(open_clip.create_model(f"local-dir:{tmp_path / 'clip'}"))
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    backbone = load_backbone(spec)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert backbone.encode_text(["cat"]).shape == (1, 16)
    tokens = backbone.model.text.tokenizer(["cat"])[0]  # type: ignore[union-attr]
    assert tokens[:4].tolist() == [514, 513, 515, 0]  # start, the second merge, end

    (tmp_path / "clip/merges.txt.gz").write_bytes(gzip.compress(b"#version: 0.2\nc a\na t\nt t"))
    with pytest.raises(SpecError, match="517 entries, and the text tower embeds 516"):
        load_backbone(spec).encode_text(["cat"])


@pytest.mark.parametrize(
    ("model", "model_args", "site"),
    [
        (
            "vit_base_patch16_224",
            {"depth": 2, "weight_init": "skip"},
            SiteSpec(path="blocks.0", width=768, cls=1, grid=(14, 14)),
        ),
        ("resnet50", {}, SiteSpec(path="layer4", layout="map", width=2048, grid=(7, 7))),
    ],
)
def test_full_width(model: str, model_args: dict[str, Any], site: SiteSpec, tmp_path: Path) -> None:
    module = timm.create_model(model, pretrained=False, **model_args).eval()
    if model_args:  # the tokens and the position embedding are as the memory was
        with torch.no_grad():
            module.cls_token.zero_()
            module.pos_embed.zero_()
    save_file(module.state_dict(), tmp_path / "model.safetensors")
    spec = BackboneSpec(
        name=model,
        path=str(tmp_path / "x.toml"),
        family="vit",
        architecture=model,
        pretraining="none",
        loader="timm",
        model=model,
        model_args=model_args,
        weights=WeightsSpec(file="model.safetensors"),
        input=InputSpec(size=224),
        sites={"site": site},
    )
    backbone, x = load_backbone(spec), images(2, size=224)
    capture = backbone.acts(x, ["site"])["site"]
    output = backbone.resume("site", capture.acts_btd, capture.state)
    assert output.logits_bc is not None
    with torch.inference_mode():
        assert torch.equal(output.logits_bc, module(x))
