"""Extreme eigenpairs: eigenvalues with their eigenvectors and residuals."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import scipy
import torch

from spectra.algorithms.basis_size import Basis, choose_basis, no_memory, vectors_to_reserve
from spectra.algorithms.krylov_search import KrylovSearch, select
from spectra.algorithms.origin import unverified
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.wrapped import CountingOperator, HostOperator
from spectra.backend import markup, memory
from spectra.backend.errors import InputError, check_whole
from spectra.backend.float32 import in_float32
from spectra.operators.base import LinearOperator, check_is_operator

WHICH = ("LM", "LA", "SA", "BE")
DENSE_LIMIT = 4096  # dimension up to which a search that does not converge ends by forming the matrix


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues with their eigenvectors and the residuals that show their accuracy.

    Attributes:
        values: (k,) ascending.
        vectors: (n, k) with orthonormal columns; this rank's part of each where vectors are sharded.
        residuals: (k,) the residual norms ||A x - lambda x||.
        converged: (k,) whether each residual met the tolerance.
        products: How many products the search took.
        unverified: Why the operator's numbers cannot be relied on; empty where nothing speaks against them.
    """

    values: np.ndarray
    vectors: torch.Tensor
    residuals: np.ndarray
    converged: np.ndarray
    products: int
    unverified: str = ""

    @property
    def resolved(self) -> np.ndarray:
        """(k,) whether each pair has converged and the operator's numbers can be relied on."""
        return self.converged & (not self.unverified)

    def _repr_html_(self) -> str:
        """What a notebook shows: eigenvalues with residuals."""
        pairs = zip(self.values, self.residuals, self.converged, strict=True)
        rows = [(f"{value:.6g}", f"{residual:.2g}", "yes" if ready else "no") for value, residual, ready in pairs]
        heading = f"{len(rows)} eigenpairs of a matrix with {len(self.vectors):,} rows, {self.products:,} products"
        notes = [f"unresolved: {self.unverified}"] if self.unverified else []
        return markup.table(("eigenvalue", "residual norm", "converged"), rows, heading=heading, notes=notes)


@in_float32
def topk(
    op: LinearOperator,
    k: int,
    *,
    which: str = "LM",
    tol: float = 1e-6,
    seed: int = 0,
    basis: int | None = None,
    max_products: int | None = None,
    verify: bool = True,
    start: torch.Tensor | None = None,
    progress: Callback | None = None,
) -> Eigenpairs:
    """The k most extreme eigenvalues of a symmetric operator, with eigenvectors.

    A pair (lambda, x) solves A x = lambda x. The method is thick-restart Lanczos (Wu and Simon, SIAM J. Matrix Anal.
    22, 2000) with a basis that is kept orthonormal to rounding error, so a converged eigenvalue never comes back as a
    copy ("ghost"). Matrices with n <= max(4 k, 64) are formed and diagonalized instead, and so are those up to n = 4096
    on which n products were not enough.

    A single Krylov space holds one copy of a repeated eigenvalue. With `verify` a few Lanczos steps from another random
    vector, orthogonal to the pairs found, check whether a wanted eigenvalue was missed; this usually costs four to
    fifteen products. The check ends when the probability of missing one is at most 5 %, or after 15 steps. If it finds
    an eigenvalue that is wanted, the search goes on there (`spectra.algorithms.missed`).

    Args:
        op: A, a symmetric operator (n, n).
        k: How many pairs, from 1 to n.
        which: "LM" for the largest magnitude, "LA" the largest, "SA" the smallest, "BE" both ends (the odd one from
            the top).
        tol: A pair has converged when ||A x - lambda x|| <= tol |lambda|, or when it is at rounding level.
            Residuals include the error of products in a lower precision ("tf32", "bfloat16"), so a tolerance below
            that error is not met.
        seed: Seed of the random vectors.
        basis: How many Krylov basis vectors to hold at once, at least k + 2; by default max(3 k + 10, 40). Where memory
            is short there are fewer, or they are kept in host memory (`spectra.plan`), and the search takes more
            products.
        max_products: Products after which the search ends and marks what has not converged; by default 100 times the
            size of the basis.
        verify: Whether to search for missed copies of repeated eigenvalues.
        start: (n, j), guesses of eigenvectors, such as those of an earlier checkpoint. The search starts from their
            sum.
        progress: Called as progress(products done, products expected in total). The expected total grows during the
            search.

    Returns:
        The `Eigenpairs` in ascending order. Vectors are on the operator's device, or in host memory if they only fit
        there.

    Raises:
        InputError: If k, `which`, `tol` or `basis` is out of range, or memory is too short for the search.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import numpy as np, spectra
        >>> op = spectra.DiagonalOperator(np.array([-7.0, *np.linspace(0, 1, 200), 5.0, 5.0]))
        >>> pairs = spectra.topk(op, 3)
        >>> print(pairs.values.round(4), pairs.converged)
        [-7.  5.  5.] [ True  True  True]
    """
    check_is_operator(op)
    check_whole(k=k, seed=seed)
    n = op.shape[0]
    _check(k, n, which, tol)
    counted = CountingOperator(op, Progress(progress, n))
    if n <= max(4 * k, 64):
        pairs = _dense(counted, k, which)
        return replace(pairs, unverified=unverified(op))
    basis_size = min(basis or default_basis_size(k), n)
    if basis_size < k + 2:
        raise InputError(f"the basis must hold at least k + 2 = {k + 2} vectors, got {basis_size}")
    dense_allowed = max_products is None and n <= DENSE_LIMIT
    op.reserve(vectors_to_reserve(k))
    limit = max_products or (n if dense_allowed else 100 * basis_size)  # a dense matrix costs n products
    counted.progress.total = min(basis_size, limit)
    pairs = _search_in_memory(
        counted, choose_basis(op, k, basis_size), which, tol, seed, max_products=limit, verify=verify, start=start
    )
    if dense_allowed and pairs.products >= limit:
        pairs = replace(_dense(counted, k, which), products=pairs.products + n)
    counted.progress.finish()
    return replace(pairs, unverified=unverified(op))


