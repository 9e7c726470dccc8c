"""Lets a process keep the memory that it frees, for what comes next.

glibc's malloc gives every large block back to the system when it is freed, and the next one of the
same size is then cleared and mapped anew, page by page. A convolutional backbone on a CPU allocates
and frees gigabytes in every batch: the faults take up to twice as long as its arithmetic. The price
is that memory, once used, stays with the process until it ends: in a trial of mixed sizes twice of
what is in use at the peak.
"""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # mallopt(3)


def keep_freed_memory() -> bool:
    """Ask malloc to neither map large blocks one by one nor return what is free at the end.

    Returns whether it could be asked: on Linux with glibc. For a process of its own (the command
    line), not for a library inside another's.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return False
    return bool(mallopt(_M_MMAP_MAX, 0)) and bool(mallopt(_M_TRIM_THRESHOLD, -1))
