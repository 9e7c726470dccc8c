"""Where a checkpoint is: files, folders, repositories."""

from __future__ import annotations

from pathlib import Path

import pytest

from saebench.address import locate, parse_hub, weights_in
from saebench.errors import UsageError, WeightsError
from tests.content import write
from tests.hub_stand_in import HubStandIn
from tests.hub_stand_in import hub as hub


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["cfg.json", "sae_weights.safetensors", "sparsity.safetensors"], 1),  # SAELens
        (["ae.pt", "config.json", "checkpoints/ae_0.pt", "checkpoints/ae_10.pt"], 0),
        (["config.json", "n_images_2600058.pt", "optimizer.pt"], 1),  # ViT-Prisma
        (["hyperparams.json", "checkpoints/final.safetensors"], 1),  # Llama Scope
        (["a.arch_ref", "a.avg_weights.safetensors", "a.weights.safetensors"], 2),  # saeco
        (["README.md", "1200013184.pt"], 1),  # no usual name: CLIP-Scope
        (["params.npz"], 0),
    ],
)
def test_the_weights_among_the_files_of_a_project(names: list[str], chosen: int) -> None:
    assert weights_in(names) == [names[chosen]]


def test_a_file_a_folder_and_the_configurations_beside(tmp_path: Path) -> None:
    root = write(tmp_path, {"run/checkpoints/final.safetensors": "w", "run/hyperparams.json": "{}"})
    found = locate(root / "run")
    assert found.path == root / "run/checkpoints/final.safetensors"
    assert found.beside == {"../hyperparams.json": root / "run/hyperparams.json"}
    assert found.configurations == {"hyperparams.json": root / "run/hyperparams.json"}
    assert found.title == "run"
    assert locate(str(found.path)) == found
    (root / "run/cfg.json").write_text("{}")
    (root / "run/checkpoints/cfg.json").write_text("{}")
    beside = locate(root / "run").configurations
    assert beside["cfg.json"] == root / "run/checkpoints/cfg.json"


@pytest.mark.parametrize(
    ("file", "title"),
    [
        ("some/layer_9/sae.pt", "layer_9"),
        ("some/clip-b16_relu.pth", "clip-b16_relu"),
        ("some/resid.pkl.gz", "resid"),
        ("some/run/checkpoints/ae_100.pt", "run"),
    ],
)
def test_what_a_checkpoint_is_called(tmp_path: Path, file: str, title: str) -> None:
    assert locate(write(tmp_path, {file: "w"}) / file).title == title


def test_what_cannot_be_located(tmp_path: Path) -> None:
    write(tmp_path, {"two/sae.pt": "", "two/model.safetensors": "", "none/notes.txt": ""})
    with pytest.raises(UsageError, match=r"(?s)several files.*model\.safetensors.*sae\.pt.*name"):
        locate(tmp_path / "two")
    with pytest.raises(UsageError, match=r"no weights file of a usual name; there: notes\.txt"):
        locate(tmp_path / "none")
    with pytest.raises(UsageError, match="no such file or folder"):
        locate(tmp_path / "absent")


@pytest.mark.parametrize(
    ("address", "parts"),
    [
        ("hf-hub:o/n", ("o/n", "", "")),
        ("hf-hub:o/n@v1/a/b.pt", ("o/n", "v1", "a/b.pt")),
        ("hf-hub:o/n/folder/", ("o/n", "", "folder")),
    ],
)
def test_an_address_of_the_hub(address: str, parts: tuple[str, str, str]) -> None:
    assert parse_hub(address) == parts


@pytest.mark.parametrize("address", ["hf-hub:", "hf-hub:o", "hf-hub:/n", "hf-hub:o/n/../../x"])
def test_no_address_of_the_hub(address: str) -> None:
    with pytest.raises(UsageError, match="is no place on the hub"):
        parse_hub(address)


def test_files_of_a_repository(hub: HubStandIn) -> None:
    first = hub.commit("me/saes", {"l9/sae.pt": b"old"})
    files = {"l9/sae.pt": b"new", "l9/config.json": b"{}", "config.json": b"{}", "l8/sae.pt": b"8"}
    second = hub.commit("me/saes", files)
    found = locate("hf-hub:me/saes/l9")
    assert found.path.read_bytes() == b"new"
    assert (found.repo, found.commit, found.file) == ("me/saes", second, "l9/sae.pt")
    assert list(found.beside) == ["config.json"]
    assert locate(f"hf-hub:me/saes@{first}/l9/sae.pt").path.read_bytes() == b"old"
    asked = len(hub.gets())
    assert locate("hf-hub:me/saes/l9/sae.pt") == found
    assert all("api" in path for path in hub.gets()[asked:])  # nothing is downloaded again
    with pytest.raises(UsageError, match=r"no weights file of a usual name"):
        locate("hf-hub:me/saes")
    with pytest.raises(UsageError, match=r"no file or folder 'l7'.*\n.*l8/sae\.pt, l9/sae\.pt"):
        locate("hf-hub:me/saes/l7")
    with pytest.raises(WeightsError, match="me/nothing"):
        locate("hf-hub:me/nothing")


def test_without_network_what_was_fetched_is_found(
    hub: HubStandIn, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.commit("me/saes", {"sae.pt": b"w", "config.json": b"{}"})
    before = locate("hf-hub:me/saes")
    hub.use(monkeypatch, tmp_path, offline=True)
    assert locate("hf-hub:me/saes") == before
