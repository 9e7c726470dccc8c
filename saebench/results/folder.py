"""A results folder: the rows of each unit, and the one table that they are merged into.

    results.parquet             all rows, for plain pandas
    _rows/<unit>.parquet        a unit's rows, written last: where it is, the unit is done
    _rows/<unit>.json           its identity
    _latents/ _replicates/      <unit>.parquet: one row a latent; the bootstrap's values
    _errors/<unit>.json         why a unit failed
    _partial/                   states of segments (saebench.segments)
    _schema.json _lock          version of the rows; held while merging

Only `results.parquet` has a plain name: pandas and pyarrow skip the others when they read the
folder. Any number of runs may write into one folder at once.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from saebench.atomic import remove_leftovers, unwritable, write_bytes, write_files
from saebench.errors import ResultsError, SaebenchError, WriteError
from saebench.results.merge import gather, listing, merged, merged_bytes
from saebench.results.schema import SCHEMA_VERSION
from saebench.results.seal import DamagedFile, is_whole, parquet_bytes, read_parquet
from saebench.results.side import latents_table, replicates_table, side_frame
from saebench.results.table import check_version, table_of
from saebench.segments import SegmentStore

if TYPE_CHECKING:
    import pandas as pd

_LOCK_TIMEOUT_S = 600.0


class ResultsFolder:
    """The results below `out`.

    `create` makes the folder and checks that it can be written; without it nothing is touched.
    Errors: ResultsError for a file, a folder of something else, rows of a newer schema, and (with
    `create`) a folder that cannot be written.
    """

    def __init__(self, out: Path, *, create: bool = False) -> None:
        self.out = Path(out)
        self.path = self.out / "results.parquet"
        self._rows = self.out / "_rows"
        self._latents = self.out / "_latents"
        self._replicates = self.out / "_replicates"
        self._errors = self.out / "_errors"
        self.partial = SegmentStore(self.out / "_partial")
        self._check()
        if create:
            self._create()

    def _check(self) -> None:
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise ResultsError(
                f"{self.out} is a file: results are a folder", "choose another folder with --out"
            )
        marker = self.out / "_schema.json"
        if marker.exists():
            # A damaged marker is written anew: every file of rows says its version itself.
            with suppress(ValueError, KeyError, TypeError):
                check_version(int(json.loads(marker.read_bytes())["schema_version"]), self.out)
        elif not self._rows.exists():
            others = sorted(p.name for p in self.out.iterdir() if not p.name.startswith((".", "_")))
            if others:
                raise ResultsError(
                    f"{self.out} is not a results folder: it holds {', '.join(others[:3])}",
                    "choose a new or empty folder with --out",
                )

    def _create(self) -> None:
        try:
            for folder in (self._rows, self._latents, self._replicates, self._errors):
                folder.mkdir(parents=True, exist_ok=True)
            marker = json.dumps({"schema_version": SCHEMA_VERSION})
            write_bytes(self.out / "_schema.json", marker.encode(), sync=False)
        except OSError as error:
            cannot = unwritable(self.out, error)
            raise ResultsError(cannot.what, cannot.hint or "choose another --out") from error
        except WriteError as error:
            raise ResultsError(error.what, error.hint or "choose another --out") from error

    # Units

    def has(self, unit_id: str) -> bool:
        """Whether a unit's rows are there, and undamaged."""
        return is_whole(self._rows / f"{unit_id}.parquet")

    def write_unit(
        self,
        unit_id: str,
        identity: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        latents: Mapping[str, np.ndarray] | None = None,
        replicates: Mapping[str, np.ndarray] | None = None,
    ) -> None:
        """Check a unit and write it; its rows appear last, so that they say that it is done.

        rows: one dict a row, see `saebench.results.schema`. latents: equally long columns, one row
        a latent and token kind; [n m] becomes lists, and masked entries are left out. replicates:
        by `group|metric|variant`.
        Errors: ResultsError for what the schema does not allow, WriteError.
        """
        if not rows:
            raise ResultsError(f"the unit {unit_id} has no rows: a task yields at least one")
        strays = sorted({str(row.get("unit_id")) for row in rows} - {unit_id})
        if strays:
            raise ResultsError(f"rows of the unit {strays[0]} among those of {unit_id}")
        table = table_of(rows)
        files: dict[Path, bytes] = {}
        if latents:
            data = parquet_bytes(latents_table(rows[0], latents))
            files[self._latents / f"{unit_id}.parquet"] = data
        if replicates:
            data = parquet_bytes(replicates_table(rows, replicates))
            files[self._replicates / f"{unit_id}.parquet"] = data
        files[self._rows / f"{unit_id}.json"] = _json(identity)
        files[self._rows / f"{unit_id}.parquet"] = parquet_bytes(table)
        write_files(files)

    def remove(self, unit_id: str) -> None:
        """Forget a unit: rows first, so that it is "not done" at once. Errors: WriteError."""
        for folder in (self._rows, self._latents, self._replicates):
            _unlink(folder / f"{unit_id}.parquet")
        _unlink(self._rows / f"{unit_id}.json")
        self.clear_error(unit_id)
        self.partial.discard(unit_id)

    def unit_ids(self) -> list[str]:
        """The units whose rows are there, sorted."""
        return sorted(path.stem for path in self._rows.glob("*.parquet"))

    def identities(self) -> dict[str, dict[str, Any]]:
        """What each unit that is there was measured on."""
        found = {}
        for unit_id in self.unit_ids():
            with suppress(OSError, ValueError):
                found[unit_id] = json.loads((self._rows / f"{unit_id}.json").read_bytes())
        return found

    # Failures

    def write_error(
        self, unit_id: str, identity: Mapping[str, Any], error: BaseException, traceback: str = ""
    ) -> None:
        """Record why a unit failed. Errors: WriteError."""
        record = {
            "unit_id": unit_id,
            "type": type(error).__name__,
            "error": error.what if isinstance(error, SaebenchError) else str(error),
            "hint": error.hint if isinstance(error, SaebenchError) else "",
            "traceback": traceback,
            "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
            "identity": identity,
        }
        record["error"] = record["error"] or record["type"]
        write_bytes(self._errors / f"{unit_id}.json", _json(record))

    def errors(self) -> dict[str, dict[str, Any]]:
        """unit id -> record (`type error hint traceback created_utc identity`) of what failed.

        A unit whose rows are there has not failed, whatever was recorded before.
        """
        done = set(self.unit_ids())
        records = {}
        for path in sorted(self._errors.glob("*.json")):
            if path.stem not in done:
                try:
                    records[path.stem] = json.loads(path.read_bytes())
                except FileNotFoundError:  # cleared a moment ago by another run
                    continue
                except (OSError, ValueError):
                    records[path.stem] = {"unit_id": path.stem, "error": f"{path} is damaged"}
        return records

    def clear_error(self, unit_id: str) -> None:
        """Forget that a unit failed."""
        _unlink(self._errors / f"{unit_id}.json")

    # Tables

    def rows(self) -> pd.DataFrame:
        """All rows, as `pandas.read_parquet(out)` gives them after a merge.

        From the merged table where it is up to date. A damaged file is named in a warning.
        Errors: ResultsError for rows of a newer schema.
        """
        files = listing(self._rows)
        table = merged(self.path, files)
        if table is None:
            table, damaged = gather(self._rows, files)
            _warn_damaged(damaged.values())
        return table.to_pandas()

    def latents(self, unit_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """One row a latent and token kind, of all or some units, in the order of their ids."""
        return self._side(self._latents, unit_ids)

    def replicates(self, unit_ids: Iterable[str] | None = None) -> pd.DataFrame:
        """The bootstrap's values: `replicates` [500] by unit, split, group, metric and variant.

        Replicate r has the same image weights everywhere, so that two SAEs are compared by the
        difference of their replicates.
        """
        return self._side(self._replicates, unit_ids)

    def merge(self) -> Path:
        """Rebuild `results.parquet` from all rows that are there, and return its path.

        A damaged file of rows is set aside as `<unit>.parquet.damaged`, named in a warning and
        recorded as that unit's failure, so that the next run measures it again.
        Errors: ResultsError, WriteError.
        """
        from filelock import FileLock, Timeout

        lock = self.out / "_lock"
        try:
            with FileLock(lock, timeout=_LOCK_TIMEOUT_S):
                for folder in (self.out, self._rows, self._latents, self._replicates, self._errors):
                    remove_leftovers(folder)
                self._merge()
        except Timeout:
            raise ResultsError(
                f"another process has been merging {self.out} for {_LOCK_TIMEOUT_S / 60:.0f} min",
                f"end it if it hangs (it holds {lock}), and run the same command again",
            ) from None
        except OSError as error:
            raise unwritable(lock, error) from error
        return self.path

    def _merge(self) -> None:
        files = listing(self._rows)
        if merged(self.path, files) is not None:
            return
        table, damaged = gather(self._rows, files)
        for unit_id, error in damaged.items():
            path = self._rows / f"{unit_id}.parquet"
            identity = self.identities().get(unit_id, {})
            os.replace(path, path.with_name(f"{path.name}.damaged"))
            self.write_error(unit_id, identity, error)
            del files[unit_id]
        _warn_damaged(damaged.values())
        write_bytes(self.path, merged_bytes(table, files))

    def _side(self, folder: Path, unit_ids: Iterable[str] | None) -> pd.DataFrame:
        tables, damaged = [], []
        for unit_id in self.unit_ids() if unit_ids is None else unit_ids:
            try:
                tables.append(read_parquet(folder / f"{unit_id}.parquet"))
            except FileNotFoundError:
                continue
            except DamagedFile as error:
                error.hint = "remove it and the unit's rows, and run the same command again"
                damaged.append(error)
        _warn_damaged(damaged)
        return side_frame(tables or [pa.table({"unit_id": pa.array([], pa.string())})])


def _json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, indent=1).encode()


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise unwritable(path, error) from error


def _warn_damaged(errors: Iterable[DamagedFile]) -> None:
    for error in errors:
        warnings.warn(str(error), stacklevel=4)
