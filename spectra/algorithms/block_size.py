"""How many probe vectors are advanced, and so multiplied, at once (the block size)."""

from __future__ import annotations

from spectra.backend import memory, ranks
from spectra.operators.base import LinearOperator

CPU_BLOCK_BYTES = 32 << 20  # size of the vectors advanced at once on a CPU: large models gain nothing from more
CPU_BLOCK_BYTES_DEFLATED = 1 << 30  # the same with deflation: the block shares each pass over the deflated vectors
VECTORS_PER_PROBE = 5  # vectors of n numbers in a recurrence: the last two, the new one, and temporaries


def probe_block_size(op: LinearOperator, basis_size: int, *, deflated: bool = False) -> int:
    """How many probe vectors to advance at once.

    A GPU gains from large blocks, so the block is as large as memory allows. On a CPU a Hessian-vector product is
    compute-bound, so the block has a fixed size in bytes. With deflation that size is larger, because the block shares
    each pass over the deflated vectors.

    Args:
        op: The operator.
        basis_size: How many Krylov basis vectors each probe vector stores.
        deflated: Whether eigenvectors are projected out of every product.

    Returns:
        The size of a block, at least 1.
    """
    vectors = max_vectors_in_memory(op)
    if op.device.type == "cpu":
        limit = CPU_BLOCK_BYTES_DEFLATED if deflated else CPU_BLOCK_BYTES
        vectors = min(vectors, limit // op.vector_bytes)
    return max(vectors // (VECTORS_PER_PROBE + basis_size), 1)


def max_vectors_in_memory(op: LinearOperator) -> int:
    """How many vectors of n numbers fit in a quarter of the free memory; the same number on every rank."""
    count = memory.available(op.device) // 4 // op.vector_bytes
    return ranks.all_reduce_min(count, op.device) if op.spread == "batches" else count
