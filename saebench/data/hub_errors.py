"""What the `datasets` library, the hub and the disk raise, in words to act upon."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from saebench.errors import DataError, SaebenchError


@dataclass(frozen=True)
class Asked:
    """What is read, for messages. by: the entry's name. place: a folder, or owner/name at commit.

    repo, commit: '' for a folder.
    """

    by: str
    place: str
    repo: str = ""
    commit: str = ""

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Whatever the libraries raise inside the block becomes a DataError."""
        try:
            yield
        except SaebenchError:
            raise
        except Exception as error:  # many kinds, of half a dozen libraries
            raise self._explain(error) from error

    def _explain(self, error: BaseException) -> SaebenchError:
        from datasets.exceptions import FileNotFoundDatasetsError
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            OfflineModeIsEnabled,
        )

        from saebench.hub_errors import problem, unreachable

        chain = list(_chain(error))
        if OfflineModeIsEnabled.__name__ in str(error):  # `datasets` leaves out the cause
            chain = [OfflineModeIsEnabled(str(error))]
        for link in chain:
            hub = isinstance(link, HfHubHTTPError | EntryNotFoundError) or unreachable(link)
            if self.repo and hub:
                return problem(
                    link,
                    kind="dataset",
                    repo=self.repo,
                    revision=self.commit,
                    files=(),
                    by=self.by,
                    locked=True,
                )
        what, hint = " ".join(str(error).split()), ""
        if "scripts are no longer supported" in what:
            what = "it is made by a script, and scripts are not run"
            hint = 'the hub keeps a copy without of most:  revision = "refs/convert/parquet"'
        elif "BuilderConfig" in what or "Config name is missing" in what:
            hint = 'write  config = "…"  in [hub]'
        elif isinstance(error, FileNotFoundDatasetsError | FileNotFoundError):
            hint = "is it the whole dataset, its README.md included?"
        elif chain[-1] is not error:
            what = f"{type(chain[-1]).__name__}: {' '.join(str(chain[-1]).split())}"
        return DataError(f"{self.by}: {self.place}: {what}", hint)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes, the outermost first."""
    link: BaseException | None = error
    seen: list[BaseException] = []
    while link is not None and link not in seen:
        yield link
        seen.append(link)
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)
