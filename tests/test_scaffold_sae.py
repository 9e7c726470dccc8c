"""`saebench new sae --from`: entries of any checkpoint, and what has to be said of it."""

from __future__ import annotations

import io
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from saebench import cli, load_sae
from saebench.errors import Mismatch, SpecError, UsageError, WeightsError
from saebench.formats import read_entry
from saebench.formats.facts import Missing
from saebench.identity import file_sha256
from saebench.registry import Registry
from saebench.scaffold.asking import answers, parse_fact, parse_facts, without_questions
from saebench.scaffold.sae import NewSae, new_sae
from saebench.scaffold.words import backbone_of, choose_backbone, site_of, tokens_of
from saebench.specs import SiteSpec
from tests import asking_format
from tests.asking_format import asking as asking
from tests.checkpoints import Case, cases, inputs, numbers, rows
from tests.content import BACKBONE, write
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub
from tests.small import LATENTS, WIDTH, add_sae, random_sae, setting


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return setting(tmp_path)


def new(root: Path, name: str | None, source: str | Path, **options: Any) -> NewSae:
    return new_sae(Registry.load([root]), name, str(source), out=str(root), **options)


def asks(root: Path, **meta: str) -> Path:
    """A checkpoint of the width of `small`."""
    W_ds, D_sd = numbers(WIDTH, LATENTS, seed=2), rows(LATENTS, WIDTH)
    return asking_format.write(root / "files/x.safetensors", W_ds, D_sd, **meta)


