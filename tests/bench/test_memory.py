"""Peak memory of an evaluation beyond the weights: below 1 GiB, whatever the number of images."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, resource, sys
import torch
from tests.bench.setting import *

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

torch.set_num_threads(1)
with torch.inference_mode():
    sae, x_btd = make_sae(), activations()
    ctx = context(x_btd, sae, kinds=KINDS, class_names=["a"] * 10)
    tasks = [started(ctx)]
    sae.encode(x_btd[0, :8])  # the libraries' own buffers
    before, peaks = peak(), []
    for i in range(int(sys.argv[1])):
        measure_all(x_btd + i, [sae], tasks, first=i * len(x_btd))
        peaks.append(peak() - before)
print(json.dumps(peaks))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no resource module")
def test_peak_memory_is_small_and_flat() -> None:
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "5"], capture_output=True, text=True, check=True
    )
    peaks = json.loads(run.stdout)
    print([f"{peak / 2**20:.0f} MiB" for peak in peaks])
    assert max(peaks) < 2**30
    assert peaks[-1] - peaks[1] < 32 * 2**20  # the first batches fill what is then used again
