"""Peak memory of loading, beside the tensors themselves: nothing is held twice without need."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, whose peak is not that of other tests.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.bench.checkpoints import LAYOUTS, MORE_LAYOUTS, load, make

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
found, small, large = {}, make(768), make(16 * 768)
for layout, write in (LAYOUTS | MORE_LAYOUTS).items():
    folder = Path(sys.argv[1], layout)
    folder.mkdir()
    load(write(folder, small))  # what the libraries take once
    path = write(folder, large)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kib("VmRSS")
    sae = load(path)
    found[layout] = (kib("VmHWM") - before) * 1024 / sae.n_bytes
    path.unlink()
print(json.dumps(found))
"""
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}  # what is freed is given back at once

MOST = {
    "saebench": 1.1,
    "saev": 1.1,
    "pickle": 1.1,
    "legacy": 1.1,
    "npz": 1.1,
    # The decoder is transposed, or what was trained is folded into the matrices.
    "dictionary_learning": 2.1,
    "rescaled": 2.1,
    "llama scope": 2.1,
    "whitened": 2.3,  # with the two matrices of the whitening, d x d, once more as float64
    # What is stored, and float32.
    "bfloat16": 1.6,
    "float64": 3.1,
    # What was compressed, and the tensors.
    "pickle in gzip": 2.1,
}
"""Peak in units of the tensors in float32."""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    """In float32: 1.0 of the tensors as they are, 2.0 where they are folded."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
        env=os.environ | AT_ONCE,
    )
    found = json.loads(run.stdout)
    assert found.keys() == MOST.keys()
    assert {name: peak for name, peak in found.items() if not 0.9 < peak < MOST[name]} == {}
