"""saebench's own checkpoint format, and every file that must not be taken for weights."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from saebench.errors import SpecError, WeightsError
from saebench.formats import read_entry, read_sae, write_sae
from saebench.specs import SaeSpec, WeightsSpec
from tests.test_saes import ACTIVATIONS, D, N, make, numbers


def spec(**more: Any) -> SaeSpec:
    return SaeSpec(
        name="one", path="one.toml", backbone="b", site="s", weights=WeightsSpec(), **more
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    path = tmp_path / "any.name"
    sae = make(name, pre_bias=True, scale=0.37, mean_d=numbers(D, seed=8))
    write_sae(sae, path, extra={"steps": 3})
    back = read_sae(path)
    x_nd = numbers(N, D, seed=9)
    assert torch.equal(back.encode(x_nd).dense(), sae.encode(x_nd).dense())
    assert torch.equal(back.decode(back.encode(x_nd)), sae.decode(sae.encode(x_nd)))
    assert (back.architecture, back.prefixes, back.k) == (sae.architecture, sae.prefixes, sae.k)
    assert back.stored_dtype == "float32"


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_stored_in_half_computed_in_float32(dtype: str, tmp_path: Path) -> None:
    path, sae = tmp_path / "sae.safetensors", make("jumprelu")
    write_sae(sae, path, dtype=dtype)
    back = read_sae(path)
    assert back.stored_dtype == dtype
    rounded = sae.W_enc_ds.to(getattr(torch, dtype)).float()
    assert torch.equal(back.W_enc_ds, rounded)


def test_too_large_for_float16(tmp_path: Path) -> None:
    sae = make("relu", mean_d=torch.full((D,), 1e6))
    with pytest.raises(WeightsError, match="mean does not fit"):
        write_sae(sae, tmp_path / "sae", dtype="float16")


def test_same_sae_same_bytes_and_readable_by_the_library(tmp_path: Path) -> None:
    path, other = tmp_path / "a", tmp_path / "b"
    hashes = {write_sae(make("gated"), p, extra={"b": 1, "a": 2}) for p in (path, other)}
    assert len(hashes) == 1
    assert path.read_bytes() == other.read_bytes()
    with safe_open(path, "pt") as file:
        assert file.metadata()["format"] == "saebench"
        assert json.loads(file.metadata()["config"])["extra"] == {"a": 2, "b": 1}
    assert torch.equal(load_file(path)["W_dec"], make("gated").W_dec_sd)


def test_sha256_of_the_entry_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    sha256 = write_sae(make("topk"), path)
    entry = SaeSpec(
        name="one",
        path=str(tmp_path / "one.toml"),
        backbone="b",
        site="s",
        weights=WeightsSpec(file="sae", sha256=sha256),
    )
    assert read_entry(entry).k == 5
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    os.utime(path, (0, 0))
    with pytest.raises(WeightsError, match="altered"):
        read_entry(entry)


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (LFS.encode(), "git lfs pull"),
        (b"<!DOCTYPE html><html><body>Sign in</body></html>", "web page"),
        (b"\x80\x02}q\x00.", "of no known|no weights file of a known kind|holds a dict"),
        (b"PK\x03\x04 and then nothing of an archive", "cannot be read"),
        ((10**6).to_bytes(8, "little") + b'{"a": 1}', "should have"),
        ((5).to_bytes(8, "little") + b"{nope", "safetensors header of .* is not readable JSON"),
    ],
)
def test_files_that_are_no_weights(data: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sae.safetensors"
    path.write_bytes(data)
    with pytest.raises(WeightsError, match=said) as caught:
        read_sae(path)
    assert str(path) in caught.value.what
    assert caught.value.hint


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.999])
def test_truncated(keep: float, tmp_path: Path) -> None:
    path = tmp_path / "sae"
    write_sae(make("topk"), path)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(WeightsError, match="download it again"):
        read_sae(path)


def test_missing(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="No such file"):
        read_sae(tmp_path / "nothing")


def tampered(path: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    """A file of a TopK SAE with some tensors or config keys changed (None removes)."""
    write_sae(make("topk"), path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    stored = {**load_file(path), **(tensors or {})}
    changed = {**json.loads(metadata["config"]), **config}
    metadata["config"] = json.dumps({k: v for k, v in changed.items() if v is not None})
    save_file(stored, path, metadata)
    return path


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"k": None}, "lacks, or has no place for: k"),
        ({"normalise": True}, "lacks, or has no place for: normalise"),
        ({"architecture": "tanh"}, "architecture 'tanh' is not known"),
        ({"architecture": "jumprelu", "k": None, "signed": None}, "needs the tensors threshold"),
        ({"d_sae": 99}, "99"),
        ({"tensors": {"extra": torch.zeros(2)}}, "has no tensors extra"),
        ({"tensors": {"b_dec": torch.zeros(3)}}, r"b_dec has shape \[3\]"),
        ({"tensors": {"b_dec": torch.full((D,), float("nan"))}}, "b_dec holds 8 NaN"),
        ({"tensors": {"b_dec": torch.zeros(D).int()}}, "stored as int32, which is no float"),
    ],
)
def test_what_does_not_belong_is_refused(
    change: dict[str, object], said: str, tmp_path: Path
) -> None:
    path = tampered(tmp_path / "sae", **change)  # type: ignore[arg-type]
    with pytest.raises(WeightsError, match=said) as caught:
        read_sae(path)
    assert str(path) in caught.value.what


def test_another_version(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "a", {"format": "saebench", "version": "7"})
    with pytest.raises(WeightsError, match="version 7"):
        read_sae(tmp_path / "a")


def test_unknown_formats_are_refused_by_their_keys(tmp_path: Path) -> None:
    save_file({"enc": torch.zeros(1), "dec": torch.zeros(1)}, tmp_path / "a")
    torch.save({"weights": torch.zeros(1)}, tmp_path / "b")
    with pytest.raises(WeightsError, match="it holds: dec, enc"):
        read_sae(tmp_path / "a")
    with pytest.raises(WeightsError, match="it holds: weights"):
        read_sae(tmp_path / "b")


class Touch:
    """Unpickled by plain `pickle`, it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return open, (str(self.path), "w")


def test_no_code_of_a_file_is_run(tmp_path: Path) -> None:
    torch.save({"weights": Touch(tmp_path / "touched")}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="needs code to be read"):
        read_sae(tmp_path / "evil.pt")
    assert not (tmp_path / "touched").exists()


def test_format_and_semantics_of_the_entry(tmp_path: Path) -> None:
    path = tmp_path / "sae"
    write_sae(make("topk"), path)
    assert read_sae(path, spec(format="saebench")).k == 5
    with pytest.raises(SpecError, match="'colourful' is not one that is read"):
        read_sae(path, spec(format="colourful"))
    with pytest.raises(SpecError, match="colour: an SAE of this format has no such fact"):
        read_sae(path, spec(semantics={"colour": "red"}))
