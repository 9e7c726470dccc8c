"""Published linear heads: read from fabricated files of each layout, held to plain torch."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import save, save_file
from torch import Tensor, nn

import saebench
from saebench.api import config_of, source_of
from saebench.backbones import Backbone, load_backbone
from saebench.errors import SpecError, WeightsError
from saebench.fetch import fetch
from saebench.heads import head_in_use, readouts_identity
from saebench.identity import file_sha256
from saebench.linear_head import linear_readout
from saebench.plan import make_plan
from saebench.readouts import LinearHead
from saebench.registry import Registry
from saebench.runconfig import RunConfig
from saebench.showing import print_show
from saebench.specs import BackboneSpec, WeightsSpec
from saebench.units import Source
from saebench.weights import HeadFile
from tests.content import TASK
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub
from tests.small import WIDTH, setting

CLASSES = 48  # of shapes


def registry_of(*roots: Path) -> Registry:
    return Registry.load(list(roots))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return setting(tmp_path)


def published(root: Path, head: str = "", **weights: str) -> Registry:
    """The small backbone with a published head for shapes."""
    path = root / "registry/backbones/small.toml"
    said = "".join(f"{key} = '{value}'\n" for key, value in weights.items())
    path.write_text(
        path.read_text() + f"[head]\nfeatures = ['cls', 'patches']\n{head}\n"
        f"[head.linear.shapes]\n{said}"
    )
    return registry_of(root)


def readout(registry: Registry) -> tuple[Backbone, LinearHead]:
    spec = registry.buildable("small")
    backbone = load_backbone(spec, device="cpu")
    source: Source = source_of(registry.dataset("shapes"), config_of(train_limit=20))
    assert source.dataset is not None
    nothing: Any = None  # what is published needs no fitter
    return backbone, linear_readout(backbone, source.dataset, source, nothing, "published")


def tokens(backbone: Backbone, images_b3hw: Tensor) -> Tensor:
    """[b t d] after the final norm, by timm's own forward."""
    with torch.inference_mode():
        return backbone.model.module.forward_features(images_b3hw)  # type: ignore[operator]


def layer(c: int = CLASSES, d: int = 2 * WIDTH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(c, d, generator=generator), torch.randn(c, generator=generator)


IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("prefix", ["", "head.", "module.linear.", "safetensors:fc."])
def test_features_side_by_side(root: Path, prefix: str) -> None:
    """As `_LinearClassifierWrapper` of DINOv2 reads them."""
    weight, bias = layer()
    kind, _, prefix = prefix.rpartition(":")
    tensors = {f"{prefix}weight": weight, f"{prefix}bias": bias}
    path = root / "registry/backbones/head.pth"
    save_file(tensors, path) if kind else torch.save(tensors, path)
    backbone, head = readout(published(root, file="head.pth", sha256=file_sha256(path)))
    x = tokens(backbone, IMAGES)
    expected = torch.cat([x[:, 0], x[:, 1:].mean(dim=1)], dim=1) @ weight.T + bias
    found = head.logits(backbone.forward(IMAGES))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)
    assert found.dtype == torch.float64


