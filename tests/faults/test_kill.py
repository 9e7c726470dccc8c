"""kill -9 in the middle of writing, and several processes in one folder at once.

Processes are forked from one fresh interpreter, so that each costs milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

from saebench.results import ResultsFolder
from saebench.store import Store
from tests.results_rows import unit

ROOT = Path(__file__).parents[2]

PRELUDE = """
import os, random, signal, sys, time, warnings
from pathlib import Path
import numpy as np
from saebench.results import ResultsFolder
from saebench.store import Store
from tests.results_rows import unit
warnings.simplefilter("error")
out = Path(sys.argv[1])

def fork(work, *arguments):
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work(*arguments)
        status = 0
    finally:
        os._exit(status)

def wait(pids):
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)
"""


def run(script: str, out: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", PRELUDE + script, str(out)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_leaves_only_whole_things(tmp_path: Path) -> None:
    killed = run(
        """
def write(turn):
    folder, store = ResultsFolder(out / "results", create=True), Store(out / "store")
    for i in range(10_000):
        unit_id = f"{turn:016x}{i:016x}"
        folder.partial.save(unit_id, 0, {"sum": np.full(2000, float(i))})
        folder.write_unit(unit_id, {"i": i}, unit(unit_id), {"latent": np.arange(3)})
        folder.write_error(unit_id[::-1], {}, ValueError("no"))
        store.put("mean", {"turn": turn, "i": i}, {"mean": np.full(2000, float(i))})
        if i % 5 == 4:
            folder.merge()

chance = random.Random(0)
for turn in range(8):
    pid = fork(write, turn)
    begun = out / "results" / "_rows" / f"{turn:016x}{1:016x}.parquet"
    while not begun.exists():
        time.sleep(0.001)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
    print(turn)
""",
        tmp_path,
    )
    assert len(killed.split()) == 8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder, store = ResultsFolder(tmp_path / "results", create=True), Store(tmp_path / "store")
        ids = folder.unit_ids()
        assert len(ids) >= 2 * 8
        assert all(folder.has(unit_id) for unit_id in ids)
        assert set(folder.identities()) == set(ids)
        rows = pd.read_parquet(folder.merge())
        assert rows.groupby("unit_id").size().to_dict() == dict.fromkeys(ids, 4)
        assert rows["value"].tolist() == [0.0, 0.125, 0.25, 0.375] * len(ids)
        assert set(folder.latents()["unit_id"]) == set(ids)
        for unit_id in ids:
            state = folder.partial.load(unit_id, 0)
            assert state is not None
            np.testing.assert_array_equal(state["sum"], np.full(2000, float(int(unit_id[16:], 16))))
        assert all(record["error"] == "no" for record in folder.errors().values())
        assert store.verify() == []
        for entry in store.entries():
            fields = json.loads((entry / "manifest.json").read_bytes())["fields"]
            kept = store.find("mean", fields)
            assert kept is not None
            assert set(kept.arrays["mean"]) == {float(fields["i"])}


def test_several_runs_write_and_merge_one_folder(tmp_path: Path) -> None:
    run(
        """
def work(name):
    folder = ResultsFolder(out, create=True)
    for i in range(8):
        for unit_id in (name * 31 + str(i), "f" * 31 + str(i)):  # its own, and one for all
            folder.write_unit(unit_id, {}, unit(unit_id))
        folder.merge()
        assert len(ResultsFolder(out).rows()) >= 4 * 2 * (i + 1)

wait([fork(work, name) for name in "abc"])
""",
        tmp_path,
    )
    ids = sorted(name * 31 + str(i) for name in "abcf" for i in range(8))
    expected = [row["value"] for unit_id in ids for row in unit(unit_id)]
    rows = pd.read_parquet(tmp_path)
    assert rows["unit_id"].unique().tolist() == ids
    assert rows["value"].tolist() == expected
    assert list(tmp_path.rglob("*.tmp")) == []
    assert ResultsFolder(tmp_path).merge() == tmp_path / "results.parquet"


def test_of_several_processes_one_builds(tmp_path: Path) -> None:
    run(
        """
def build():
    with (out / "built").open("a") as file:
        file.write("once ")
    time.sleep(0.3)
    return {"n": np.array(7)}

def work():
    assert Store(out).get("mean", {"n": 1}, build).arrays["n"] == 7

wait([fork(work) for _ in range(4)])
""",
        tmp_path,
    )
    assert (tmp_path / "built").read_text() == "once "
    assert Store(tmp_path).verify() == []


def test_a_builder_that_is_killed_does_not_block_the_others(tmp_path: Path) -> None:
    run(
        """
def hang():
    (out / "begun").touch()
    time.sleep(60)

pid = fork(lambda: Store(out).get("mean", {}, hang))
while not (out / "begun").exists():
    time.sleep(0.01)
os.kill(pid, signal.SIGKILL)
os.waitpid(pid, 0)
assert Store(out).get("mean", {}, lambda: {"n": np.array(7)}).arrays["n"] == 7
""",
        tmp_path,
    )
