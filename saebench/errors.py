"""The errors a user may meet. Each says what is wrong, where, and what to do next."""

from __future__ import annotations


class SaebenchError(Exception):
    """Something went wrong that a user can mend; the command line prints it without a traceback.

    `what` says what is wrong and where, `hint` what to type or change next.
    """

    exit_code = 1

    def __init__(self, what: str, hint: str = "") -> None:
        super().__init__(what)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  → {self.hint}" if self.hint else self.what


class UsageError(SaebenchError):
    """The command or the configuration is wrong: nothing was computed."""

    exit_code = 2


class NotFound(UsageError):
    """A name that no registry knows."""


class SpecError(UsageError):
    """A TOML entry that does not say what it must."""


class Mismatch(UsageError):
    """Two entries that do not fit: an SAE whose width, site or tokens are not the backbone's."""


class WeightsError(SaebenchError):
    """A weights file that is missing, truncated, altered, or holds NaN or infinite values."""


class DataError(SaebenchError):
    """A dataset or an image that cannot be read."""


class ImageError(DataError):
    """One image that is there and cannot be decoded: what `--bad-images skip` leaves out."""


class NonFiniteError(SaebenchError):
    """Activations, codes or a reconstruction that are NaN or infinite."""


class ResultsError(SaebenchError):
    """A results folder that cannot be written, or holds rows of another schema."""

    exit_code = 2


class WriteError(SaebenchError):
    """A file that cannot be written: no space, no permission, or a folder is a file."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on whatever device: torch's is a RuntimeError."""
    text = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            said in text for said in ("can't allocate memory", "out of memory", "not enough memory")
        )
    )
