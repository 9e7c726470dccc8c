"""SAEs spliced together, beside timm's own forward hooks on all their modules at once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor

import saebench
from saebench import api, evaluation, units
from saebench.backbones import load_backbone
from saebench.calibrate import Place
from saebench.coders import CoderRef
from saebench.errors import UsageError
from saebench.formats import read_entry
from saebench.images import Images
from saebench.registry import Registry
from saebench.runner import GroupRun
from saebench.saes import Sae
from saebench.sets import model_order
from saebench.together import Member, Together
from tests.small import add_sae, random_sae
from tests.spliced import mean_of_kinds, read_with_hooks, reconstructed, setting

N, TRAIN = 48, 64


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return setting(tmp_path_factory.mktemp("content"))


def run(root: Path, out: Path, *sae: str, **options: Any) -> pd.DataFrame:
    defaults = {"backbone": "small", "task": "outputs", "limit": N, "train_limit": TRAIN}
    options = {**defaults, "splice_together": True, **options}
    return saebench.run(registry=[root], out=out, sae=sae, **options)


def values(rows: pd.DataFrame) -> dict[str, float]:
    assert not rows.duplicated("metric").any()
    return dict(zip(rows["metric"], rows["value"], strict=True))


SEEDS = {"first": 0, "attn": 1, "mlp": 2, "out": 3, "cls": 4, "patches": 5, "last": 6}
MODULES = {
    "first": "blocks.0",
    "attn": "blocks.1.attn",
    "mlp": "blocks.1.mlp",
    "out": "blocks.1",
    "cls": "blocks.1",
    "patches": "blocks.1",
    "last": "blocks.2",
}
COVERED = {"cls": slice(0, 1), "patches": slice(1, None)}

Change = Callable[[Tensor], Tensor]


def hooks(names: tuple[str, ...], value: Callable[[str, Tensor], Tensor]) -> dict[str, Change]:
    """Module -> what it returns when the tokens of these SAEs become `value` of all its tokens."""
    at: dict[str, list[str]] = {}
    for name in names:
        at.setdefault(MODULES[name], []).append(name)

    def changed(x: Tensor, here: list[str]) -> Tensor:
        new = x.clone()
        for name in here:
            part = COVERED.get(name, slice(None))
            new[:, part] = value(name, x)[:, part]
        return new

    return {m: (lambda x, here=here: changed(x, here)) for m, here in at.items()}


# --- known answers -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("first", "out"),
        ("first", "out", "last"),
        ("first", "mlp", "last"),  # a branch in the block after a bottleneck
        ("mlp", "out"),  # what a block adds and what it returns
        ("attn", "mlp", "last"),  # two branches of one block
        ("first", "attn", "mlp"),
        ("cls", "patches"),  # two SAEs at one site
        ("first", "cls", "patches", "last"),
    ],
    ids=" + ".join,
)
def test_a_set_equals_hooks_on_every_module(
    root: Path, tmp_path: Path, names: tuple[str, ...]
) -> None:
    found = values(run(root, tmp_path / "r", *(f"small/{name}" for name in names)))
    saes = {name: random_sae(SEEDS[name]) for name in names}
    means = {name: mean_of_kinds(root, MODULES[name], TRAIN) for name in names}
    expected = {
        "clean": {},
        "spliced": hooks(names, lambda name, x: reconstructed(saes[name], x)),
        "zero": hooks(names, lambda name, x: x * 0),
        "mean": hooks(names, lambda name, x: means[name].expand_as(x)),
    }
    for metric, replace in expected.items():
        assert found[metric] == pytest.approx(read_with_hooks(root, replace, N), rel=1e-4), metric
    assert abs(found["spliced"] - found["clean"]) > 1e-2
    assert found["kept"] == found["clean"]


def test_a_policy_holds_at_every_site(root: Path, tmp_path: Path) -> None:
    found = values(run(root, tmp_path / "r", "small/first", "small/last"))
    saes = {name: random_sae(SEEDS[name]) for name in ("first", "last")}

    def cls_alone(value: Callable[[str, Tensor], Tensor]) -> dict[str, Change]:
        def changed(x: Tensor, name: str) -> Tensor:
            new = x.clone()
            new[:, :1] = value(name, x)[:, :1]
            return new

        return {MODULES[name]: (lambda x, name=name: changed(x, name)) for name in saes}

    spliced = read_with_hooks(root, cls_alone(lambda name, x: reconstructed(saes[name], x)), N)
    zero = read_with_hooks(root, cls_alone(lambda name, x: x * 0), N)
    assert found["cls"] == pytest.approx(spliced, rel=1e-4)
    assert found["zero_cls"] == pytest.approx(zero, rel=1e-4)


def test_an_sae_on_an_sae_is_spliced_through_its_chain(root: Path, tmp_path: Path) -> None:
    found = values(run(root, tmp_path / "r", "small/first", "small/meta"))
    below, above = random_sae(SEEDS["out"]), random_sae(9, d=48)

    def through(x: Tensor) -> Tensor:
        x_nd = x.flatten(0, 1)
        codes_ns = above.decode(above.encode(below.encode(x_nd).dense()))
        return (codes_ns @ below.W_dec_sd + below.b_dec_d).view_as(x)

    replace = {
        "blocks.1": through,
        **hooks(("first",), lambda n, x: reconstructed(random_sae(0), x)),
    }
    assert found["spliced"] == pytest.approx(read_with_hooks(root, replace, N), rel=1e-4)


def test_identity_at_every_site_is_the_clean_output(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path / "r", "identity")
    found = values(rows)
    assert found["spliced"] == found["clean"]
    assert found["cls"] == found["clean"]
    assert len(set(rows["site"].iloc[0].split(" + "))) == 5  # once each, whatever its token sets
    assert set(rows["tokens"]) == {"all + all + all + all + all"}


def test_loss_substitution_of_sets(root: Path, tmp_path: Path) -> None:
    def measured(*sae: str) -> dict[str, float]:
        rows = run(root, tmp_path / "r", *sae, task="loss_substitution")
        return values(rows[rows["variant"] == ""])

    exact = measured("identity")
    assert exact["loss_spliced"] == exact["loss_clean"]
    assert exact["kl_spliced"] == 0
    assert exact["embedding_nmse_spliced"] == 0
    zero = measured("zero")
    assert zero["loss_spliced"] == zero["loss_zero"]
    saes = measured("small/last", "small/first")
    assert saes["loss_clean"] == exact["loss_clean"]
    assert saes["embedding_nmse_spliced"] > 0.01


@pytest.mark.parametrize(("control", "same"), [("zero", "zero"), ("mean", "mean")])
def test_a_control_at_every_site_is_its_own_ablation(
    root: Path, tmp_path: Path, control: str, same: str
) -> None:
    found = values(run(root, tmp_path / "r", control))
    assert found["spliced"] == found[same]
    assert found["spliced"] != found["clean"]


def test_a_set_of_one_is_that_sae(root: Path, tmp_path: Path) -> None:
    together = run(root, tmp_path / "together", "small/first")
    alone = run(root, tmp_path / "alone", "small/first", splice_together=False)
    assert values(together) == values(alone)
    assert set(together["unit_id"]) == set(alone["unit_id"])
    # and by the pass of a set too
    coders, images = one_batch(root, "small/first")
    for policy in ("sae_tokens", "all", "cls"):
        ours = coders.batch(images, 2**20).spliced_output(policy)
        member = coders.members[0].batch(images, 2**20).spliced_output(policy)
        assert ours.embedding_bd.equal(member.embedding_bd)
    for value in ("zero", "mean"):
        ours = coders.batch(images, 2**20).ablated_output(value)
        member = coders.members[0].batch(images, 2**20).ablated_output(value)
        assert ours.embedding_bd.equal(member.embedding_bd)


def one_batch(root: Path, *names: str) -> tuple[Any, Any]:
    """The members, as a set, and one batch of images."""
    registry = Registry.load([root])
    backbone = load_backbone(registry.backbone("small"))
    members = []
    for name in names:
        spec = registry.sae(name)
        kinds = ("cls", "patches") if spec.tokens == "all" else (spec.tokens,)
        ref = CoderRef(name, spec.site, spec.tokens, spec)
        members.append(Member(ref, Place(spec.site, kinds), read_entry(spec)))
    coders = Together.on(backbone, members)
    images_b3hw = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    captures = backbone.acts(images_b3hw, [coders.places[0].site])
    means = {place.site: torch.ones(17, 16) for place in coders.places}
    return coders, Images(backbone, "shapes", list("abc"), np.zeros(3), {}, 0, captures, means)


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("tiny-resnet", ("layer1", "layer3", "layer4")),
        ("tiny-bioclip", ("blocks.0", "blocks.2.mlp", "blocks.3")),
        ("tiny-dinov2", ("blocks.1", "blocks.2", "blocks.3")),
    ],
)
def test_an_embedded_backbone_equals_hooks_on_its_modules(
    name: str, sites: tuple[str, ...]
) -> None:
    backbone = load_backbone(Registry.load().backbone(name))
    layouts = [backbone.spec.sites[site] for site in sites]
    saes = [random_sae(i, d=layout.width) for i, layout in enumerate(layouts)]
    members = [
        Member(CoderRef(site, site, "all"), Place(site, tuple(layout.kinds)), sae)
        for site, layout, sae in zip(sites, layouts, saes, strict=True)
    ]
    size = backbone.spec.input.size
    images_b3hw = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    together = Together.on(backbone, members[::-1])
    captures = backbone.acts(images_b3hw, sites[:1])
    images = Images(backbone, "shapes", list("abc"), np.zeros(3), {}, 0, captures)
    found = together.batch(images, 2**20).spliced_output()

    def changed(out: Tensor, sae: Sae, is_map: bool) -> Tensor:
        x = out.movedim(1, -1) if is_map else out
        new = reconstructed(sae, x)
        return new.movedim(-1, 1) if is_map else new

    removers = [
        backbone.model.module.get_submodule(layout.path).register_forward_hook(
            lambda module, given, out, sae=sae, is_map=layout.layout == "map": changed(
                out, sae, is_map
            )
        )
        for layout, sae in zip(layouts, saes, strict=True)
    ]
    # The library's own forward, to its logits or its embedding.
    module = backbone.model.module
    whole = getattr(module, "encode_image", module)
    with torch.inference_mode():
        expected = whole(images_b3hw)
        for hook in removers:
            hook.remove()
        clean = whole(images_b3hw)
    ours = found.embedding_bd if found.logits_bc is None else found.logits_bc
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert (clean - expected).abs().max() > 0.1 * clean.abs().mean()


def test_patches_that_no_head_sees_are_seen_where_one_site_comes_before(
    root: Path, tmp_path: Path
) -> None:
    assert values(run(root, tmp_path / "a", "small/last"))["sees"] == 0
    assert values(run(root, tmp_path / "b", "small/last", "small/first"))["sees"] == 1


def test_tokens_that_none_of_two_saes_covers_are_refused(root: Path) -> None:
    coders, images = one_batch(root, "small/cls", "small/last")
    coders.batch(images, 2**20).spliced_output("patches")  # one SAE at each site: as alone
    coders, images = one_batch(root, "small/cls", "small/cls", "small/last")
    with pytest.raises(UsageError, match=r"'small/cls', 'small/cls' was trained .* patches"):
        coders.batch(images, 2**20).spliced_output("all")
    with pytest.raises(UsageError, match="'registers' names no tokens at any of the sites"):
        coders.batch(images, 2**20).ablated_output("zero", "registers")


def test_what_is_of_one_sae_is_refused(root: Path) -> None:
    coders, images = one_batch(root, "small/first", "small/last")
    batch = coders.batch(images, 2**20)
    for name in ("x_btd", "codes", "recon_btd", "decoder_norms_s"):
        with pytest.raises(UsageError, match="several SAEs spliced together"):
            getattr(batch, name)
    assert batch.n_rows == 3 * 17
    assert batch.d_sae == 96


# --- which SAEs --------------------------------------------------------------------------------


def plan(root: Path, *sae: str, **options: Any) -> api.Plan:
    options = {"backbone": "small", "limit": N, "train_limit": TRAIN, **options}
    options.setdefault("task", "outputs")
    return api.plan_run(
        api.config_of(registry=[root], sae=sae, splice_together=True, out="nowhere", **options)
    )


def test_the_order_of_names_changes_nothing(root: Path) -> None:
    names = ["small/last", "small/first", "small/patches", "small/mlp", "small/cls"]
    (one,), (other,) = plan(root, *names).todo, plan(root, *reversed(names)).todo
    assert one.id == other.id
    assert one.coder.name == "small/first + small/mlp + small/cls + small/patches + small/last"
    assert one.label == "small · small/first + … + small/last (5 together) · outputs · shapes"


def test_an_id_knows_its_members_sites_and_files(root: Path, tmp_path: Path) -> None:
    (unit,) = plan(root, "small/first", "small/last").todo
    (fewer,) = plan(root, "small/first", "small/out").todo
    assert unit.id != fewer.id
    assert [site["path"] for site in unit.identity["backbone"]["sites"]] == ["blocks.0", "blocks.2"]
    other = setting(tmp_path / "other")
    assert plan(other, "small/first", "small/last").todo[0].id == unit.id
    add_sae(other, "last", random_sae(77), site="blocks.2")
    assert plan(other, "small/first", "small/last").todo[0].id != unit.id


def test_two_at_one_place_are_a_conflict(root: Path) -> None:
    with pytest.raises(UsageError) as caught:
        plan(root, "small/first", "small/cls", "small/out")
    assert caught.value.what == (
        "'small/cls', 'small/out' replace the same tokens (cls) at 'blocks.1' of 'small': "
        "of these one can be in the set"
    )
    assert "--sae" in caught.value.hint
    with pytest.raises(UsageError, match="'small/meta', 'small/out'"):
        plan(root, "small/meta", "small/out")


def test_the_default_is_every_sae_and_may_conflict(root: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"replace the same tokens \(cls\) at 'blocks.1'"):
        plan(root)
    fine = setting(tmp_path / "fine")
    for name in ("cls", "patches", "meta"):
        (fine / f"registry/saes/small/{name}.toml").unlink()
    (unit,) = plan(fine).todo
    assert [member.name.partition("/")[2] for member in unit.coder.members] == [
        "first",
        "attn",
        "mlp",
        "out",
        "last",
    ]


def test_nothing_to_splice_is_refused(root: Path, tmp_path: Path) -> None:
    bare = setting(tmp_path / "bare")
    for path in (bare / "registry/saes/small").glob("*.toml"):
        path.unlink()
    with pytest.raises(UsageError, match="no SAE of small to splice"):
        plan(bare)


def test_a_task_that_cannot_is_left_out_or_refused(root: Path) -> None:
    tasks = {unit.task.name for unit in plan(root, "small/first", "small/last", task=()).units}
    assert "outputs" in tasks
    assert "rows" not in tasks
    assert "reconstruction" not in tasks
    with pytest.raises(UsageError, match="'rows' measures SAEs one by one"):
        plan(root, "small/first", task=["rows", "outputs"])
    with pytest.raises(UsageError, match="none of these tasks"):
        plan(root, "small/first", task=["row*"])


def test_a_control_may_stand_beside_saes(root: Path, tmp_path: Path) -> None:
    names = ("small/first@random", "small/out@shuffled-decoder", "small/last")
    rows = run(root, tmp_path / "r", *names)
    assert set(rows["sae"]) == {" + ".join(names)}
    recipe = Registry.load([root]).sae("small/last").recipe
    assert set(rows["sae_recipe"]) == {f"control + {recipe}"}


def test_memory_is_the_sum_of_the_members(root: Path) -> None:
    both = plan(root, "small/first", "small/last").groups[0].waves[0].n_bytes
    one, other = (plan(root, n).groups[0].waves[0].n_bytes for n in ("small/first", "small/last"))
    assert both == one + other > 0


@pytest.mark.parametrize("backbone", ["tiny-vit", "tiny-clip", "tiny-resnet", "tiny-bioclip"])
def test_the_order_of_an_entrys_sites_is_the_models(backbone: str) -> None:
    spec = Registry.load().backbone(backbone)
    assert model_order(spec) == load_backbone(spec).in_order(spec.sites)


# --- rows, resume and failures -----------------------------------------------------------------


def test_the_columns_of_a_set(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path / "r", "small/meta", "small/last", "small/first")
    row = rows.to_dict("records")[0]
    assert row["sae"] == "small/first + small/meta + small/last"
    assert row["site"] == "blocks.0 + sae:small/out/codes + blocks.2"
    assert row["tokens"] == "all + all + all"
    assert row["sae_architecture"] == "topk"
    assert (row["d_model"], row["d_sae"], row["depth"]) == (16, 144, 2)
    assert rows["sae_sha256"].isna().all()
    assert rows["sae_seed"].isna().all()
    assert row["sae_format"] == run(root, tmp_path / "one", "small/first")["sae_format"].iloc[0]
    assert set(rows["n_images"]) == {N}
    alone = run(root, tmp_path / "one", "small/first")
    assert row["backbone_hash"] != alone["backbone_hash"].iloc[0]


def test_conventions_are_a_unit_of_their_own(root: Path, tmp_path: Path) -> None:
    rows = run(root, tmp_path / "r", "small/first", "small/last", conventions=True)
    assert rows["unit_id"].nunique() == 2
    spliced = rows[rows["metric"] == "spliced"].set_index("variant")["value"]
    assert spliced[""] == spliced["convention=mine"]


def test_a_killed_run_goes_on_from_its_segments(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (units, evaluation):
        monkeypatch.setattr(module, "SEGMENT", 32)
    how: dict[str, Any] = {"limit": 64, "batch_size": 16}
    names = ("small/first", "small/last")
    whole = run(root, tmp_path / "whole", *names, **how)
    segment = GroupRun._segment

    def killed(self: GroupRun, number: int, *rest: Any) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return segment(self, number, *rest)

    monkeypatch.setattr(GroupRun, "_segment", killed)
    with pytest.raises(KeyboardInterrupt):
        run(root, tmp_path / "cut", *names, **how)
    seen: list[int] = []

    def counted(self: GroupRun, number: int, *rest: Any) -> Any:
        seen.append(number)
        return segment(self, number, *rest)

    monkeypatch.setattr(GroupRun, "_segment", counted)
    assert values(run(root, tmp_path / "cut", *names, **how)) == values(whole)
    assert seen == [1]


def test_one_broken_member_fails_the_set_with_words(tmp_path: Path) -> None:
    root = setting(tmp_path / "content")
    path = add_sae(root, "last", random_sae(6, d=8), site="blocks.2")
    assert path.exists()
    with pytest.warns(UserWarning, match=r"1 units failed \(small · small/first \+ small/last"):
        rows = run(root, tmp_path / "r", "small/first", "small/last")
    assert not len(rows)
    (record,) = (tmp_path / "r/_errors").glob("*.json")
    said = json.loads(record.read_text())["error"]
    assert "'small/last'" in said
    assert "reads 8 dimensions" in said


def test_a_member_without_its_file_is_refused_with_the_set(tmp_path: Path) -> None:
    root = setting(tmp_path / "content")
    (root / "registry/saes/small/last.safetensors").unlink()
    made = plan(root, "small/first", "small/last")
    assert not made.units
    (refusal,) = made.refused
    assert refusal.name == "small/first + small/last"
    assert "last.safetensors" in str(refusal.error)


def test_a_member_that_breaks_on_the_way_is_named(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode = Sae.encode

    def broken(self: Sae, x_nd: Tensor, **how: Any) -> Any:
        if self.W_dec_sd.equal(random_sae(SEEDS["last"]).W_dec_sd):
            raise RuntimeError("not today")
        return encode(self, x_nd, **how)

    monkeypatch.setattr(Sae, "encode", broken)
    with pytest.warns(UserWarning, match="1 units failed"):
        run(root, tmp_path / "r", "small/first", "small/last")
    (record,) = (tmp_path / "r/_errors").glob("*.json")
    assert json.loads(record.read_text())["error"].startswith(
        "'small/last': it does not encode: RuntimeError: not today"
    )
