"""Models whose configuration, weights and tokenizer lie in a repository."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import timm
import torch
from safetensors.torch import save
from torch import nn

from saebench import lock
from saebench.backbones import build_module
from saebench.backbones.checkpoint import load_weights
from saebench.backbones.open_clip_text import ClipText
from saebench.backbones.tokenizers import make_tokenizer
from saebench.errors import SpecError, WeightsError
from saebench.identity import file_sha256
from saebench.modelfiles import model_files, text_config, text_files
from saebench.plan import backbone_identity
from saebench.specs import BackboneSpec, HeadSpec, InputSpec, SaeSpec, SiteSpec, WeightsSpec
from saebench.weights import weights_path, weights_revision, weights_sha256
from saebench.whereabouts import whereabouts
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub

ARGS = {"embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 7}
CLIP: dict[str, Any] = {
    "model_cfg": {
        "embed_dim": 32,
        "quick_gelu": True,
        "vision_cfg": {
            "layers": 2,
            "width": 64,
            "head_width": 32,
            "patch_size": 16,
            "image_size": 64,
        },
        "text_cfg": {"layers": 1, "width": 32, "heads": 2, "context_length": 8, "vocab_size": 64},
    },
    "preprocess_cfg": {"mean": [0.5, 0.5, 0.5]},
}


def entry(loader: str, model: str, **fields: Any) -> BackboneSpec:
    return BackboneSpec(
        name="mine",
        path="mine.toml",
        family="vit",
        architecture="vit",
        pretraining="none",
        loader=loader,
        model=model,
        input=InputSpec(size=224),
        sites={"norm": SiteSpec(path="norm", width=48, cls=1, grid=(14, 14))},
        **fields,
    )


def loaded(spec: BackboneSpec) -> nn.Module:
    module = build_module(spec)
    assert isinstance(module, nn.Module)
    load_weights(module, spec)
    return module


def small_vit(folder: Path) -> nn.Module:
    """A timm model, saved by timm's own function as it puts models on the hub."""
    module: Any = timm.create_model("vit_tiny_patch16_224", **ARGS)
    timm.models.save_for_hf(module, folder, model_args=ARGS, safe_serialization=True)
    assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors"}
    return module


