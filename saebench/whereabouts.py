"""Whether the weights of an entry are on this machine, told without asking any hub."""

from __future__ import annotations

from dataclasses import dataclass

from saebench import hub
from saebench.beside import beside_wanted
from saebench.identity import file_sha256
from saebench.specs import SaeSpec
from saebench.weights import Entry, wanted, weights_path


@dataclass(frozen=True)
class Whereabouts:
    """What can be said of an entry's weights without asking or downloading anything."""

    text: str
    wrong: bool = False  # they are here, and not those that the entry or the lock describes


def whereabouts(spec: Entry) -> Whereabouts | None:
    """Whether the weights are on this machine, and are those of the entry. None where it has none.

    Errors: WeightsError for a file that is not there, SpecError.
    """
    there, at = wanted(spec), ""
    if there is None:
        path, expected, source = weights_path(spec), spec.weights.sha256, "declared"
        if path is None:
            return None
    else:
        known = hub.known(there)
        if known is None:
            return Whereabouts(
                "not resolved yet: its commit and sha256 are locked at first use, or by  "
                f"saebench fetch {spec.name}"
            )
        path, expected = hub.cached(there), known.sha256
        source = "declared" if there.pinned else "locked"
        at = f" {known.file} of {there.repo} at {known.commit}"
        if path is None:
            return Whereabouts(
                f"not on this machine:{at}, sha256 {expected}, {source}; "
                f"get it by  saebench fetch {spec.name}"
            )
    found = file_sha256(path)
    verdict = f"as {source}" if expected else "not declared in the entry"
    wrong = bool(expected) and found != (expected or "").lower()
    said = f"NOT what is {source} ({expected})" if wrong else verdict
    size = f"{path.stat().st_size:,} bytes"
    return Whereabouts(f"on disk:{at}{',' if at else ''} {size}, sha256 {found}, {said}", wrong)


def is_here(spec: SaeSpec) -> bool:
    """Whether all files of an SAE are on this machine, so that it is read without a download.

    Errors: WeightsError for a lock file that cannot be read, or that says otherwise; SpecError.
    """
    file = wanted(spec)
    if file is None:
        return True
    return all(hub.cached(one) for one in (file, *beside_wanted(spec).values()))
