"""Linear algebra on long vectors: accurate dot products, and orthonormal rows.

A float32 sum over ten million entries can lose half of its digits: on a CPU a norm has been seen to be off by 4e-4,
which hides every eigenvalue below that size. Dot products and norms are therefore accumulated in float64, whatever the
dtype of the vectors.

Vectors may lie over several ranks, each of which holds a part (`spectra.backend.shards`). Functions that sum over the
entries of vectors then take `over=`, and every rank gets the whole sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from spectra.backend.shards import Shards

CHUNK_SIZES = {"cpu": 1 << 16, "cuda": 1 << 22}  # entries processed at once, which fit into a CPU's cache or fill a GPU
DOT_CHUNK_SIZES = {"cpu": 1 << 17, "cuda": 1 << 26}  # length up to which a float32 dot product is accurate
CHOLESKY_LIMIT = 1e-6  # smallest ratio of a Cholesky factor's diagonal entries at which Cholesky QR is accurate
SMALLEST_DOT = 1e-30  # times n: a float32 dot product below this may have lost squares to underflow
SECOND_PASS_BELOW = 0.7  # ratio of norms after and before a Gram-Schmidt pass below which a second pass is made


def dot(u: torch.Tensor, v: torch.Tensor, *, over: Shards | None = None) -> float:
    """u . v of two vectors (n,), accumulated in float64."""
    return float(row_dots(u[None], v[None], over=over))


def norm(v: torch.Tensor, *, over: Shards | None = None) -> float:
    """||v||_2 of a vector (n,), accumulated in float64."""
    return math.sqrt(dot(v, v, over=over))


def any_entry(mask: torch.Tensor, *, over: Shards | None = None) -> bool:
    """Whether any entry of a vector is true, or not zero."""
    found = bool(mask.any())
    return found if over is None else over.any(found, mask.device)


def row_dots(u: torch.Tensor, v: torch.Tensor, *, over: Shards | None = None) -> torch.Tensor:
    """Dot products of corresponding rows, u_i . v_i.

    Each row is split into chunks. The device's own dot product sums a chunk in the dtype of the vectors, and the sums
    of the chunks are added in float64. This takes one pass over memory, and the error is a few units of float32's last
    digit. Products of float32 entries below 1e-19 underflow, and those above 1e19 overflow: a sum so small, or not
    finite, is computed again in float64.

    Args:
        u: (k, n).
        v: (k, n), in the dtype and on the device of `u`.
        over: The ranks that hold parts of the vectors; None where the vectors are whole.

    Returns:
        (k,) in float64, on the same device.
    """
    if u.shape[1] < chunk_size(u.device):
        found = (u * v).sum(dim=1, dtype=torch.float64)
    else:
        size = chunk_size(u.device, DOT_CHUNK_SIZES)
        dots = [torch.dot(a, b) for row in zip(u, v, strict=True) for a, b in _chunks(size, *row)]
        found = _sum_chunks(dots, len(u))
    return _summed(_in_range(found, u, v), over)


def subtract_and_dot_(
    rows: torch.Tensor,
    others: torch.Tensor,
    factors: torch.Tensor,
    against: torch.Tensor,
    *,
    over: Shards | None = None,
) -> torch.Tensor:
    """Subtract multiples of rows in place, then take dot products: r_i -= f_i o_i, and returns r_i . a_i.

    On a CPU both happen in one pass over memory.

    Args:
        rows: (k, n), overwritten with the differences r_i.
        others: (k, n), the rows o_i.
        factors: (k,) in float64.
        against: (k, n), the rows a_i; may be `rows` itself, which gives the squared norms of the differences.
        over: See `row_dots`.

    Returns:
        (k,) in float64, accumulated as in `row_dots`.
    """
    if rows.device.type != "cpu" or rows.shape[1] < CHUNK_SIZES["cpu"]:
        rows.addcmul_(others, factors[:, None].to(rows.dtype), value=-1)
        return row_dots(rows, against, over=over)
    dots = [
        torch.dot(chunk.sub_(other, alpha=factor), partner)
        for factor, *row in zip(factors.tolist(), rows, others, against, strict=True)
        for chunk, other, partner in _chunks(DOT_CHUNK_SIZES["cpu"], *row)
    ]
    return _summed(_in_range(_sum_chunks(dots, len(rows)), rows, against), over)


def _in_range(found: torch.Tensor, u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The dot products u_i . v_i as given; computed in float64 where products of entries left the range of float32."""
    if u.dtype == torch.float64 or not found.numel():
        return found
    sizes = found.abs()
    if bool(((sizes > SMALLEST_DOT * u.shape[1]) & (sizes < math.inf)).all()):
        return found
    size = chunk_size(u.device)
    total = torch.zeros_like(found)
    for start in range(0, u.shape[1], size):
        total += (u[:, start : start + size].double() * v[:, start : start + size].double()).sum(dim=1)
    return total


def chunk_size(device: torch.device, sizes: dict[str, int] = CHUNK_SIZES) -> int:
    """How many entries of a vector to process at once on this kind of device."""
    return sizes.get(device.type, sizes["cpu"])