@pytest.fixture
def vit(hub: HubStandIn, tmp_path: Path) -> nn.Module:
    """A timm model, in the repository me/vit."""
    module = small_vit(tmp_path / "saved")
    hub.commit("me/vit", {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    return module


@pytest.fixture
def clip(hub: HubStandIn) -> nn.Module:
    """An open_clip model, in the repository me/clip."""
    module = open_clip.model.CLIP(**CLIP["model_cfg"])
    files = {
        "open_clip_config.json": json.dumps(CLIP).encode(),
        "open_clip_model.safetensors": save(module.state_dict()),
        "README.md": b"",
    }
    hub.commit("me/clip", files)
    return module


def same(found: nn.Module, wanted: nn.Module) -> None:
    state = wanted.state_dict()
    assert found.state_dict().keys() == state.keys()
    assert all(torch.equal(found.state_dict()[name], state[name]) for name in state)


# Configuration and weights ----------------------------------------------------------------------


def test_a_timm_repository_needs_no_weights_table(vit: nn.Module, hub: HubStandIn) -> None:
    found = loaded(entry("timm", "hf-hub:me/vit"))
    same(found, vit)
    x = torch.randn(2, 3, 224, 224)
    assert torch.equal(found.eval()(x), vit.eval()(x))


def test_an_open_clip_repository_needs_no_weights_table(clip: nn.Module, hub: HubStandIn) -> None:
    found: Any = loaded(entry("open_clip", "hf-hub:me/clip"))
    same(found, clip)
    gelu = found.visual.transformer.resblocks[0].mlp.gelu
    assert isinstance(gelu, open_clip.transformer.QuickGELU)


def test_model_args_go_on_top_of_the_configuration(vit: nn.Module, hub: HubStandIn) -> None:
    found: Any = loaded(entry("timm", "hf-hub:me/vit", model_args={"num_classes": 0}))
    assert isinstance(found.head, nn.Identity)


def test_configuration_and_weights_are_of_one_commit(vit: nn.Module, hub: HubStandIn) -> None:
    spec = entry("timm", "hf-hub:me/vit")
    first = hub.repo("me/vit").refs["main"]
    build_module(spec)
    hub.commit("me/vit", {"config.json": b"{}", "model.safetensors": b"other"})
    same(loaded(spec), vit)
    assert weights_revision(spec) == first


@pytest.mark.parametrize("where", ["model", "weights"])
def test_a_revision_holds_for_both(where: str, vit: nn.Module, hub: HubStandIn) -> None:
    first = hub.repo("me/vit").refs["main"]
    hub.commit("me/vit", {"config.json": b"{}", "model.safetensors": b"other"})
    if where == "model":
        spec = entry("timm", f"hf-hub:me/vit@{first}")
    else:
        spec = entry("timm", "hf-hub:me/vit", weights=WeightsSpec(revision=first))
    same(loaded(spec), vit)
    both = replace(spec, model="hf-hub:me/vit@v1", weights=WeightsSpec(revision=first))
    with pytest.raises(SpecError, match="keep one of them"):
        build_module(both)


def test_weights_of_ones_own_beside_a_repositorys_configuration(
    vit: nn.Module, hub: HubStandIn, tmp_path: Path
) -> None:
    other = timm.create_model("vit_tiny_patch16_224", **ARGS)
    (tmp_path / "mine.safetensors").write_bytes(save(other.state_dict()))
    weights = WeightsSpec(file="mine.safetensors")
    spec = replace(entry("timm", "hf-hub:me/vit", weights=weights), path=str(tmp_path / "a.toml"))
    same(loaded(spec), other)


def test_the_configuration_is_part_of_what_a_backbone_is(vit: nn.Module, hub: HubStandIn) -> None:
    spec = entry("timm", "hf-hub:me/vit")
    identity = backbone_identity(spec, "norm")
    config = hub.repo("me/vit").commits[weights_revision(spec)]["config.json"]
    assert identity["model_files"] == {"config.json": hashlib.sha256(config).hexdigest()}
    assert identity["weights"] == weights_sha256(spec)
    assert not any("/cdn/" in path for path in hub.gets())  # the weights stayed where they are


def test_a_folder_of_ones_own_for_timm(tmp_path: Path) -> None:
    module = small_vit(tmp_path / "vit")
    weights = WeightsSpec(file="vit/model.safetensors")
    spec = replace(entry("timm", "local-dir:vit", weights=weights), path=str(tmp_path / "a.toml"))
    same(loaded(spec), module)
    assert model_files(spec) == {"config.json": file_sha256(tmp_path / "vit" / "config.json")}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "dinov2", "architectures": ["Dinov2Model"]}, "names no architecture"),
        ({"architecture": "vit_of_tomorrow"}, "'vit_of_tomorrow', which this timm"),
    ],
)
def test_a_configuration_that_is_not_timms(
    config: dict[str, Any], message: str, hub: HubStandIn
) -> None:
    hub.commit("me/x", {"config.json": json.dumps(config).encode(), "model.safetensors": b"x"})
    with pytest.raises(SpecError, match=message):
        build_module(entry("timm", "hf-hub:me/x"))


def test_a_repository_without_a_configuration(hub: HubStandIn) -> None:
    hub.commit("me/x", {"model.safetensors": b"x"})
    with pytest.raises(WeightsError, match=r"open_clip_config\.json of me/x: there is no such"):
        build_module(entry("open_clip", "hf-hub:me/x"))


def test_what_a_loader_of_ones_own_makes_of_a_name_is_its_own_affair(hub: HubStandIn) -> None:
    spec = entry("package.module:function", "hf-hub:me/vit")
    assert model_files(spec) == {}
    assert weights_sha256(spec) is None
    assert hub.requests == []


def test_text_towers_of_another_library_are_refused() -> None:
    with pytest.raises(SpecError, match="'roberta-base', which is not read here"):
        build_module(entry("open_clip", "roberta-ViT-B-32"))


# What is said without asking --------------------------------------------------------------------


def test_whereabouts_ask_nobody(vit: nn.Module, hub: HubStandIn) -> None:
    spec, commit = entry("timm", "hf-hub:me/vit"), hub.repo("me/vit").refs["main"]

    def told(spec: BackboneSpec = spec) -> str:
        asked = len(hub.requests)
        found = whereabouts(spec)
        assert found is not None
        assert len(hub.requests) == asked
        return found.text

    assert "not resolved yet" in told()
    sha256 = weights_sha256(spec)
    assert f"not on this machine: model.safetensors of me/vit at {commit}" in told()
    assert f"sha256 {sha256}, locked" in told()
    path = weights_path(spec)
    assert path is not None
    assert "as locked" in told()
    assert f"me/vit at {commit}, {path.stat().st_size:,} bytes, sha256 {sha256}" in told()
    pinned = WeightsSpec(revision=commit, filename="model.safetensors", sha256=sha256)
    assert "as declared" in told(replace(spec, weights=pinned))
    path.resolve().write_bytes(b"damaged")
    wrong = whereabouts(spec)
    assert wrong is not None
    assert wrong.wrong
    assert f"NOT what is locked ({sha256})" in wrong.text


