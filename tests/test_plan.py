from __future__ import annotations

from pathlib import Path

import pytest

from saebench.errors import DataError, NotFound, UsageError, WeightsError
from saebench.plan import Plan, make_plan
from saebench.registry import Registry
from saebench.runconfig import RunConfig
from saebench.specs import DatasetSpec
from saebench.units import SEGMENT, Source
from saebench.waves import memory_bytes
from tests.content import BACKBONE, TASK, sae_entry, write

FILES = {
    "registry/backbones/small.toml": BACKBONE,
    "registry/saes/small/a.toml": sae_entry(l0=4.0),
    "registry/saes/small/b.toml": sae_entry(l0=8.0),
    "registry/saes/small/sae.safetensors": "x" * 1000,
    "tasks/rows.py": TASK,
}


def source_of(spec: DatasetSpec, config: RunConfig) -> Source:
    return Source(spec, "test-hash", "train-hash", config.limit or 5000, 2048)


def plan(root: Path, done: set[str] | None = None, **options: object) -> Plan:
    options = {"backbone": ("small",), "task": ("rows",), **options}
    config = RunConfig(**options)  # type: ignore[arg-type]
    known = done or set()
    return make_plan(config, Registry.load([root]), source_of, lambda unit_id: unit_id in known)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write(tmp_path / "c", FILES)


def ids(root: Path, **options: object) -> set[str]:
    return {unit.id for unit in plan(root, **options).units}


def test_units_are_grouped_by_backbone_and_dataset(root: Path) -> None:
    found = plan(root, dataset=("digits", "shapes"), sae=("small/*",))
    assert [(g.backbone.name, g.source.spec.name) for g in found.groups] == [
        ("small", "digits"),
        ("small", "shapes"),
    ]
    assert [unit.coder.name for unit in found.units] == ["small/a", "small/b"] * 2
    assert found.groups[0].source.n_segments == -(-5000 // SEGMENT) == 3


def test_done_units_are_left_out(root: Path) -> None:
    everything = plan(root)
    done = {unit.id for unit in everything.units[:3]}
    rest = plan(root, done)
    assert {unit.id for unit in rest.done} == done
    assert {unit.id for unit in rest.todo} == {u.id for u in everything.units} - done
    assert plan(root, {unit.id for unit in everything.units}).groups == ()


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 7}, {"device": "cpu"}, {"memory": "1MiB"}, {"out": "x"}, {"workers": 3}],
)
def test_what_cannot_change_a_number_is_not_in_the_identity(root: Path, options: dict) -> None:
    assert ids(root) == ids(root, **options)


@pytest.mark.parametrize(
    "options",
    [{"limit": 7}, {"seed": 1}, {"dtype": "bfloat16"}],
)
def test_what_can_change_a_number_is_in_the_identity(root: Path, options: dict) -> None:
    assert not ids(root) & ids(root, **options)


def test_conventions_are_units_of_their_own_beside_the_plain_ones(root: Path) -> None:
    both = plan(root, task=("rows", "reconstruction"), conventions=True)
    plain = plan(root, task=("rows", "reconstruction"))
    extra = {u.id for u in both.units} - {u.id for u in plain.units}
    assert {u.id for u in plain.units} < {u.id for u in both.units}
    assert {u.task.name for u in both.units if u.id in extra} == {"reconstruction"}


def test_the_identity_sees_the_bytes_of_the_weights_but_not_where_they_lie(root: Path) -> None:
    before = ids(root, sae=("small/a",))
    (root / "registry/saes/small/moved.safetensors").write_text("x" * 1000)
    entry = root / "registry/saes/small/a.toml"
    entry.write_text(entry.read_text().replace("sae.safetensors", "moved.safetensors"))
    assert ids(root, sae=("small/a",)) == before
    (root / "registry/saes/small/moved.safetensors").write_text("y" * 1000)
    assert not ids(root, sae=("small/a",)) & before


def test_documentation_does_not_change_the_identity(root: Path) -> None:
    before = ids(root)
    path = root / "registry/backbones/small.toml"
    path.write_text('description = "better said"\nlicence = "MIT"\n' + path.read_text())
    assert ids(root) == before
    path.write_text(path.read_text().replace("depth = 3", "depth = 4"))
    assert not ids(root) & before


def test_waves_fit_in_memory_and_cover_every_unit_once(root: Path) -> None:
    # a file of 1,000 bytes is taken for at most 2,000 bytes of float32
    saes = ("small/a", "small/b")
    assert len(plan(root, sae=saes, memory="4KB").groups[0].waves) == 1
    waves = plan(root, sae=saes, memory="3KB").groups[0].waves
    assert [[c.name for c in wave.coders] for wave in waves] == [["small/a"], ["small/b"]]
    assert all(wave.n_bytes == 2000 for wave in waves)
    tiny = plan(root, sae=saes, memory="1KB").groups[0].waves  # one alone always goes
    assert len(tiny) == 2


@pytest.mark.parametrize(
    ("text", "n"),
    [
        ("4GiB", 4 * 2**30),
        ("500MB", 500 * 10**6),
        ("2g", 2 * 2**30),
        ("1.5 KiB", 1536),
        ("7", 7),
        ("1TB", 10**12),
    ],
)
def test_memory_sizes(text: str, n: int) -> None:
    assert memory_bytes(text) == n