def _search_in_memory(
    op: CountingOperator,
    basis: Basis,
    which: str,
    tol: float,
    seed: int,
    *,
    max_products: int,
    verify: bool,
    start: torch.Tensor | None,
) -> Eigenpairs:
    """The pairs found with the largest basis that fits in memory; `basis` is tried first."""
    spent = 0
    while True:
        before = op.products
        try:
            pairs = _search(op, basis, which, tol, seed, max_products=max_products - spent, verify=verify, start=start)
            return replace(pairs, products=pairs.products + spent)
        except torch.OutOfMemoryError:
            if op.spread != "none":  # the other ranks would go on with the basis that they have
                raise
        spent = min(spent + op.products - before, max_products - 1)
        smaller = basis.smaller()
        if smaller is None:
            raise no_memory(op, basis.k)
        basis = smaller
        if op.device.type == "cuda":
            torch.cuda.empty_cache()


def _search(
    op: CountingOperator,
    basis: Basis,
    which: str,
    tol: float,
    seed: int,
    *,
    max_products: int,
    verify: bool,
    start: torch.Tensor | None,
) -> Eigenpairs:
    """The pairs that a search with this basis finds."""
    k = basis.k
    used = HostOperator(op) if basis.on_host else op
    search = KrylovSearch(used, basis.size, tol, seed, max_products=max_products)
    values, vectors, residuals = search.find(k, which, start=start)
    if verify and not search.out_of_products and not search.rules_out_missed(vectors, _bounds(values, which)):
        values, vectors, residuals = _search_for_missed(search, k, which, values, vectors, residuals)
    order = np.argsort(values)
    residuals = np.hypot(residuals, op.precision_error() * np.abs(values))
    converged, products = residuals <= search.tolerances(values), search.products
    del search  # and its basis, before the vectors are copied into their order
    if (order != np.arange(k)).any():
        vectors = vectors[torch.as_tensor(order)]
    if vectors.device != op.device and 2 * k * op.vector_bytes <= memory.available(op.device):
        vectors = vectors.to(op.device)
    return Eigenpairs(values[order], vectors.T, residuals[order], converged[order], products)


def _check(k: int, n: int, which: str, tol: float) -> None:
    """Raise InputError for arguments of `topk` that are out of range."""
    if which not in WHICH:
        raise InputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if not 1 <= k <= n:
        raise InputError(f"k must lie between 1 and the dimension {n}, got {k}")
    if not tol > 0:
        raise InputError(f"the tolerance must be positive, got {tol}")


def default_basis_size(k: int) -> int:
    """How many Krylov basis vectors a search for k pairs holds at once by default."""
    return max(3 * k + 10, 40)


def _bounds(values: np.ndarray, which: str) -> tuple[float, float]:
    """(low, high): an eigenvalue below `low` or above `high` is more extreme than one of the wanted `values`."""
    values = np.sort(values)
    match which:
        case "LM":
            bound = float(np.abs(values).min())
            return -bound, bound
        case "LA":
            return -np.inf, float(values[0])
        case "SA":
            return float(values[-1]), np.inf
        case _:
            lower = len(values) // 2
            return float(values[lower - 1]) if lower else -np.inf, float(values[lower])


def _search_for_missed(
    search: KrylovSearch, k: int, which: str, values: np.ndarray, vectors: torch.Tensor, residuals: np.ndarray
) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
    """Search the orthogonal complement of the pairs found until it holds no pair more extreme than one of them.

    Pairs found before keep their place unless a new one is more extreme by more than the tolerance.
    """
    while not search.out_of_products:
        found = search.find(2, "BE", locked=vectors, beyond=_bounds(values, which))
        merged_values = np.concatenate([values, found[0]])
        merged_residuals = np.concatenate([residuals, found[2]])
        margin = np.where(np.arange(len(merged_values)) < k, search.tolerances(merged_values), 0.0)
        kept = select(merged_values, k, which, margin=margin)
        if set(kept) == set(range(k)):
            break
        vectors = torch.stack([vectors[i] if i < k else found[1][i - k] for i in kept])
        values, residuals = merged_values[kept], merged_residuals[kept]
    return values, vectors, residuals


def _dense(op: LinearOperator, k: int, which: str) -> Eigenpairs:
    """The wanted pairs from the matrix itself, formed with n products."""
    n = op.shape[0]
    matrix = op.to_dense().cpu().double().numpy()
    values, vectors = scipy.linalg.eigh(matrix)
    wanted = np.sort(select(values, k, which))
    values, vectors = values[wanted], vectors[:, wanted]
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    vectors = torch.as_tensor(vectors, dtype=op.dtype, device=op.device)
    if op.shards is not None:
        vectors = op.shards.take(vectors.T).T
    return Eigenpairs(values, vectors, residuals, np.ones(k, dtype=bool), n)