def test_features_that_alternate(root: Path) -> None:
    """As DINO's eval_linear.py reads them, and writes beside an optimiser and a schedule."""
    weight, bias = layer()
    linear = nn.Linear(2 * WIDTH, CLASSES)
    module = nn.ModuleDict({"module": nn.ModuleDict({"linear": linear})})
    optimizer = torch.optim.SGD(module.parameters(), 0.001, momentum=0.9, weight_decay=0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=0)
    linear(torch.ones(2, 2 * WIDTH)).sum().backward()
    optimizer.step()
    schedule.step()
    linear.load_state_dict({"weight": weight, "bias": bias})
    checkpoint = {
        "epoch": 100,
        "state_dict": module.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scheduler": schedule.state_dict(),
        "best_acc": 78.162,
    }
    torch.save(checkpoint, root / "registry/backbones/linear.pth")
    backbone, head = readout(published(root, "interleaved = true", file="linear.pth"))
    x = tokens(backbone, IMAGES)
    output = x[:, 0]
    output = torch.cat((output.unsqueeze(-1), x[:, 1:].mean(dim=1).unsqueeze(-1)), dim=-1)
    expected = output.reshape(output.shape[0], -1) @ weight.T + bias
    found = head.logits(backbone.forward(IMAGES))
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        (dict(zip(("weight", "bias"), layer(d=WIDTH), strict=True)), "from 16 features to 48"),
        (dict(zip(("weight", "bias"), layer(c=10), strict=True)), "from 32 features to 10 classes"),
        ({"weight": layer()[0]}, "is no linear layer: it holds weight [48, 32]"),
        ({"weight": layer()[0].T.contiguous(), "bias": layer()[1]}, "is no linear layer"),
        ({"a.weight": layer()[0], "b.bias": layer()[1]}, "is no linear layer"),
        ({"weight": layer()[0], "bias": layer()[1], "norm": layer()[1]}, "is no linear layer"),
        ({"weight": layer()[0] * torch.nan, "bias": layer()[1]}, "NaN or infinite"),
        ({"weight": layer()[0].to(torch.int8), "bias": layer()[1]}, "holds no floats"),
    ],
)
def test_what_is_no_head_of_this_is_refused(
    root: Path, tensors: dict[str, Tensor], said: str
) -> None:
    save_file(tensors, root / "registry/backbones/head.safetensors")
    registry = published(root, file="head.safetensors")
    with pytest.raises(WeightsError) as refused:
        readout(registry)
    assert said in str(refused.value)
    assert "head.safetensors" in str(refused.value)


