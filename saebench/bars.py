"""Progress bars that make room for those of downloads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.progress import Progress

from saebench import hub


@contextmanager
def stepping_aside(bar: Progress) -> Iterator[None]:
    """Inside the block, the bar vanishes while something is downloaded, and then goes on.

    Two that draw on one terminal at once would print a line for every step of the download.
    """

    @contextmanager
    def aside() -> Iterator[None]:
        if bar.disable:
            yield
            return
        kept, bar.live.transient = bar.live.transient, True
        bar.stop()
        try:
            yield
        finally:
            bar.live.transient = kept
            bar.start()

    token = hub.downloading.set(aside)
    try:
        yield
    finally:
        hub.downloading.reset(token)
