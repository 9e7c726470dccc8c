"""Damaged files of every format: they are read, or refused in words, and nothing else happens.

Two kinds of damage. Bytes: flipped, cut, put in, moved. Structure: the file is taken apart, a key
is removed or renamed, a tensor or a value of the configuration replaced, and it is written again in
its own container. What is read all the same has to encode and decode rows.
"""

from __future__ import annotations

import gzip
import io
import json
import pickle
import random
import tempfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save as safetensors_save

from saebench.errors import SaebenchError
from saebench.formats import FORMATS, read_sae
from saebench.formats.containers import GZIP, META
from saebench.formats.content import sniff
from saebench.plainvalues import Stub
from tests.checkpoints import Case, cases, inputs
from tests.test_formats_cases import spec_of
from tests.test_formats_containers import little_memory

CASES = {case.name: case for case in cases()}
NAMES = sorted({case.format for case in CASES.values()})

Damage = Callable[[dict[str, bytes], str, random.Random], None]
"""Changes one of a checkpoint's files, name -> bytes; the second argument names the weights."""


@cache
def written(name: str) -> tuple[str, Mapping[str, bytes]]:
    """The name of the weights, and the bytes of all files of a fabricated checkpoint."""
    with tempfile.TemporaryDirectory() as folder:
        weights = CASES[name].write(Path(folder))
        files = {
            str(path.relative_to(folder)): path.read_bytes()
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        }
        return str(weights.relative_to(folder)), files


# --- bytes ---------------------------------------------------------------------------------------

MAGIC = (b"PK\x03\x04", b"PK\x01\x02", b"\x80\x02", b"\x1f\x8b", b"{", b"\x00" * 8, b"\xff" * 8)


def damaged_bytes(data: bytes, dice: random.Random) -> bytes:
    """One to four changes; half of them near an end, where the structure is."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, 4)):
        if not changed:
            break
        most = len(changed) - 1
        near = (dice.randint(0, min(most, 400)), most - dice.randint(0, min(most, 400)))
        at = dice.choice([*near, dice.randint(0, most), dice.randint(0, most)])
        n = dice.choice([1, 1, 2, 8, 64])
        kind = dice.randrange(7)
        if kind < 2:
            changed[at] ^= 1 << dice.randrange(8)
        elif kind == 2:
            changed[at] = dice.randrange(256)
        elif kind == 3:
            del changed[at : at + n]
        elif kind == 4:
            changed[at:at] = dice.choice([dice.randbytes(n), *MAGIC])
        elif kind == 5:
            del changed[at:]
        else:
            start = dice.randint(0, most)
            changed[at : at + n] = changed[start : start + n]
    return bytes(changed)


def damage_bytes(files: dict[str, bytes], weights: str, dice: random.Random) -> None:
    name = dice.choice([weights, weights, *files])
    files[name] = damaged_bytes(files[name], dice)


# --- structure ------------------------------------------------------------------------------------

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 7, 2**31, 2**63, 10**30, 0.5, -0.5, 1e308),
    *(float("nan"), float("inf"), "", "x", "topk", "none", [], [1, 2], ["x"], {}, {"x": 1}),
)
"""What stands in place of a value of any other type."""


class Config:
    """What is saved whole, as a project's own class."""


def damage_structure(files: dict[str, bytes], weights: str, dice: random.Random) -> None:
    configs = [name for name in files if name.endswith((".json", ".arch_ref"))]
    name = dice.choice([weights, weights, *configs])
    if name in configs:
        tree = json.loads(files[name])
        change(tree, dice)
        files[name] = json.dumps(tree).encode()
    else:
        files[name] = rewritten(files[name], dice)


