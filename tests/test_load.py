"""`saebench.load_sae`: by name, file, folder and hub address, on its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import saebench
from saebench.errors import NotFound, SpecError, UsageError, WeightsError
from saebench.formats import write_sae
from saebench.formats.statistics import write_statistics
from tests import asking_format
from tests.asking_format import asking as asking
from tests.checkpoints import inputs, numbers, rows
from tests.content import sae_entry
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub
from tests.small import add_sae, random_sae

D, S = 8, 16
X_ND = inputs(D)


def same(a: saebench.saes.Sae, b: saebench.saes.Sae, d: int = 16) -> bool:  # type: ignore[name-defined]
    x_nd = inputs(d)
    return torch.equal(a.decode(a.encode(x_nd)), b.decode(b.encode(x_nd)))


def asking_entry(root: Path, semantics: str = "", **meta: str) -> Path:
    folder = root / "registry/saes/small"
    folder.mkdir(parents=True, exist_ok=True)
    asking_format.write(folder / "sae.safetensors", numbers(D, S, seed=2), rows(), **meta)
    (folder / "x.toml").write_text(f"{sae_entry()}\n[semantics]\n{semantics}\n")
    return folder / "sae.safetensors"


def test_every_way_to_name_one(tmp_path: Path, hub: HubStandIn) -> None:
    sae = random_sae(0)
    file = add_sae(tmp_path, "a", sae)
    alone = tmp_path / "run"
    alone.mkdir()
    write_sae(sae, alone / "sae.safetensors")
    hub.commit("me/saes", {"l1/sae.safetensors": file.read_bytes()})
    for source in (file, str(file), alone, str(alone), "hf-hub:me/saes/l1"):
        assert same(saebench.load_sae(source), sae), source
    assert same(saebench.load_sae("small/a", registry=tmp_path), sae)
    assert saebench.load_sae("tiny-vit/topk-k8").d_model == 64
    assert saebench.load_sae("tiny-vit/topk-k8", device="auto").d_sae == 384


def test_a_name_that_is_also_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add_sae(tmp_path, "a", random_sae(0))
    (tmp_path / "small/a").mkdir(parents=True)
    write_sae(random_sae(1), tmp_path / "small/a/sae.safetensors")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=r"(?s)an SAE of the registry, and.*\./small/a"):
        saebench.load_sae("small/a", registry=tmp_path)
    assert same(saebench.load_sae("./small/a", registry=tmp_path), random_sae(1))


def test_what_is_nowhere(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"(?s)no SAE is called 'tiny-vit/topk'.*did you mean"):
        saebench.load_sae("tiny-vit/topk")
    with pytest.raises(UsageError, match="no such file or folder"):
        saebench.load_sae(tmp_path / "absent.pt")
    (tmp_path / "page.pt").write_text("<!doctype html>")
    with pytest.raises(WeightsError, match="web page"):
        saebench.load_sae(tmp_path / "page.pt")


@pytest.mark.usefixtures("asking")
def test_facts_of_python(tmp_path: Path) -> None:
    W_ds, D_sd = numbers(D, S, seed=2), rows()
    file = asking_format.write(tmp_path / "a", W_ds, D_sd, scaling="zscore", threshold="1")
    with pytest.raises(SpecError, match=r"input .*; threshold"):
        saebench.load_sae(file)
    mean, std = X_ND.mean(dim=0), X_ND.std(dim=0)
    sae = saebench.load_sae(
        file, input_mean=mean.numpy(), input_std=std.tolist(), threshold=np.float32(0.5)
    )
    pre = ((X_ND - mean) / std).double().numpy() @ W_ds.double().numpy()
    z = np.where(pre >= 0.5, pre, 0)
    np.testing.assert_allclose(sae.encode(X_ND).dense(), z, atol=1e-5)
    x = z @ D_sd.double().numpy() * std.double().numpy() + mean.double().numpy()
    np.testing.assert_allclose(sae.decode(sae.encode(X_ND)), x, atol=1e-4)
    said = {fact.name: fact.source for fact in sae.record.facts}
    assert said["threshold"] == said["input_mean"] == "given"
    with pytest.raises(SpecError, match="colour: an SAE of this format has no such fact"):
        saebench.load_sae(file, input="raw", threshold=0.5, colour="red")


@pytest.mark.usefixtures("asking")
def test_a_statistics_file(tmp_path: Path) -> None:
    file = asking_format.write(tmp_path / "a", numbers(D, S, seed=2), rows(), threshold="1")
    write_statistics(tmp_path / "s", {"threshold": torch.tensor(0.25)}, {})
    sae = saebench.load_sae(file, statistics=tmp_path / "s")
    assert sae.record.estimated == ("threshold",)


@pytest.mark.usefixtures("asking")
def test_an_entry_is_not_contradicted(tmp_path: Path) -> None:
    asking_entry(tmp_path, "threshold = 0.5", threshold="1", norm="1")
    with pytest.raises(SpecError, match=r"threshold = 0\.25 is given, and 0\.5 is entry"):
        saebench.load_sae("small/x", registry=tmp_path, threshold=0.25, dictionary_norm="l2")
    sae = saebench.load_sae("small/x", registry=tmp_path, threshold=0.5, dictionary_norm="l2")
    said = {fact.name: fact.source for fact in sae.record.facts}
    assert said["threshold"] == "entry"
    assert said["dictionary_norm"] == "given"


def test_a_format_that_is_stated(tmp_path: Path) -> None:
    file = add_sae(tmp_path, "a", random_sae(0), format="saebench")
    assert saebench.load_sae(file, format="saebench").k == 4
    with pytest.raises(SpecError, match="'nonsense' is not one that is read"):
        saebench.load_sae(file, format="nonsense")
    with pytest.raises(SpecError, match=r"'nonsense' is given, and .*says 'saebench'"):
        saebench.load_sae("small/a", registry=tmp_path, format="nonsense")


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    file = add_sae(tmp_path, "a", random_sae(0))
    sae = saebench.load_sae(file, device="cuda")
    assert sae.device.type == "cuda"
    x_nd = inputs(16)
    there = sae.decode(sae.encode(x_nd.cuda())).cpu()
    here = saebench.load_sae(file)
    torch.testing.assert_close(there, here.decode(here.encode(x_nd)), rtol=1e-4, atol=1e-4)


def test_a_device_that_is_not(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--device nowhere"):
        saebench.load_sae(add_sae(tmp_path, "a", random_sae(0)), device="nowhere")


def test_no_model_library_is_needed() -> None:
    code = (
        "import sys, saebench; saebench.load_sae('tiny-vit/topk-k8'); "
        "print(sorted({'timm', 'open_clip', 'datasets', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert done.stdout.strip() == "[]"


def test_what_the_package_offers_is_there() -> None:
    for name in saebench.__all__:
        assert getattr(saebench, name).__name__ == name
