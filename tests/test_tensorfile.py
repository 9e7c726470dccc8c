"""safetensors files as bytes: one file for one content, known by its tensors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from saebench.errors import WeightsError
from saebench.tensorfile import serialised, tensors_sha256

_WRITES = """
import sys, torch
from pathlib import Path
from saebench.formats.statistics import write_statistics
facts = {"input_mean": torch.arange(3.0), "threshold": torch.tensor(0.5)}
origin = {key: key for key in ("sae", "backbone", "site", "tokens", "dataset", "split", "images")}
write_statistics(Path(sys.argv[1]), facts, {name: origin for name in facts})
"""


def test_every_process_writes_the_same_statistics(tmp_path: Path) -> None:
    files = [tmp_path / str(seed) for seed in range(3)]
    for seed, file in enumerate(files):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed)}
        command = [sys.executable, "-c", _WRITES, str(file)]
        subprocess.run(command, check=True, env=environment)
    assert len({file.read_bytes() for file in files}) == 1
    assert load_file(files[0])["input_mean"].tolist() == [0, 1, 2]


def test_texts_in_any_order_are_one_file() -> None:
    tensors = {"b": torch.ones(2), "a": torch.zeros(3, dtype=torch.float16)}
    texts = {f"key {i}": "é" * i for i in range(20)}
    data = serialised(tensors, texts)
    assert all(serialised(tensors, texts) == data for _ in range(5))
    assert serialised(dict(reversed(tensors.items())), dict(reversed(texts.items()))) == data
    read = load(data)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


def test_tensors_are_known_without_the_texts(tmp_path: Path) -> None:
    def of(texts: dict[str, str] | None = None, **tensors: torch.Tensor) -> str:
        save_file(tensors, tmp_path / "f", texts)
        return tensors_sha256(tmp_path / "f")

    one, two = torch.tensor([1.0, 2.0]), torch.tensor([[1.0], [2.0]])
    same = of(a=one, b=two)
    assert of({"x": "y"}, b=two, a=one) == same
    others = [of(a=one), of(a=one, c=two), of(a=two.clone(), b=two), of(a=one, b=two.half())]
    others += [of(a=one, b=two + 1), of(a=one.view(torch.int32), b=two)]
    assert len({same, *others}) == 7


@pytest.mark.parametrize("data", [b"", b"numbers", b"<html>" * 9])
def test_no_whole_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "f").write_bytes(data)
    with pytest.raises(WeightsError, match="no whole safetensors file"):
        tensors_sha256(tmp_path / "f")


def test_a_file_that_is_cut_anywhere(tmp_path: Path) -> None:
    data = serialised({"a": torch.ones(3)}, {"x": "y"})
    for length in range(len(data)):
        (tmp_path / "f").write_bytes(data[:length])
        with pytest.raises(WeightsError, match="no whole safetensors file"):
            tensors_sha256(tmp_path / "f")


def test_no_torch_is_loaded() -> None:
    code = "import sys, saebench.beside; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