def _chunks(size: int, *vectors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Corresponding chunks of vectors (n,), each at most `size` long."""
    return zip(*(vector.split(size) for vector in vectors), strict=True)


def _sum_chunks(dots: list[torch.Tensor], rows: int) -> torch.Tensor:
    """Sum the dot products of chunks, listed row by row, over each of `rows` rows in float64, (rows,)."""
    return torch.stack(dots).view(rows, -1).sum(dim=1, dtype=torch.float64)


def _summed(part: torch.Tensor, over: Shards | None) -> torch.Tensor:
    """A sum over whole vectors, from the sum over the part that this rank holds."""
    return part if over is None else over.sum(part)


def basis_coefficients(basis: torch.Tensor, vector: torch.Tensor, *, over: Shards | None = None) -> torch.Tensor:
    """Q v, the dot products of a vector with each row of a basis, accumulated in float64 on a CPU.

    Args:
        basis: The rows of Q, (m, n).
        vector: The vector v, (n,).
        over: See `row_dots`.

    Returns:
        (m,) in float64.
    """
    if vector.device.type != "cpu":
        return _summed((basis @ vector).double(), over)
    size = CHUNK_SIZES["cpu"]
    total = torch.zeros(len(basis), dtype=torch.float64)
    for start in range(0, len(vector), size):
        total += basis[:, start : start + size] @ vector[start : start + size]
    return _summed(total, over)


def inner_products(rows: torch.Tensor, others: torch.Tensor, *, over: Shards | None = None) -> torch.Tensor:
    """All dot products r_i . o_j, multiplied and summed in float64.

    Args:
        rows: (k, n).
        others: (j, n); `rows` itself for the Gram matrix.
        over: See `row_dots`.

    Returns:
        (k, j) in float64, on the same device.
    """
    columns = max(chunk_size(rows.device) // max(len(rows), len(others), 1), 1)
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], columns):
        chunk = rows[:, start : start + columns].double()
        other = chunk if others is rows else others[:, start : start + columns].double()
        total.addmm_(chunk, other.T)
    return _summed(total, over)


def orthogonalize_(
    vector: torch.Tensor, *bases: torch.Tensor, over: Shards | None = None
) -> tuple[list[np.ndarray], float]:
    """Project a vector onto the orthogonal complement of orthonormal bases, in place.

    v -= Q^T (Q v) by classical Gram-Schmidt, repeated once where the first pass leaves so little that rounding error
    would spoil the orthogonality of the result (Daniel, Gragg, Kaufman and Stewart, Math. Comp. 30, 1976).

    Args:
        vector: The vector v, (n,), overwritten.
        *bases: Bases (m, n), whose rows are orthonormal all together; Q has the rows of all of them.
        over: See `row_dots`.

    Returns:
        The coefficients Q v, an array (m,) in float64 for each basis, and the norm of the vector that is left.
    """
    totals = [np.zeros(len(basis)) for basis in bases]
    length = norm(vector, over=over)
    for _ in range(2):
        previous_length = length
        found = torch.cat([basis_coefficients(basis, vector, over=over) for basis in bases])
        parts = found.split([len(basis) for basis in bases])
        for basis, part in zip(bases, parts, strict=True):
            vector.addmv_(basis.T, part.to(vector.dtype), alpha=-1)
        totals = [total + part.cpu().numpy() for total, part in zip(totals, parts, strict=True)]
        length = norm(vector, over=over)
        if length > SECOND_PASS_BELOW * previous_length:
            break
    return totals, length


def project_out_(vectors: torch.Tensor, basis: torch.Tensor, *, over: Shards | None = None) -> torch.Tensor:
    """Project each row onto the orthogonal complement of a basis, in place and in one pass: V -= (V Q^T) Q.

    Args:
        vectors: V, (k, n), overwritten.
        basis: Q, (m, n) with orthonormal rows.
        over: See `row_dots`.

    Returns:
        `vectors`.
    """
    return vectors.addmm_(_summed(vectors @ basis.T, over), basis, alpha=-1)


def orthonormal_rows(rows: torch.Tensor, *, over: Shards | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Factorize rows into L Q with L lower triangular and Q orthonormal to rounding error.

    Two rounds of Cholesky QR, which consist of matrix products, with Gram matrices in float64 (Yamamoto, Nakatsukasa,
    Yanagisawa and Fukaya, Electron. Trans. Numer. Anal. 44, 2015; for the precision Yamazaki, Tomov and Dongarra,
    SIAM J. Sci. Comput. 37, 2015). Rows too nearly dependent for that are factorized by Householder QR.

    Args:
        rows: (k, n) with k <= n.
        over: See `row_dots`.

    Returns:
        L (k, k) in float64 and Q (k, n) in the dtype of `rows`.
    """
    lower = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    basis = rows
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(inner_products(basis, basis, over=over))
        diagonal = torch.diagonal(factor)
        if failed or not diagonal.min() > CHOLESKY_LIMIT * diagonal.max():
            basis, upper = torch.linalg.qr((rows if over is None else over.gather(rows)).T)
            basis = basis.T.contiguous()
            return upper.T.double(), basis if over is None else over.take(basis)
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(rows)).to(factor), upper=False)
        basis, lower = inverse.to(rows.dtype) @ basis, lower @ factor
    return lower, basis
