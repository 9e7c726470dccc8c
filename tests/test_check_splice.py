"""`saebench check`: what it says of splices, and of tasks that read heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from saebench import splice
from saebench.registry import Registry
from saebench.testing import Check, check_backbone, check_sae, check_task
from tests.content import write
from tests.small import add_sae, random_sae, setting

LAST = '[sites."blocks.2"]\npath = "blocks.2"\nwidth = 16\ncls = 1\ngrid = [4, 4]\n'
SPLICED, SEEN = "it can be spliced", "its tokens reach the output"

HEADS = '''"""The mean loss on each head: clean, and with everything ablated by the mean."""

from saebench.task import Measurement, Metric, Task


class Heads(Task):
    name, version, needs = "heads", 1, ("readouts",)
    metrics = (
        Metric("loss", unit="nat", better="lower", bounds=(0, None)),
        Metric("loss_mean", unit="nat", better="lower", bounds=(0, None)),
    )

    def start(self, ctx):
        from saebench.metrics import Total

        assert ctx.sees("all") and ctx.sees("registers") is None
        self.heads = ctx.readouts
        self.parts = {metric.name: Total() for metric in self.metrics}

    def update(self, batch):
        import torch

        (head,) = self.heads
        outputs = {"loss": batch.clean_output, "loss_mean": batch.ablated_output("mean")}
        for name, output in outputs.items():
            loss_b = torch.nn.functional.cross_entropy(
                head.logits(output), torch.as_tensor(batch.labels), reduction="none"
            )
            self.parts[name].add(loss_b.sum(), batch.n_images)

    def results(self):
        for name, part in self.parts.items():
            yield Measurement(name, part.mean(), n=part.n, columns=self.heads[0].columns)
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = setting(tmp_path_factory.mktemp("content"))
    entry = folder / "registry/backbones/small.toml"
    entry.write_text(f"{entry.read_text()}\n{LAST}")
    return folder


def checked(root: Path, name: str) -> dict[str, Check]:
    return {check.name: check for check in check_sae(Registry.load([root]), name)}


def test_an_sae_and_a_pair_can_be_spliced(root: Path) -> None:
    for name in ("small/a", "small/cls", "small/meta"):
        found = checked(root, name)
        assert found[SPLICED].passed
        assert "the clean output bit for bit" in found[SPLICED].detail
        assert found[SEEN].passed
        assert "the output changes with them" in found[SEEN].detail


def test_tokens_that_the_output_does_not_see_are_a_remark(root: Path) -> None:
    add_sae(root, "last", random_sae(0), site="blocks.2", tokens="patches")
    found = checked(root, "small/last")
    assert found[SEEN].passed
    assert found[SEEN].detail.startswith("vacuous: the output of 'small' does not depend on patch")
    assert "mean cosine 1.0000" in found[SPLICED].detail


def test_a_splice_that_puts_tokens_elsewhere(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = splice.with_parts
    monkeypatch.setattr(splice, "with_parts", lambda acts, *how: right(acts, *how).roll(1, dims=1))
    found = checked(root, "small/a")
    assert not found[SPLICED].passed
    assert "embedding differs by" in found[SPLICED].detail


def test_a_transcoder_is_not_spliced(root: Path) -> None:
    from dataclasses import replace

    add_sae(root, "transcoder", replace(random_sae(0), transcoder=True))
    found = checked(root, "small/transcoder")
    assert found[SPLICED].passed
    assert "not spliced" in found[SPLICED].detail


def test_a_backbone_says_what_its_output_does_not_see(root: Path) -> None:
    found = {check.name: check for check in check_backbone(Registry.load([root]), "small")}
    resumed = "resume gives the full forward's output"
    assert all(check.passed for check in found.values())
    assert found[f"site blocks.1: {resumed}"].detail == "bit for bit"
    assert found[f"site blocks.2: {resumed}"].detail == (
        "bit for bit; does not depend on its patches"
    )


def test_a_task_that_reads_heads(root: Path) -> None:
    write(root, {"tasks/heads.py": HEADS})
    found = {check.name: check for check in check_task(Registry.load([root]), "heads")}
    assert all(check.passed for check in found.values()), found
    heads = found["gets the heads and options it asks for"].detail
    assert heads == "1 heads (head_ce, classifier, model)"
    assert found["reports what it declares"].detail == "2 rows on the identity control"


def test_a_task_whose_value_depends_on_the_batches(root: Path) -> None:
    # A mean of the batches' largest values: merges, and is not the same for another partition.
    broken = HEADS.replace("class Heads", "class Extremes").replace('"heads"', '"extremes"')
    broken = broken.replace("loss_b.sum(), batch.n_images", "loss_b.max(), 1")
    write(root, {"tasks/extremes.py": broken})
    failed = [c for c in check_task(Registry.load([root]), "extremes") if not c.passed]
    assert [check.name for check in failed] == ["does not depend on the batches"]
    assert torch.is_inference_mode_enabled() is False
