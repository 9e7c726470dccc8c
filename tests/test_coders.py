from __future__ import annotations

import re
from pathlib import Path

import pytest

from saebench.coders import candidates, chain_of, choose
from saebench.errors import Mismatch, NotFound
from saebench.registry import Registry
from tests.content import BACKBONE, sae_entry, write


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry.load(
        [
            write(
                tmp_path / "mine",
                {
                    "registry/backbones/small.toml": BACKBONE,
                    "registry/backbones/other.toml": BACKBONE,
                    "registry/saes/small/a.toml": sae_entry(l0=4.0),
                    "registry/saes/small/b.toml": sae_entry(l0=8.2),
                    "registry/saes/small/c.toml": sae_entry(l0=7.9),
                    "registry/saes/small/slow.toml": sae_entry(l0=2.0, suite="full"),
                    "registry/saes/small/cls.toml": sae_entry(tokens="cls"),
                    "registry/saes/small/meta.toml": sae_entry(site="sae:small/a/codes"),
                },
            )
        ]
    )


def chosen(registry: Registry, *patterns: str, suite: str = "default") -> set[tuple[str, str]]:
    choice = choose(registry, [registry.backbone("small")], patterns, suite)
    refs = choice.refs["small"]
    assert not choice.refused
    return {(ref.name, ref.tokens) for ref in refs}


def test_by_default_all_saes_and_controls(registry: Registry) -> None:
    assert chosen(registry) == {
        *((name, "all") for name in ("small/a", "small/b", "small/c", "small/meta")),
        ("small/cls", "cls"),
        *((name, tokens) for name in ("identity", "zero", "mean") for tokens in ("all", "cls")),
        # one for each L0 in use: 2, 4 and 8 (8.2 and 7.9 round alike)
        ("pca-2", "all"),
        ("pca-4", "all"),
        ("pca-8", "all"),
        # derived from the SAE of median L0 of each token set
        ("small/b@random", "all"),
        ("small/b@shuffled-decoder", "all"),
        ("small/cls@random", "cls"),
        ("small/cls@shuffled-decoder", "cls"),
    }


def test_the_full_suite_adds_what_is_slow_and_every_derived_control(registry: Registry) -> None:
    full = chosen(registry, suite="full")
    assert ("small/slow", "all") in full
    assert {("small/a@random", "all"), ("small/b@shuffled-decoder", "all")} <= full


def test_a_place_of_the_full_suite_alone_is_left_to_it(tmp_path: Path) -> None:
    files = {
        "registry/backbones/small.toml": BACKBONE,
        "registry/saes/small/a.toml": sae_entry(l0=4.0),
        "registry/saes/small/sweep.toml": sae_entry(tokens="cls", l0=2.0, suite="full"),
    }
    with_default = Registry.load([write(tmp_path / "with", files)])
    plain = {(name, "all") for name in ("identity", "zero", "mean", "pca-4")}
    derived = {("small/a@random", "all"), ("small/a@shuffled-decoder", "all")}
    assert chosen(with_default) == {("small/a", "all"), *plain, *derived}
    assert ("pca-2", "cls") in chosen(with_default, suite="full")
    assert ("identity", "cls") in chosen(with_default, "identity")
    # Where no SAE is of the default suite, controls alone, at the backbone's own site.
    del files["registry/saes/small/a.toml"]
    without = Registry.load([write(tmp_path / "without", files)])
    assert chosen(without) == {(name, "all") for name in ("identity", "zero", "mean")}


def test_names_globs_and_controls(registry: Registry) -> None:
    assert chosen(registry, "small/a") == {("small/a", "all")}
    assert chosen(registry, "identity") == {("identity", "all"), ("identity", "cls")}
    assert chosen(registry, "small/b@random") == {("small/b@random", "all")}
    assert chosen(registry, "pca-3") == {("pca-3", "all"), ("pca-3", "cls")}
    assert ("small/slow@random", "all") in chosen(registry, "*@random")


def test_a_pca_of_more_components_than_dimensions_is_refused(registry: Registry) -> None:
    with pytest.raises(Mismatch, match="16 dimensions"):
        chosen(registry, "pca-16")


def test_an_sae_of_another_backbone_is_refused_with_the_reason(registry: Registry) -> None:
    with pytest.raises(Mismatch, match="belongs to the backbone 'small', not to other"):
        choose(registry, [registry.backbone("other")], ["small/a"], "default")


def test_an_unknown_sae(registry: Registry) -> None:
    with pytest.raises(NotFound, match="did you mean small/a"):
        chosen(registry, "small/A")


def test_a_backbone_without_saes_has_the_controls_at_its_default_site(registry: Registry) -> None:
    refs = candidates(registry, registry.backbone("other")).refs
    assert [(ref.name, ref.site) for ref in refs] == [
        ("identity", "blocks.1"),
        ("zero", "blocks.1"),
        ("mean", "blocks.1"),
    ]


def test_an_sae_on_an_sae_is_a_chain(registry: Registry) -> None:
    chain = chain_of(registry, registry.sae("small/meta"))
    assert [link.name for link in chain] == ["small/meta", "small/a"]
    refs = candidates(registry, registry.backbone("small")).refs
    (meta,) = (ref for ref in refs if "meta" in ref.name)
    assert meta.depth == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (sae_entry(site="blocks.9"), r"site 'blocks\.9', which 'small' does not declare"),
        (sae_entry(tokens="registers"), "has no 'registers'"),
        (sae_entry(tokens="patch"), "has no 'patch'"),
        (sae_entry(site="sae:small/bad/codes"), "sits on itself"),
        (sae_entry(site="sae:small/bad/latents"), "not one that can be measured"),
    ],
)
def test_an_sae_that_does_not_fit_is_refused(tmp_path: Path, entry: str, said: str) -> None:
    files = {
        "registry/backbones/small.toml": BACKBONE,
        "registry/saes/small/bad.toml": entry,
        "registry/saes/small/good.toml": sae_entry(),
    }
    registry = Registry.load([write(tmp_path / "c", files)])
    small = registry.backbone("small")
    for patterns in ([], ["small/*"]):  # meant, but not typed: the others go on
        choice = choose(registry, [small], patterns, "default")
        (refusal,) = choice.refused
        assert refusal.name == "small/bad"
        assert re.search(said, str(refusal.error))
        assert "small/good" in {ref.name for ref in choice.refs["small"]}
    assert not choose(registry, [small], ["small/good"], "default").refused
    for typed in ("small/bad", "small/bad@random"):
        with pytest.raises(Mismatch, match=said):
            choose(registry, [small], [typed], "default")


def test_an_entry_that_cannot_be_read_stops_nobody_else(tmp_path: Path) -> None:
    files = {
        "registry/backbones/small.toml": BACKBONE,
        "registry/backbones/other.toml": BACKBONE,
        "registry/saes/small/bad.toml": "backbone = ",
    }
    registry = Registry.load([write(tmp_path / "c", files)])
    choice = choose(registry, [registry.backbone("other")], [], "default")
    assert not choice.refused
    choice = choose(registry, [registry.backbone("small")], [], "default")
    assert "not valid TOML" in str(choice.refused[0].error)
