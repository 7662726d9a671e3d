"""How many Krylov basis vectors a search for eigenpairs holds, and in which memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from spectra.backend import memory, ranks
from spectra.backend.errors import InputError
from spectra.operators.base import LinearOperator

MEMORY_PART = 3 / 4  # part of the free memory that a search may take; products need some of the rest
MEMORY_PART_BESIDE_PRODUCTS = 0.95  # the same where the memory of a product is known
WORK_VECTORS = 6  # vectors beside basis and result: the newest basis vector, a product, and temporaries


@dataclass(frozen=True)
class Basis:
    """The size of a Krylov basis and the memory that holds it.

    Attributes:
        k: How many eigenpairs are searched for.
        size: How many vectors it holds at once.
        on_host: Whether it is kept in host memory while the operator is on another device.
        can_move: Whether it could be kept in host memory.
    """

    k: int
    size: int
    on_host: bool = False
    can_move: bool = False

    @property
    def vectors(self) -> int:
        """How many vectors of n numbers the search holds at most, including those that it returns."""
        return self.size + self.k + WORK_VECTORS

    def smaller(self) -> Basis | None:
        """The basis to try next where this one did not fit in memory; None where there is none."""
        if self.size > comfortable(self.k):
            return replace(self, size=max(comfortable(self.k), self.size * 2 // 3))
        if self.can_move and not self.on_host:
            return replace(self, on_host=True)
        if self.size > fewest(self.k):
            return replace(self, size=max(fewest(self.k), (self.size + self.k) // 2))
        return None


def comfortable(k: int) -> int:
    """How many basis vectors a search for k pairs needs to converge fast."""
    return k + max(k // 2, 10)


def fewest(k: int) -> int:
    """How many basis vectors a search for k pairs needs at least; with fewer it hardly converges."""
    return k + max(k // 4, 4)


def choose_basis(op: LinearOperator, k: int, wanted: int) -> Basis:
    """Choose the basis of a search for k eigenpairs: of the wanted size, or what fits in memory.

    Where the device has room for too few vectors to converge fast, the basis goes to host memory.

    Args:
        op: The operator, of shape (n, n).
        k: How many eigenpairs, at most `wanted` - 2.
        wanted: How many basis vectors to hold if memory allows.

    Returns:
        The basis.

    Raises:
        InputError: If too few basis vectors fit for a search that converges.
    """
    can_move = op.device.type != "cpu" and op.spread == "none"
    room = _room(op, op.device, k)
    if room >= min(wanted, comfortable(k)):
        return Basis(k, min(wanted, room), can_move=can_move)
    host = _room(op, torch.device("cpu"), k) if can_move else 0
    if host >= fewest(k) and host > room:
        return Basis(k, min(wanted, host), on_host=True, can_move=True)
    if room >= fewest(k):
        return Basis(k, min(wanted, room), can_move=can_move)
    raise no_memory(op, k)


def vectors_to_reserve(k: int) -> int:
    """How many vectors a search for k pairs needs to converge fast, those that it returns included."""
    return comfortable(k) + k + WORK_VECTORS if k else 0


def no_memory(op: LinearOperator, k: int) -> InputError:
    """The error for a search that does not fit; it says how much memory k eigenpairs need at least."""
    needed = (fewest(k) + k + WORK_VECTORS) * op.vector_bytes / MEMORY_PART
    return InputError(
        f"{k} eigenpairs of {op.shape[0]:,} parameters need {needed / 2**30:.2g} GiB of free memory at least, and "
        f"{memory.available(op.device) / 2**30:.2g} GiB are free: ask for fewer (k=, deflate=), measure fewer "
        "parameters (params=), or use a device with more memory"
    )


def _room(op: LinearOperator, device: torch.device, k: int) -> int:
    """How many basis vectors fit on a device beside k results; the same number on every rank."""
    free, product = memory.available(device), op.product_bytes() if device == op.device else None
    usable = MEMORY_PART * free if product is None else MEMORY_PART_BESIDE_PRODUCTS * (free - product)
    count = max(int(usable), 0) // op.vector_bytes
    if op.spread == "batches":
        count = ranks.all_reduce_min(count, op.device)
    return count - k - WORK_VECTORS
