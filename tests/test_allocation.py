"""Freed memory is kept: the same large block, again and again, is mapped once."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys
import torch
from saebench.allocation import keep_freed_memory
assert sys.argv[1] == "as it is" or keep_freed_memory()
for _ in range(24):  # until the blocks that are kept fit
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    torch.empty(1 << 26, dtype=torch.uint8).fill_(1)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", CODE, how], capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's malloc")
def test_a_block_that_was_freed_is_not_mapped_anew() -> None:
    # 8 blocks of 64 MiB are 131,072 pages of 4 KiB, or 256 huge ones.
    as_it_is, kept = faults("as it is"), faults("kept")
    assert as_it_is >= 250
    assert kept < as_it_is / 10