@pytest.mark.parametrize("text", ["", "lots", "-1GB", "0", "4 GiBs", "1e9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError, match="not a size"):
        memory_bytes(text)


@pytest.mark.parametrize(
    "options", [{"limit": 0}, {"train_limit": -1}, {"batch_size": 0}, {"workers": -1}]
)
def test_numbers_that_no_run_can_have(root: Path, options: dict) -> None:
    with pytest.raises(UsageError, match="has to be"):
        plan(root, **options)


def test_unknown_names(root: Path) -> None:
    with pytest.raises(NotFound, match="task"):
        plan(root, task=("rowz",))
    with pytest.raises(NotFound, match="dataset"):
        plan(root, dataset=("shapez",))
    with pytest.raises(NotFound, match="backbone"):
        plan(root, backbone=("smal",))


def test_a_backbone_without_a_dataset_asks_for_one(root: Path) -> None:
    path = root / "registry/backbones/small.toml"
    path.write_text(path.read_text().replace('dataset = "shapes"', ""))
    with pytest.raises(UsageError, match="--dataset NAME"):
        plan(root)


def test_saes_named_alone_bring_their_backbone(root: Path) -> None:
    assert {u.backbone.name for u in plan(root, backbone=(), sae=("small/a",)).units} == {"small"}
    assert {u.backbone.name for u in plan(root, backbone=(), sae=("small/*",)).units} == {"small"}


def test_where_a_dataset_lies_is_not_in_the_identity(tmp_path: Path) -> None:
    """The same list of images as a folder here and as tar shards there: the same units."""
    entry = 'source = "shapes"\ntest = "val"\n'
    folder = {"registry/datasets/mine.toml": f'{entry}[folder]\nroot = "/here"\n'}
    tars = {"registry/datasets/mine.toml": f'{entry}[tar]\nlabel = "json:label"\n'}
    one = ids(write(tmp_path / "one", FILES | folder), dataset=("mine",), data_root="/a")
    two = ids(write(tmp_path / "two", FILES | tars), dataset=("mine",))
    assert one == two
    pattern = {"registry/datasets/mine.toml": f"{entry}id_pattern = '(x)'\n"}
    three = ids(write(tmp_path / "three", FILES | pattern), dataset=("mine",))
    assert not one & three


def without_digits(spec: DatasetSpec, config: RunConfig) -> Source:
    if spec.name == "digits":
        raise DataError("dataset 'digits' is nowhere")
    return source_of(spec, config)


def test_a_dataset_that_is_not_here_stops_the_others_not(root: Path) -> None:
    config = RunConfig(backbone=("small",), task=("rows",), dataset=("digits", "shapes"))
    found = make_plan(config, Registry.load([root]), without_digits)
    assert {unit.source.spec.name for unit in found.units} == {"shapes"}
    assert [(r.name, str(r.error)) for r in found.refused] == [
        ("digits", "dataset 'digits' is nowhere")
    ]
    alone = RunConfig(backbone=("small",), task=("rows",), dataset=("digits",))
    with pytest.raises(DataError, match="is nowhere"):
        make_plan(alone, Registry.load([root]), without_digits)


def test_a_backbone_without_its_weights_stops_the_others_not(tmp_path: Path) -> None:
    absent = BACKBONE + '[weights]\nfile = "gone.safetensors"\n'
    root = write(tmp_path, FILES | {"registry/backbones/absent.toml": absent})
    found = plan(root, backbone=("absent", "small"))
    assert {unit.backbone.name for unit in found.units} == {"small"}
    assert [refusal.name for refusal in found.refused] == ["absent"]
    with pytest.raises(WeightsError, match=r"gone\.safetensors"):
        plan(root, backbone=("absent",))


def ids_of(root: Path, backbone: str) -> set[str]:
    return ids(write(root, FILES | {"registry/backbones/small.toml": backbone}))


@pytest.mark.parametrize(
    "more",
    [
        'activation = "gelu"\n',
        'description = "the same"\n',
        'head = { kind = "none", classes = { elsewhere = [0, 3] } }\n',
    ],
)
def test_what_an_entry_adds_without_changing_a_number(more: str, tmp_path: Path) -> None:
    assert ids_of(tmp_path / "a", BACKBONE) == ids_of(tmp_path / "b", more + BACKBONE)


def test_a_size_that_is_written_out_is_the_same_size(tmp_path: Path) -> None:
    written = BACKBONE.replace("[input]\nsize = 32", "[input]\nsize = 32\nresize_to = 32")
    assert ids_of(tmp_path / "a", BACKBONE) == ids_of(tmp_path / "b", written)
    larger = written.replace("resize_to = 32", "resize_to = 36")
    assert not ids_of(tmp_path / "a", BACKBONE) & ids_of(tmp_path / "c", larger)


def test_which_outputs_are_the_classes_of_this_dataset_is_in_the_identity(tmp_path: Path) -> None:
    def head(first: int, name: str) -> str:
        kind = f'head = {{ kind = "classifier", classes = {{ {name} = [{first}, 48] }} }}\n'
        return kind + BACKBONE

    one, two = ids_of(tmp_path / "a", head(0, "shapes")), ids_of(tmp_path / "b", head(1, "shapes"))
    assert not one & two
    other = ids_of(tmp_path / "c", head(0, "digits"))
    assert other == ids_of(tmp_path / "d", head(1, "digits"))
    assert not other & one


def test_a_loader_from_a_folder_that_is_not_trusted_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader = BACKBONE.replace('loader = "timm"', 'loader = "evil_module:build"')
    root = write(tmp_path / "content", FILES | {"registry/backbones/small.toml": loader})
    (tmp_path / "evil_module.py").write_text("raise AssertionError('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("SAEBENCH_PATH", str(root))
    config = RunConfig(backbone=("small",), task=("reconstruction",))
    with pytest.raises(UsageError, match=r"(?s)evil_module:build.*not trusted.*--registry"):
        make_plan(config, Registry.load(), source_of)
    monkeypatch.delenv("SAEBENCH_PATH")
    assert plan(root, task=("reconstruction",)).units  # the folder was typed
