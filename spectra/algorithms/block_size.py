"""How many vectors advance side by side: as many as memory holds, where company pays."""

from __future__ import annotations

from spectra.backend import memory, ranks
from spectra.operators.base import LinearOperator

TOGETHER = 32 << 20  # bytes of vectors of probes that advance together on a CPU; large models gain nothing from more
TOGETHER_DEFLATED = 1 << 30  # the same where outliers are deflated
VECTORS_A_PROBE = 5  # of n numbers: the last two of a recurrence, the new one, and temporaries


def probes_together(op: LinearOperator, kept: int, *, deflated: bool = False) -> int:
    """How many probes may advance together, with `kept` basis vectors each.

    All of them where that is cheap, or where a GPU gains from large blocks; a few more where each pass over deflated
    vectors serves several; else one, since a product that is bound by arithmetic gains nothing from company.
    """
    fit = vectors_that_fit(op)
    if op.device.type == "cpu":
        limit = TOGETHER_DEFLATED if deflated else TOGETHER
        fit = min(fit, limit // op.vector_bytes)
    return max(fit // (VECTORS_A_PROBE + kept), 1)


def vectors_that_fit(op: LinearOperator) -> int:
    """How many vectors of n numbers a quarter of the free memory holds."""
    fits = memory.available(op.device) // 4 // op.vector_bytes
    return ranks.all_reduce_min(fits, op.device) if op.spread == "batches" else fits