def test_one_that_is_not_there_says_how_to_get_it(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAEBENCH_WEIGHTS", str(tmp_path / "mine"))
    registry = published(root, file="head.pth", url="https://example.org/head.pth")
    with pytest.raises(WeightsError) as missing:
        readout(registry)
    assert "head.linear.shapes.file = 'head.pth' is not there" in str(missing.value)
    assert (
        f"get it from https://example.org/head.pth and put it at {tmp_path}/mine/head.pth"
        in str(missing.value)
    )
    (tmp_path / "mine").mkdir()
    weight, bias = layer()
    torch.save({"weight": weight, "bias": bias}, tmp_path / "mine/head.pth")
    assert torch.equal(readout(registry)[1].b_c, bias.double())


def test_another_file_than_declared_is_not_parsed(root: Path) -> None:
    (root / "registry/backbones/head.pth").write_bytes(b"\x80\x02not even a pickle")
    with pytest.raises(WeightsError, match=r"under \[head\.linear\.shapes\]"):
        readout(published(root, file="head.pth", sha256="0" * 64))


def test_a_table_that_names_no_file_or_none_of_a_hub(root: Path) -> None:
    with pytest.raises(SpecError, match=r"\[head\.linear\.shapes\] names no file"):
        readout(published(root, url="https://example.org/head.pth"))
    spec = registry_of().buildable("tiny-dinov2")
    head = replace(spec.head, linear={"digits": WeightsSpec(hub="owner/name")})
    with pytest.raises(SpecError, match=r"head\.linear\.digits\.hub needs a filename"):
        saebench.weights.wanted(HeadFile(replace(spec, head=head), "digits"))


def test_its_bytes_are_part_of_the_identity(root: Path) -> None:
    registry = published(root, file="head.pth")
    spec, dataset = registry.buildable("small"), registry.dataset("shapes")
    path = root / "registry/backbones/head.pth"
    with pytest.raises(WeightsError, match="is not there"):
        readouts_identity(spec, dataset, 20)
    torch.save(dict(zip(("weight", "bias"), layer(), strict=True)), path)
    found = readouts_identity(spec, dataset, 20)
    assert found == {
        "head": "published",
        "features": ["cls", "patches"],
        "interleaved": False,
        "weights": file_sha256(path),
    }
    assert readouts_identity(spec, dataset, 20, "probe")["head"] == "probe"
    assert head_in_use(spec, dataset, "linear") == "published"
    assert head_in_use(spec, registry.dataset("digits")) == "probe"


def test_a_run_without_it_fails_where_it_is_needed_alone(root: Path, tmp_path: Path) -> None:
    published(root, file="head.pth", url="https://example.org/head.pth")
    reading = TASK.replace("version = 1", 'version = 1\n    needs = ("readouts",)')
    reading = reading.replace('"rows"', '"reads"', 1)
    (root / "tasks/reads.py").write_text(reading.replace("class Rows", "class Reads"))
    run: Any = saebench.run
    with pytest.warns(
        UserWarning, match=r"small · reads was left out.*(?s:.)*example.org/head.pth"
    ):
        rows = run(
            registry=str(root),
            backbone="small",
            sae="identity",
            task=("rows", "reads"),
            limit=20,
            train_limit=20,
            device="cpu",
            out=str(tmp_path / "results"),
        )
    assert set(rows["task"]) == {"rows"}


def test_a_run_that_lacks_a_head_names_the_other_way(root: Path, tmp_path: Path) -> None:
    published(root, file="head.pth", url="https://example.org/head.pth")
    asked: Any = {"backbone": ("small",), "sae": ("identity",), "task": ("loss_substitution",)}
    registry = Registry.load([root])
    plan = make_plan(RunConfig(limit=20, **asked), registry, source_of)
    assert not plan.units
    (refusal,) = plan.refused
    assert "--option loss_substitution.head=probe" in str(refusal.error)
    probe = RunConfig(limit=20, **asked, option=("loss_substitution.head=probe",))
    plan = make_plan(probe, registry, source_of)
    assert plan.units
    assert not plan.refused


def test_fetch_and_show_say_where_it_is(root: Path) -> None:
    registry = published(root, file="head.pth", url="https://example.org/head.pth")

    def said(command: Callable[[Console], int]) -> tuple[int, str]:
        console = Console(file=io.StringIO(), width=300)
        code = command(console)
        return code, console.file.getvalue()  # type: ignore[attr-defined]

    def shown() -> tuple[int, str]:
        return said(lambda console: print_show(registry, "small", console))

    def fetched() -> tuple[int, str]:
        return said(lambda console: fetch(registry, ["small"], console))

    assert shown()[0] == 0
    assert "get it from https://example.org/head.pth" in shown()[1]
    assert fetched()[0] == 0
    assert "linear head of shapes: get it from https://example.org/head.pth" in fetched()[1]
    path = root / "registry/backbones/head.pth"
    torch.save(dict(zip(("weight", "bias"), layer(), strict=True)), path)
    assert f"sha256 {file_sha256(path)}" in shown()[1]
    assert f"{path}" in fetched()[1]
    assert "not here" not in fetched()[1]


def builtin_published() -> dict[str, BackboneSpec]:
    registry = registry_of()
    specs = [registry.backbone(name) for name in registry.backbones]
    return {spec.name: spec for spec in specs if spec.head.linear}


def test_the_published_heads_of_the_registry() -> None:
    """What facebookresearch/dinov2's hub/classifiers.py and dino's README name."""
    found = builtin_published()
    expected = {}
    for size in ("vits14", "vitb14", "vitl14"):
        for entry, name in ((f"dinov2-{size}", size), (f"dinov2-{size}-reg", f"{size}_reg4")):
            folder = f"https://dl.fbaipublicfiles.com/dinov2/dinov2_{size}"
            expected[entry] = f"{folder}/dinov2_{name}_linear_head.pth"
    dino = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain"
    expected["dino-vitb16"] = f"{dino}/dino_vitbase16_linearweights.pth"
    assert {name: spec.head.linear["imagenet-1k"].url for name, spec in found.items()} == expected
    imagenet = registry_of().dataset("imagenet-1k")
    for name, spec in found.items():
        weights = spec.head.linear["imagenet-1k"]
        assert weights.file == weights.url.rpartition("/")[2]
        assert spec.head.features == ("cls", "patches")
        assert spec.head.interleaved == (name == "dino-vitb16")
        assert head_in_use(spec, imagenet) == "published"


def test_one_of_a_hub_is_fetched_and_locked(root: Path, hub: HubStandIn) -> None:
    weight, bias = layer()
    data = save({"weight": weight, "bias": bias})
    commit = hub.commit("me/heads", {"small.safetensors": data})
    registry = published(root, hub="me/heads", filename="small.safetensors")
    console = Console(file=io.StringIO(), width=300)
    assert fetch(registry, ["small"], console) == 0
    assert isinstance(console.file, io.StringIO)
    assert f"small.safetensors of me/heads at {commit}" in console.file.getvalue()
    asked = len(hub.requests)
    assert torch.equal(readout(registry)[1].b_c, bias.double())
    spec, dataset = registry.buildable("small"), registry.dataset("shapes")
    identity = readouts_identity(spec, dataset, 20)
    assert identity["weights"] == hashlib.sha256(data).hexdigest()
    assert len(hub.requests) == asked