def test_an_sae_of_a_repository(hub: HubStandIn) -> None:
    commit = hub.commit("me/saes", {"relu/sae.safetensors": b"weights", "model.safetensors": b"x"})
    sae = SaeSpec(name="vit/x", backbone="vit", site="norm", weights=WeightsSpec(hub="me/saes"))
    with pytest.raises(WeightsError, match=r"vit/x: weights\.hub needs a filename.*not known"):
        weights_sha256(sae)
    sae = replace(sae, weights=WeightsSpec(hub="me/saes", filename="relu/sae.safetensors"))
    assert weights_sha256(sae) == hashlib.sha256(b"weights").hexdigest()
    assert weights_revision(sae) == commit
    path = weights_path(sae)
    assert path is not None
    assert path.read_bytes() == b"weights"


# Tokenizers -------------------------------------------------------------------------------------


def word_tokenizer() -> bytes:
    """tokenizer.json of a small vocabulary of words, with </s> at the end of each text."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2, "a": 3, "photo": 4, "of": 5, "bird": 6}
    special = [
        {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": True}
        for i, name in enumerate(("<pad>", "</s>", "<unk>"))
    ]  # fmt: skip
    end = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    text = {"Sequence": {"id": "A", "type_id": 0}}
    pair = [text, end, {"Sequence": {"id": "B", "type_id": 0}}, end]
    content = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [text, end],
            "pair": pair,
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"},
    }
    return json.dumps(content).encode()


SIGLIP = json.loads(json.dumps(CLIP))
SIGLIP["model_cfg"]["text_cfg"] |= {
    "hf_tokenizer_name": "me/words",
    "tokenizer_kwargs": {"clean": "canonicalize"},
}


@pytest.fixture
def siglip(hub: HubStandIn) -> BackboneSpec:
    """A model whose tokenizer lies in a repository of its own, as SigLIP's."""
    module = open_clip.model.CLIP(**CLIP["model_cfg"])
    hub.commit(
        "me/siglip",
        {
            "open_clip_config.json": json.dumps(SIGLIP).encode(),
            "open_clip_model.safetensors": save(module.state_dict()),
        },
    )
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    hub.commit(
        "me/words",
        {
            "tokenizer.json": word_tokenizer(),
            "tokenizer_config.json": json.dumps(settings).encode(),
            "special_tokens_map.json": b'{"pad_token": "<pad>"}',
            "spiece.model": b"not needed beside tokenizer.json",
            "README.md": b"",
        },
    )
    return entry("open_clip", "hf-hub:me/siglip", head=HeadSpec(kind="zero_shot"))


def test_a_tokenizers_files_are_fetched_and_locked(siglip: BackboneSpec, hub: HubStandIn) -> None:
    folder = text_files(siglip)
    assert folder is not None
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(path.name for path in folder.iterdir()) == names
    locked = [asked.file for asked in lock.everything() if asked.repo == "me/words"]
    assert sorted(locked) == names
    asked = len(hub.requests)
    assert text_files(siglip) == folder
    assert len(hub.requests) == asked


