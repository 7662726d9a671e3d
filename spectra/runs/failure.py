"""Why a measurement failed, in one line, and what to do about it."""

from __future__ import annotations

import contextlib
import gc
from dataclasses import dataclass

import torch

from spectra.backend.errors import InputError, first_line
from spectra.backend.ranks import RankError

MEMORY = "measure with microbatch=, deflate=0, fewer parameters (params=) or on a device with more free memory"
DISK = "make room on the disk, or check that the folder can be written; the next measurement tries again"
RANKS = "look at the other ranks' messages for the cause"
UNKNOWN = "pass strict=True to get the error with its traceback"


@dataclass(frozen=True)
class Failure:
    """Why a measurement failed.

    Attributes:
        reason: What went wrong, in one line.
        remedy: What to do about it; "" where the reason says it.
    """

    reason: str
    remedy: str

    @classmethod
    def of(cls, error: Exception, *, where: str = "") -> Failure:
        """The failure that an error is.

        Args:
            error: What was raised.
            where: What raised it, if it is not the measurement itself.

        Returns:
            The message of an InputError, which says all; else the kind of error, the first line of its message, and
            what helps against errors of its kind.
        """
        if isinstance(error, InputError):
            text, remedy = str(error), ""
        else:
            kind, line = type(error).__name__, first_line(error)
            text, remedy = kind if line == kind else f"{kind}: {line}", _remedy(error)
        return cls(" ".join((f"{where} {text}" if where else text).split()), remedy)


def _remedy(error: Exception) -> str:
    """What to do about an error that is no InputError."""
    if is_out_of_memory(error):
        return MEMORY
    if isinstance(error, OSError):
        return DISK
    return RANKS if isinstance(error, RankError) else UNKNOWN


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or a device."""
    # on a CPU torch raises a plain RuntimeError
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or "not enough memory" in str(error)


def give_memory_back() -> None:
    """Free what a failed measurement held, so that the training has it."""
    gc.collect()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # of a device that is at fault
            torch.cuda.empty_cache()
