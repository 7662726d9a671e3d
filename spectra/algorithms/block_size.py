"""How many probe vectors are advanced, and so multiplied, at once."""

from __future__ import annotations

from spectra.backend import memory, ranks
from spectra.operators.base import LinearOperator

CPU_BLOCK_BYTES = 32 << 20  # of vectors advanced at once on a CPU: large models gain nothing from more
CPU_BLOCK_BYTES_DEFLATED = 1 << 30  # the same with deflation: one pass over the deflated vectors serves the whole block
VECTORS_PER_PROBE = 5  # of n numbers each: the last two of a recurrence, the new one, and temporaries


def probe_block_size(op: LinearOperator, basis_size: int, *, deflated: bool = False) -> int:
    """How many probe vectors to advance at once.

    On a GPU, which gains from large blocks, as many as memory holds. On a CPU, where a Hessian-vector product is
    compute-bound, as many as a fixed number of bytes holds: more with deflation, because each pass over the deflated
    vectors then serves the whole block.

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