def test_a_tokenizers_files_are_part_of_what_a_backbone_is(
    siglip: BackboneSpec, hub: HubStandIn
) -> None:
    words = hub.repo("me/words").commits[hub.repo("me/words").refs["main"]]
    found = model_files(siglip)
    names = ["special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(found) == sorted([*names, "open_clip_config.json"])
    for name in names:
        assert found[name] == hashlib.sha256(words[name]).hexdigest()
    altered = {**words, "tokenizer.json": words["tokenizer.json"].replace(b"photo", b"image")}
    hub.commit("me/words", altered)
    asked = len(hub.requests)
    assert model_files(siglip) == found  # locked
    assert len(hub.requests) == asked
    lock.lock_path().unlink()
    now = model_files(siglip)
    assert now["tokenizer.json"] == hashlib.sha256(altered["tokenizer.json"]).hexdigest()
    images = replace(siglip, head=HeadSpec(kind="none"))
    assert list(model_files(images)) == ["open_clip_config.json"]


def test_offline_a_tokenizer_that_is_not_here_is_said(
    siglip: BackboneSpec, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights_path(siglip)
    model_files(replace(siglip, head=HeadSpec(kind="none")))
    hub.use(monkeypatch, tmp_path, offline=True)
    with pytest.raises(WeightsError, match=r"(?s)me/words.*OFFLINE.*saebench fetch mine"):
        model_files(siglip)


def test_offline_a_tokenizer_that_another_program_fetched(
    siglip: BackboneSpec, hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import hf_hub_download

    names = ["special_tokens_map.json", "spiece.model", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        hf_hub_download("me/words", name)
    model_files(replace(siglip, head=HeadSpec(kind="none")))
    hub.use(monkeypatch, tmp_path, offline=True)
    assert set(model_files(siglip)) == {*names, "open_clip_config.json"} - {"spiece.model"}


def test_the_tokenizer_of_a_model_that_open_clip_ships_with(hub: HubStandIn) -> None:
    files = {"tokenizer.json": b"{}", "tokenizer_config.json": b"{}", "model.safetensors": b"x"}
    commit = hub.commit("timm/ViT-B-16-SigLIP", files)
    hub.commit("timm/ViT-B-16-SigLIP", {**files, "tokenizer.json": b"{ }"})
    spec = entry("open_clip", "ViT-B-16-SigLIP", head=HeadSpec(kind="zero_shot"))
    sha256 = {data: hashlib.sha256(data).hexdigest() for data in (b"{}", b"{ }")}
    assert model_files(spec) == {
        "tokenizer.json": sha256[b"{ }"],
        "tokenizer_config.json": sha256[b"{}"],
    }
    # In the repository of the weights it is of their commit.
    pinned = replace(spec, weights=WeightsSpec(hub="timm/ViT-B-16-SigLIP", revision=commit))
    assert model_files(pinned)["tokenizer.json"] == sha256[b"{}"]
    assert model_files(entry("open_clip", "ViT-B-32", head=HeadSpec(kind="zero_shot"))) == {}


@pytest.mark.parametrize("name", ["ViT-B-16-SigLIP", "ViT-B-32", "coca_ViT-B-32"])
def test_open_clips_own_configurations_are_read_without_it(name: str) -> None:
    config = open_clip.get_model_config(name)
    assert config is not None
    assert text_config(entry("open_clip", name)) == config["text_cfg"]


def test_planning_with_a_model_of_open_clips_imports_neither_it_nor_torch() -> None:
    code = (
        "import sys\n"
        "from saebench.modelfiles import text_config\n"
        "from saebench.registry import Registry\n"
        "spec = Registry.load([]).backbone('siglip-vit-b16')\n"
        "print(text_config(spec)['hf_tokenizer_name'], {'torch', 'open_clip'} & set(sys.modules))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "timm/ViT-B-16-SigLIP set()", done.stderr


def test_a_vocabulary_of_a_repository(hub: HubStandIn) -> None:
    """open_clip itself would look for it in the current folder."""
    config = json.loads(json.dumps(CLIP))
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": "vocab/bpe.txt.gz"}
    bpe = gzip.compress(b"#version\nh i")
    files = {"open_clip_config.json": json.dumps(config).encode(), "vocab/bpe.txt.gz": bpe}
    hub.commit("me/small", files)
    spec = entry("open_clip", "hf-hub:me/small", head=HeadSpec(kind="zero_shot"))
    assert {name: hashlib.sha256(data).hexdigest() for name, data in files.items()} == (
        model_files(spec)
    )
    assert make_tokenizer(spec).vocab_size == 512 + 1 + 2  # bytes, the merge, start and end


@pytest.mark.parametrize("name", ["vocab/bpe.txt.gz", "my.bpe"])
def test_a_folder_is_what_of_it_is_read(name: str, tmp_path: Path) -> None:
    config = json.loads(json.dumps(CLIP))
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"bpe_path": name}
    folder = tmp_path / "clip"
    (folder / name).parent.mkdir(parents=True)
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    spec = replace(entry("open_clip", "local-dir:clip"), path=str(tmp_path / "a.toml"))
    with pytest.raises(SpecError, match=r"(?s)no vocabulary .*clip.*bpe_path is relative to"):
        model_files(spec)
    (folder / name).write_bytes(gzip.compress(b"#version\nh i"))
    found = model_files(spec)
    assert set(found) == {"open_clip_config.json", name}
    for other in ("results.json", "notes.txt", "tokenizer.json", "more.gz"):
        (folder / other).write_text("{}")
    assert model_files(spec) == found
    (folder / name).write_bytes(gzip.compress(b"#version\nh o"))
    assert model_files(spec)[name] != found[name]
    assert model_files(spec)[name] == file_sha256(folder / name)


def test_a_folder_with_a_tokenizer_is_that_tokenizer_too(tmp_path: Path) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps(SIGLIP))
    for name in ("tokenizer.json", "tokenizer_config.json", "results.json"):
        (folder / name).write_text("{}")
    spec = replace(entry("open_clip", "local-dir:clip"), path=str(tmp_path / "a.toml"))
    names = {"open_clip_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert set(model_files(spec)) == names


@pytest.mark.parametrize("text", ["{", "[]", '{"model_cfg": {"text_cfg": 3}}'])
def test_a_configuration_that_cannot_be_read(text: str, tmp_path: Path) -> None:
    (tmp_path / "open_clip_config.json").write_text(text)
    spec = replace(entry("open_clip", "local-dir:."), path=str(tmp_path / "a.toml"))
    with pytest.raises(SpecError, match=r"open_clip_config\.json is no configuration of open_clip"):
        model_files(spec)


def test_images_need_no_tokenizer(siglip: BackboneSpec, hub: HubStandIn) -> None:
    ClipText(loaded(siglip), siglip)
    assert not any(asked.repo == "me/words" for asked in lock.everything())
    assert not any("me/words" in request.path for request in hub.requests)


def test_texts_without_transformers_say_what_to_install(
    siglip: BackboneSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("saebench.backbones.tokenizers.find_spec", lambda name: None)
    with pytest.raises(SpecError, match=r"(?s)transformers package.*saebench-vision\[siglip\]"):
        make_tokenizer(siglip)


@pytest.mark.interop
def test_texts_become_the_tokens_of_that_tokenizer(siglip: BackboneSpec, hub: HubStandIn) -> None:
    """Lower case and no punctuation by clean = "canonicalize"; padded to the context with 0."""
    pytest.importorskip("transformers")
    text = ClipText(loaded(siglip), siglip)
    tokens = text.tokenizer(["A photo, of a BIRD!", "bird"])
    assert tokens.tolist() == [[3, 4, 5, 3, 6, 1, 0, 0], [6, 1, 0, 0, 0, 0, 0, 0]]
    embedded = text.encode(["a bird"])
    assert torch.allclose(embedded.norm(dim=-1), torch.ones(1))


@pytest.mark.interop
def test_a_tokenizer_of_another_vocabulary(siglip: BackboneSpec, hub: HubStandIn) -> None:
    pytest.importorskip("transformers")
    model: Any = loaded(siglip)
    text = ClipText(model, siglip)
    model.vocab_size = 5
    with pytest.raises(SpecError, match="gives the token 6, and the text tower embeds 5"):
        text.encode(["bird"])


@pytest.mark.interop
def test_a_folder_of_ones_own_brings_its_tokenizer(
    siglip: BackboneSpec, hub: HubStandIn, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "open_clip_config.json").write_text(json.dumps(SIGLIP))
    words = hub.repo("me/words")
    for name, data in words.commits[words.refs["main"]].items():
        (tmp_path / "mine" / name).write_bytes(data)
    spec = replace(siglip, model="local-dir:mine", path=str(tmp_path / "mine.toml"))
    hub.requests.clear()
    assert make_tokenizer(spec)(["bird"]).tolist() == [[6, 1, 0, 0, 0, 0, 0, 0]]
    assert hub.requests == []


@pytest.mark.interop
@pytest.mark.slow
def test_fetched_ahead_texts_are_encoded_without_a_network(
    siglip: BackboneSpec, hub: HubStandIn, tmp_path: Path
) -> None:
    pytest.importorskip("transformers")
    folder = tmp_path / "registry" / "backbones"
    folder.mkdir(parents=True)
    (folder / "mine.toml").write_text(
        'family = "clip"\narchitecture = "vit"\npretraining = "siglip"\n'
        'loader = "open_clip"\nmodel = "hf-hub:me/siglip"\nsite = "norm"\n'
        '[input]\nsize = 64\n[sites.norm]\npath = "visual.ln_post"\nwidth = 64\n'
        'layout = "pooled"\n[head]\nkind = "zero_shot"\n'
    )
    code = (
        "from saebench.registry import Registry\n"
        "from saebench.backbones.tokenizers import make_tokenizer\n"
        f"spec = Registry.load([{str(tmp_path)!r}]).backbone('mine')\n"
        "print(make_tokenizer(spec)(['bird']).tolist())\n"
    )
    env = hub.env(tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    fetch = [sys.executable, "-m", "saebench", "fetch", "mine", "--registry", str(tmp_path)]
    done = subprocess.run(fetch, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hub.requests.clear()
    offline = env | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=offline, capture_output=True, text=True)
    assert done.stdout.strip() == "[[6, 1, 0, 0, 0, 0, 0, 0]]", done.stderr
    assert hub.requests == []
