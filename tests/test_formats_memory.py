"""Peak memory of loading, beside the tensors themselves: nothing is held twice without need."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

# In a process of its own, whose peak is not that of other tests.
SCRIPT = """
import json, sys
from pathlib import Path
import torch
from tests.bench.checkpoints import LAYOUTS, load, make

def kib(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))

torch.set_num_threads(1)
found, folder = {}, Path(sys.argv[1])
for layout, write in LAYOUTS.items():
    load(write(folder, make(768)))  # what the libraries take once
    path = write(folder, make(16 * 768))  # matrices that malloc gives back at once
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = kib("VmRSS")
    sae = load(path)
    found[layout] = (kib("VmHWM") - before) * 1024 / sae.n_bytes
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak is read from /proc")
def test_peak_memory_of_loading(tmp_path: Path) -> None:
    """In float32: 1.0 of the tensors as they are, 1.5 where the decoder is transposed."""
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    found = json.loads(run.stdout)
    most = {"saebench": 1.1, "saev": 1.1, "dictionary_learning": 2.1}
    assert {layout for layout in most if not 0.9 < found[layout] < most[layout]} == set()