def rewritten(data: bytes, dice: random.Random) -> bytes:
    """A weights file with one to three changes inside, in the container that it was in."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights"
        path.write_bytes(data)
        content = sniff(path, {})
        objects, container = dict(content.objects), content.container
        header, metadata = dict(content.header), dict(content.metadata)
    tree = unstubbed(objects)
    for _ in range(dice.randint(1, 3)):
        change(dice.choice([tree, tree, metadata or header or tree]), dice)
    if container == "safetensors":
        tensors = {key: value for key, value in tree.items() if isinstance(value, torch.Tensor)}
        texts = {str(key): str(value) for key, value in metadata.items() if key != META}
        separate = {key: value.clone().contiguous() for key, value in tensors.items()}
        return safetensors_save(separate, texts or None)
    if container == "npz":
        arrays = {
            key: np.asarray(value.float() if isinstance(value, torch.Tensor) else value)
            for key, value in tree.items()
        }
        np.savez(file := io.BytesIO(), **arrays)
        return file.getvalue()
    if container == "pickle":
        written = pickle.dumps(tree)
        return gzip.compress(written, 1) if data.startswith(GZIP) else written
    torch.save(tree, file := io.BytesIO())
    line = json.dumps(header).encode() + b"\n" if container == "saev" else b""
    return line + file.getvalue()


def unstubbed(value: Any) -> Any:
    """The same with stubs as objects that can be saved."""
    if isinstance(value, Stub):
        config = Config()
        vars(config).update({key: unstubbed(part) for key, part in vars(value).items()})
        return config
    if isinstance(value, dict):
        return {key: unstubbed(part) for key, part in value.items()}
    return value


def change(tree: Any, dice: random.Random) -> None:
    """Change something in nested mappings: a level down as often as not."""
    if not tree:
        tree["x"] = dice.choice(ODD)
        return
    key = dice.choice(list(tree))
    part = vars(tree[key]) if isinstance(tree[key], Config) else tree[key]
    if isinstance(part, dict) and part and dice.random() < 0.7:
        change(part, dice)
        return
    kind = dice.randrange(5)
    if kind == 0:
        del tree[key]
    elif kind == 1:
        tree[f"{key}{dice.choice('xs.')}"] = tree.pop(key)
    elif kind == 2:
        other = dice.choice(list(tree))
        tree[key], tree[other] = tree[other], tree[key]
    elif isinstance(part, torch.Tensor):
        tree[key] = changed(part, dice)
    else:
        tree[key] = dice.choice(ODD)


def changed(tensor: torch.Tensor, dice: random.Random) -> Any:
    """A tensor of another shape, dtype or content."""
    dtypes = (torch.float16, torch.float64, torch.bfloat16, torch.int64, torch.bool, torch.uint8)
    others: list[Callable[[], Any]] = [
        lambda: tensor.to(dice.choice(dtypes)),
        lambda: tensor.flatten(),
        lambda: tensor[None],
        lambda: tensor.T if tensor.ndim == 2 else tensor[..., None],
        lambda: tensor[:0] if tensor.ndim else tensor[None][:0],
        lambda: tensor[1:] if tensor.ndim else tensor[None],
        lambda: tensor.float() * float("nan"),
        lambda: tensor.float() * float("inf"),
        lambda: tensor.float() * -1e30,
        lambda: torch.zeros_like(tensor),
        lambda: torch.tensor(float(dice.choice([0, -1, 3, 1e9]))),
        lambda: dice.choice(ODD),
    ]
    return dice.choice(others)()


# --- the property --------------------------------------------------------------------------------


def check(case: Case, damage: Damage, dice: random.Random) -> bool:
    """Damage a checkpoint and read it. Whether it was read all the same."""
    weights, whole = written(case.name)
    files = dict(whole)
    damage(files, weights, dice)
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder) / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        try:
            with little_memory():
                sae = read_sae(Path(folder) / weights, spec_of(case, Path(folder) / weights))
        except SaebenchError:
            return False
        x_nd = inputs(sae.d_model, n=3)
        codes = sae.encode(x_nd)
        assert codes.dense().shape == (3, sae.d_sae)
        assert sae.decode(codes).shape == (3, sae.d_out)
        return True


def profile(examples: int) -> Callable[[Any], Any]:
    """The same examples every time, kept nowhere."""
    return settings(
        max_examples=examples,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )


dice = st.randoms(use_true_random=False)
cases_of = {
    name: st.sampled_from([case for case in CASES.values() if case.format == name])
    for name in NAMES
}


def fuzz(name: str, damage: Damage, examples: int) -> None:
    @profile(examples)
    @given(case=cases_of[name], dice=dice)
    def run(case: Case, dice: random.Random) -> None:
        check(case, damage, dice)

    run()


every_format = pytest.mark.parametrize("name", NAMES)
every_damage = pytest.mark.parametrize("damage", [damage_bytes, damage_structure])


@every_format
@every_damage
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused(name: str, damage: Damage) -> None:
    fuzz(name, damage, 60)


@every_format
@every_damage
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_damaged_file_is_read_or_refused_at_length(name: str, damage: Damage) -> None:
    fuzz(name, damage, 500)


def test_every_format_is_damaged() -> None:
    assert set(FORMATS) == set(NAMES)


def test_damage_is_neither_always_fatal_nor_harmless() -> None:
    """Both outcomes are seen, so that both are tested."""
    rolls = random.Random(0)
    for damage in (damage_bytes, damage_structure):
        outcomes = {check(rolls.choice(list(CASES.values())), damage, rolls) for _ in range(60)}
        assert outcomes == {True, False}