class Person:
    """Answers questions in order; a KeyboardInterrupt where there is no more answer."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), list[str]()

    def __call__(self, prompt: str) -> str:
        self.asked.append(prompt)
        if not self.answers:
            raise KeyboardInterrupt
        return self.answers.pop(0)


def test_a_file_that_says_it_all(root: Path) -> None:
    file = root / "registry/saes/small/b.safetensors"
    made = new(root, "small/mine", file)
    assert not made.missing
    raw = tomllib.loads(made.path.read_text())
    assert raw["weights"] == {"file": "b.safetensors", "sha256": file_sha256(file)}
    assert (raw["backbone"], raw["site"], raw["tokens"]) == ("small", "blocks.1", "all")
    assert (raw["architecture"], raw["l0"]) == ("topk", 8.0)
    assert not {"format", "semantics"} & set(raw)
    assert read_entry(Registry.load([root]).sae("small/mine")).k == 8


def test_the_name_is_that_of_the_file_or_its_folder(root: Path) -> None:
    data = (root / "registry/saes/small/b.safetensors").read_bytes()
    for place in ("run one/sae.safetensors", "run two/a file.safetensors"):
        (root / place).parent.mkdir()
        (root / place).write_bytes(data)
    assert new(root, None, root / "run one", backbone="small").spec.name == "small/run-one"
    file = root / "run two/a file.safetensors"
    assert new(root, None, file, backbone="small").spec.name == "small/a-file"


def test_configurations_beside_are_declared(root: Path) -> None:
    data = (root / "registry/saes/small/b.safetensors").read_bytes()
    write(root, {"run/cfg.json": "{}", "run/config.json": "{ }"})
    (root / "run/sae.safetensors").write_bytes(data)
    made = new(root, "small/mine", root / "run")
    assert made.spec.weights.beside == {
        name: file_sha256(root / "run" / name) for name in ("cfg.json", "config.json")
    }
    spec = Registry.load([root]).sae("small/mine")
    assert read_entry(spec).k == 8
    (root / "run/cfg.json").write_text("{  }")
    with pytest.raises(WeightsError, match=r"cfg\.json is not the file that"):
        read_entry(spec)


def test_of_the_hub(root: Path, hub: HubStandIn) -> None:
    data = (root / "registry/saes/small/b.safetensors").read_bytes()
    commit = hub.commit("me/saes", {"l1/sae.safetensors": data, "l1/cfg.json": b"{}"})
    made = new(root, None, "hf-hub:me/saes/l1", backbone="small")
    assert made.spec.name == "small/l1"
    spec = Registry.load([root]).sae("small/l1")
    weights = spec.weights
    assert (weights.hub, weights.revision) == ("me/saes", commit)
    assert weights.filename == "l1/sae.safetensors"
    assert list(weights.beside) == ["cfg.json"]
    hub.commit("me/saes", {"l1/sae.safetensors": b"other"})
    assert read_entry(spec).k == 8


@pytest.mark.usefixtures("asking")
def test_what_is_missing_stands_in_the_entry(root: Path) -> None:
    made = new(root, "small/x", asks(root, threshold="1", scaling="zscore", norm="1"))
    assert [one.name for one in made.missing] == ["input", "threshold", "dictionary_norm"]
    text = made.path.read_text()
    assert tomllib.loads(text)["semantics"] == {}
    assert "\n# threshold = …   # asked: not stored; a number\n" in text
    assert '# dictionary_norm = …   # asked: how its rows were normalised; "l2" | "ide' in text
    filled = text.replace("# input = …", 'input = "raw"').replace(
        "# threshold = …", "threshold = 1"
    )
    made.path.write_text(filled.replace("# dictionary_norm = …", 'dictionary_norm = "l2"'))
    assert read_entry(Registry.load([root]).sae("small/x")).d_sae == LATENTS
    assert "asked" not in without_questions(text, [one.name for one in made.missing])
    assert without_questions(text, []) == text


@pytest.mark.usefixtures("asking")
def test_facts_that_are_typed(root: Path) -> None:
    file = asks(root, threshold="1", norm="1")
    made = new(root, "small/x", file, semantics={"threshold": 0.5, "dictionary_norm": "l2"})
    assert not made.missing
    assert made.spec.semantics == {"threshold": 0.5, "dictionary_norm": "l2"}
    assert tomllib.loads(made.path.read_text())["semantics"] == made.spec.semantics
    with pytest.raises(SpecError, match="one of l2, identity"):
        new(root, "small/y", file, semantics={"threshold": 0.5, "dictionary_norm": "l3"})
    with pytest.raises(SpecError, match="colour"):
        new(root, "small/y", file, semantics={"colour": 1})


@pytest.mark.usefixtures("asking")
def test_a_person_is_asked(root: Path) -> None:
    person = Person("input_mean = 0.5, input_std = 2", "", "l2", "0.25")
    file = asks(root, threshold="1", scaled="1", norm="1")
    made = new(root, "small/x", file, ask=person)
    assert not made.missing
    assert made.spec.semantics == {
        "input_mean": 0.5,
        "input_std": 2,
        "dictionary_norm": "l2",
        "threshold": 0.25,
    }
    assert '"l2" | "identity"' in person.asked[2]


@pytest.mark.usefixtures("asking")
def test_a_wrong_answer_is_asked_for_again(root: Path) -> None:
    person = Person("l3", "", "identity")
    made = new(root, "small/x", asks(root, norm="1"), ask=person)
    assert "one of l2, identity" in person.asked[1]
    assert made.spec.semantics == {"dictionary_norm": "identity"}


@pytest.mark.usefixtures("asking")
def test_no_answer_leaves_it_open(root: Path) -> None:
    made = new(root, "small/x", asks(root, norm="1"), ask=Person(""))
    assert [one.name for one in made.missing] == ["dictionary_norm"]


@pytest.mark.usefixtures("asking")
def test_an_interrupted_question_leaves_nothing(tmp_path: Path) -> None:
    root = setting(tmp_path / "content")
    file = asks(tmp_path, norm="1", threshold="1")
    with pytest.raises(KeyboardInterrupt):
        new_sae(
            Registry.load([root]), "small/x", str(file), out=str(tmp_path / "o"), ask=Person("1")
        )
    assert not (tmp_path / "o").exists()


@pytest.mark.usefixtures("asking")
def test_the_words_of_a_file(root: Path) -> None:
    words = {"model": "small", "hook": "blocks.1.hook_resid_post", "tokens": "cls_token_only"}
    made = new(root, None, asks(root, dataset="imagenet", **words))
    spec = made.spec
    assert (spec.name, spec.backbone, spec.site, spec.tokens) == (
        "small/x",
        "small",
        "blocks.1",
        "cls",
    )
    assert spec.trained_on == "imagenet"
    assert "#   tokens   cls_token_only" in made.path.read_text()


@pytest.mark.usefixtures("asking")
@pytest.mark.parametrize(
    ("meta", "said"),
    [
        ({}, "which backbone was it trained on.*--backbone NAME"),
        ({"model": "openai/smalls"}, "names the model 'openai/smalls'.*it may be: small"),
        ({"model": "small", "hook": "blocks.1.attn"}, "'blocks.1.attn': which site.*--site NAME"),
        ({"model": "small", "tokens": "some"}, "'some': which are they.*--tokens KINDS"),
    ],
)
def test_what_has_to_be_chosen(root: Path, meta: dict[str, str], said: str) -> None:
    with pytest.raises(UsageError, match=f"(?s){said}"):
        new(root, None, asks(root, **meta))
    assert not (root / "registry/saes/small/x.toml").exists()


def test_what_does_not_fit(root: Path) -> None:
    file = root / "registry/saes/small/a.safetensors"
    with pytest.raises(UsageError, match="--from FILE"):
        new_sae(Registry.load([root]), "small/x", None, out=str(root))
    with pytest.raises(UsageError, match="no such file"):
        new(root, "small/x", "absent")
    with pytest.raises(Mismatch, match=r"site 'blocks\.7'"):
        new(root, "small/x", file, site="blocks.7")
    with pytest.raises(Mismatch, match="has no 'registers'"):
        new(root, "small/x", file, tokens="registers")
    with pytest.raises(UsageError, match="is there already"):
        new(root, "small/a", file)
    wide = add_sae(root, "wide", random_sae(0, d=24))
    with pytest.raises(Mismatch, match=r"reads 24 dimensions, and the site 'blocks\.1'.*has 16"):
        new(root, "small/x", wide)
    (root / "page.pt").write_text("<html>")
    with pytest.raises(WeightsError, match="web page"):
        new(root, "small/x", root / "page.pt")


def test_an_sae_on_an_sae(root: Path) -> None:
    file = root / "registry/saes/small/meta.safetensors"
    made = new(root, "small/above", file, site="sae:small/b/codes")
    assert made.spec.site == "sae:small/b/codes"
    assert made.spec.l0 is not None
    assert "# its k; adds" in made.path.read_text()
    with pytest.raises(Mismatch, match=rf"reads {LATENTS} dim.* 'sae:small/b/decoder' has {WIDTH}"):
        new(root, "small/aside", file, site="sae:small/b/decoder")
    narrow = root / "registry/saes/small/b.safetensors"
    with pytest.raises(Mismatch, match=rf"reads {WIDTH} dim.* 'sae:small/b/codes' has {LATENTS}"):
        new(root, "small/aside", narrow, site="sae:small/b/codes")
    assert not (root / "registry/saes/small/aside.toml").exists()
    # Its codes are those of both SAEs together: how many is not in the file.
    on_decoder = new(root, "small/aside", narrow, site="sae:small/b/decoder")
    assert on_decoder.spec.l0 is None
    assert "\n# l0 = 16                       # as measured; adds" in on_decoder.path.read_text()


@pytest.mark.usefixtures("asking")
def test_an_unfinished_entry_is_completed_by_the_same_command(root: Path) -> None:
    file = asks(root, threshold="1", scaling="zscore", norm="1", model="small")
    path = new(root, "small/x", file).path
    first = path.read_text()
    assert new(root, None, file).path.read_text() == first
    made = new(root, "small/x", file, semantics={"threshold": 0.5})
    assert [one.name for one in made.missing] == ["input", "dictionary_norm"]
    by_hand = path.read_text().replace("# dictionary_norm = …", 'dictionary_norm = "l2"')
    path.write_text(by_hand)
    with pytest.raises(UsageError, match=r"threshold = 0\.6 is given, and .*x\.toml says 0\.5"):
        new(root, "small/x", file, semantics={"threshold": 0.6})
    made = new(root, None, file, semantics={"input": "raw"})
    assert not made.missing
    said = {"threshold": 0.5, "dictionary_norm": "l2", "input": "raw"}
    assert Registry.load([root]).sae("small/x").semantics == said
    assert read_entry(Registry.load([root]).sae("small/x")).d_sae == LATENTS
    with pytest.raises(UsageError, match="is there already"):
        new(root, "small/x", file)


@pytest.mark.usefixtures("asking")
def test_what_a_person_wrote_into_an_unfinished_entry_is_not_lost(root: Path) -> None:
    file = asks(root, threshold="1")
    path = new(root, "small/x", file).path
    for old, mine in (
        ('description = ""', 'description = "Mine."'),
        ("[weights]", "# A note.\n[weights]"),
        ('tokens = "all" ', 'tokens = "cls" '),
        ("# Written by  saebench new", "# Written by me, not by  saebench new"),
    ):
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, mine, 1))
        with pytest.raises(UsageError, match="is there already"):
            new(root, "small/x", file, semantics={"threshold": 0.5})
        assert path.read_text() == text.replace(old, mine, 1)
        path.write_text(text)


def test_an_unfinished_format_is_completed(root: Path, tmp_path: Path) -> None:
    case = next(case for case in cases() if case.stated and not case.semantics)
    backbone = BACKBONE.replace("width = 16", f"width = {case.d}")
    write(root, {"registry/backbones/narrow.toml": backbone})
    (tmp_path / "files").mkdir()
    file = case.write(tmp_path / "files")
    (question,) = new(root, "narrow/x", file).missing
    assert question.name == "format"
    made = new(root, "narrow/x", file, format=case.stated)
    assert (made.spec.format, made.missing) == (case.stated, ())


def test_a_place_that_cannot_be_written(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    file = root / "registry/saes/small/b.safetensors"
    for out in (tmp_path / "file", tmp_path / "file/x", "/proc/x"):
        for name in (("small/x",), ("--backbone", "small")):
            command = ("new", "sae", *name, "--from", file, "--registry", root, "--out", out)
            assert run(*command) == 1
            assert "cannot be written" in capsys.readouterr().err
        assert run("new", "task", "mine", "--out", out) == 1
        assert "cannot be written" in capsys.readouterr().err


# Words


def test_a_model_is_a_backbone_only_for_sure() -> None:
    registry = Registry.load()
    datacomp = "open-clip:laion/CLIP-ViT-B-32-DataComp.XL-s13B-b90K"
    for said, name in {
        datacomp: "clip-vit-b32-datacomp",
        "openai/clip-vit-base-patch16": "clip-vit-b16-openai",
        "vit_base_patch14_dinov2.lvd142m": "dinov2-vitb14",
        "hf-hub:imageomics/bioclip": "bioclip",
        "facebook/dinov2-base": "dinov2-vitb14",
        "tiny-vit": "tiny-vit",
    }.items():
        assert choose_backbone(said, registry) == name
    # Of OpenAI, of LAION, of DataComp: the architecture alone does not tell.
    sure, alike = backbone_of("ViT-B-16", registry)
    assert sure == ""
    assert {"clip-vit-b16-openai", "clip-vit-b16-laion2b"} <= set(alike)
    assert "clip-vit-b16-openai" in backbone_of("clip_vitb16", registry)[1]


def test_every_name_by_which_a_backbone_is_known_elsewhere_is_one() -> None:
    from saebench.scaffold.words import _ALSO

    assert set(_ALSO.values()) <= set(Registry.load().backbones)


@pytest.mark.parametrize(
    ("hook", "site"),
    [
        ("blocks.2", "blocks.2"),
        ("blocks.2.hook_resid_post", "blocks.2"),
        ("vision_model.encoder.layers.2", "blocks.2"),
        ("blocks.2.hook_mlp_out", ""),
        ("blocks.9", ""),
        ("layers.2.mlp", ""),
    ],
)
def test_a_hook_is_a_site_only_for_sure(hook: str, site: str) -> None:
    assert site_of(hook, Registry.load().backbone("tiny-vit")) == site


@pytest.mark.parametrize(
    ("words", "kinds"),
    [
        ("cls", "cls"),
        ("cls_token_only", "cls"),
        ("patches", "patches"),
        ("use_patches_only", "patches"),
        ("spatial", "patches"),
        ("cls and patches", "cls+patches"),
        ("all 50 tokens", ""),
        ("all patches", ""),
        ("patches only, no cls", ""),
        ("non-cls patches", ""),
        ("no cls", ""),
        ("registers", ""),
        ("pooled", ""),
    ],
)
def test_words_for_tokens(words: str, kinds: str) -> None:
    assert tokens_of(words, SiteSpec(path="x", width=4, cls=1, grid=(2, 2))) == kinds


def test_a_map_has_a_grid_where_others_have_patches() -> None:
    site = SiteSpec(path="x", width=4, layout="map", grid=(2, 2))
    assert tokens_of("patches", site) == "grid"


@pytest.mark.parametrize(
    ("text", "fact"),
    [
        ("k=32", ("k", 32)),
        ("input=raw", ("input", "raw")),
        ('input = "raw"', ("input", "raw")),
        ("threshold=0.5", ("threshold", 0.5)),
        ("strict=true", ("strict", True)),
        ("input_mean=[1, 2]", ("input_mean", [1, 2])),
    ],
)
def test_facts_as_they_are_typed(text: str, fact: tuple[str, Any]) -> None:
    assert parse_fact(text) == fact


@pytest.mark.usefixtures("asking")
@pytest.mark.parametrize("value", [True, [True] * WIDTH, [1.0] * (WIDTH - 1) + [False]])
def test_a_truth_is_no_number(root: Path, value: Any) -> None:
    with pytest.raises(SpecError, match="input_std has to be a number"):
        new(root, "small/x", asks(root, scaled="1"), semantics={"input_std": value})


def test_a_fact_that_is_typed_twice() -> None:
    assert parse_facts(["input_std=2", "k=3"]) == {"input_std": 2, "k": 3}
    with pytest.raises(UsageError, match="input_std is typed twice: 2 and 3"):
        parse_facts(["input_std=2", "input_std=3"])
    asked = Missing("input_std", "", "")
    with pytest.raises(UsageError, match="input_std is typed twice"):
        answers([asked], lambda _: "input_std = 2, input_std = 3")


@pytest.mark.parametrize("text", ["k", "=3", "k=", "a b=3"])
def test_no_fact(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        parse_fact(text)


# The command


def run(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.main(list(map(str, arguments)))
    assert isinstance(ended.value.code, int)
    return ended.value.code


@pytest.mark.usefixtures("asking")
def test_the_command_lists_what_is_missing_and_exits_with_1(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    command = ("new", "sae", "small/x", "--from", asks(root, threshold="1"), "--out", root)
    assert run(*command) == 1
    said = capsys.readouterr().out
    assert "threshold   not stored" in said
    assert f"saebench estimate small/x --registry {root}   finds input, threshold" not in said
    assert f"saebench estimate small/x --registry {root}   finds threshold" in said
    assert "or type the command again with --set NAME=VALUE" in said
    assert run(*command, "--set", "threshold=0.5") == 0
    assert Registry.load([root]).sae("small/x").semantics == {"threshold": 0.5}
    assert f"next: saebench check sae small/x --registry {root}" in capsys.readouterr().out


@pytest.mark.usefixtures("asking")
def test_the_command_asks_at_a_terminal(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal("0.5\n"))
    command = ("new", "sae", "small/x", "--from", asks(root, threshold="1"), "--out", root)
    assert run(*command) == 0
    assert Registry.load([root]).sae("small/x").semantics == {"threshold": 0.5}


@pytest.mark.usefixtures("asking")
def test_ctrl_c_at_a_question(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(prompt: str) -> NoReturn:
        raise KeyboardInterrupt

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stdin", Terminal())
    monkeypatch.setattr("builtins.input", interrupted)
    assert run("new", "sae", "small/x", "--from", asks(root, threshold="1"), "--out", root) == 130
    assert not (root / "registry/saes/small/x.toml").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sae", "small/x", "--weights", "f"), "an SAE: --from FILE"),
        (("backbone",), "a backbone needs a name"),
        (("task", "x", "--set", "k=3"), "not of a task"),
    ],
)
def test_options_of_another_kind(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("new", *arguments, "--out", tmp_path) == 2
    assert said in capsys.readouterr().err


# Every format


@pytest.mark.parametrize("case", cases(), ids=lambda case: case.name)
def test_an_entry_of_every_format(case: Case, tmp_path: Path) -> None:
    backbone = BACKBONE.replace("width = 16", f"width = {case.d}")
    root = write(tmp_path / "content", {"registry/backbones/narrow.toml": backbone})
    (tmp_path / "files").mkdir()
    file = case.write(tmp_path / "files")
    place = {"backbone": "narrow", "site": "blocks.1", "tokens": "all"}
    made = new(root, None, file, format=case.stated, semantics=case.semantics, **place)
    assert not made.missing
    spec = Registry.load([root]).sae(made.spec.name)
    sae, alone = read_entry(spec), load_sae(file, format=case.stated, **case.semantics)
    x_nd = inputs(case.d)
    assert torch.equal(sae.decode(sae.encode(x_nd)), alone.decode(alone.encode(x_nd)))
    assert {fact.source for fact in sae.record.facts} >= ({"entry"} if case.semantics else set())
    made.path.unlink()
    if case.semantics or case.stated:
        made = new(root, None, file, format=case.stated, **place)
        assert bool(made.missing) == bool(case.semantics)
        made.path.unlink()
    if case.stated:
        (question,) = new(root, None, file, **place).missing
        assert question.name == "format"
        assert f'"{case.stated}"' in question.choices
