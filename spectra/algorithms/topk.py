"""Extreme eigenvalues and their vectors, at either end or both, with residuals."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import scipy
import torch

from spectra.algorithms.missed import STEPS, nothing_beyond
from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.float32 import in_float32
from spectra.backend.vectors import gaussian, norm, orthogonalize_, row_dots
from spectra.operators.base import LinearOperator

WHICH = ("LM", "LA", "SA", "BE")
DENSE_LIMIT = 4096  # up to this dimension a hard search may end by forming the matrix
START_NOISE = 1e-2  # of a random direction beside guessed eigenvectors
STRICTER = 0.1  # of the tolerance


@dataclass(frozen=True)
class Eigenpairs:
    """Eigenvalues (k,) ascending, vectors (n, k) with orthonormal columns, residuals (k,) = ||A x - lambda x||,
    converged (k,) whether each residual met the tolerance, and the products spent."""

    values: np.ndarray
    vectors: torch.Tensor
    residuals: np.ndarray
    converged: np.ndarray
    products: int


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
) -> Eigenpairs:
    """k extreme eigenpairs by thick-restart Lanczos with full reorthogonalisation.

    which: "LM" largest magnitude, "LA" largest, "SA" smallest, "BE" from both ends (the odd one from the top).
    tol: a pair has converged when ||A x - lambda x|| <= tol * |lambda|, or is at the rounding level of the operator.
    basis: vectors held at once (default max(3k + 10, 40)). max_products: stop there, with what has not converged
    marked so (by default 100 * basis). verify: after convergence look into the complement from a fresh random vector,
    because one Krylov space holds a single copy of a repeated eigenvalue: four to fifteen products, until an
    eigenvalue that belongs to those wanted would be missed with a probability of at most 5 % (`spectra.complement`) or
    Ritz values stay short of that, and a search there where one shows.
    start: (n, j) guesses of the eigenvectors, such as those of an earlier checkpoint; the search begins from their sum.

    The basis is kept orthonormal to rounding, so a converged value never comes back as a copy ("ghost"). Small
    operators (n <= max(4k, 64)), and those up to n = 4096 on which n products were not enough, are formed and
    diagonalised. Method: Wu and Simon, SIAM J. Matrix Anal. 22, 2000.
    With products in a lower precision ("tf32", "bfloat16") the residuals hold what that changes, and a tolerance below
    it is not met. Raises InputError for k outside 1..n or an unknown `which`.
    """
    n = op.shape[0]
    if which not in WHICH:
        raise InputError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if not 1 <= k <= n:
        raise InputError(f"k must lie between 1 and the dimension {n}, got {k}")
    if not tol > 0:
        raise InputError(f"the tolerance must be positive, got {tol}")
    if n <= max(4 * k, 64):
        return _dense(op, k, which)
    size = min(basis or default_basis(k), n)
    if size < k + 2:
        raise InputError(f"the basis must hold at least k + 2 = {k + 2} vectors, got {size}")
    hard = n if max_products is None and n <= DENSE_LIMIT else None  # products after which forming A is cheaper
    search = _Search(op, size, tol, seed, budget=max_products or hard or 100 * size)
    values, vectors, residuals = search.run(k, which, start=start)
    missed = verify and search.spent < search.budget and not search.seen_all(vectors, _to_beat(values, which))
    while missed and search.spent < search.budget:
        # What the complement holds at the ends that were asked for joins if it beats what was found there.
        found = search.run(2, "BE", locked=vectors, beat=_to_beat(values, which))
        merged_values = np.concatenate([values, found[0]])
        merged_residuals = np.concatenate([residuals, found[2]])
        bonus = np.where(np.arange(len(merged_values)) < k, search.allowed(merged_values), 0.0)
        keep = select(merged_values, k, which, bonus=bonus)
        if set(keep) == set(range(k)):
            break
        merged = torch.cat([vectors, found[1]])
        values, vectors, residuals = merged_values[keep], merged[torch.as_tensor(keep)], merged_residuals[keep]
    if hard is not None and search.spent >= hard:
        return replace(_dense(op, k, which), products=search.spent + n)
    order = np.argsort(values)
    residuals = np.hypot(residuals, op.precision_error() * np.abs(values))  # of a product in a lower precision
    converged = residuals <= search.allowed(values)
    return Eigenpairs(
        values[order], vectors[torch.as_tensor(order)].T, residuals[order], converged[order], search.spent
    )


def default_basis(k: int) -> int:
    """Vectors that a search for k pairs holds at once."""
    return max(3 * k + 10, 40)


def select(values: np.ndarray, k: int, which: str, *, bonus: np.ndarray | float = 0.0) -> np.ndarray:
    """Indices of the k wanted among `values`, each of which counts as more extreme by its bonus."""
    if which == "LM":
        return np.argsort(-(np.abs(values) + bonus), kind="stable")[:k]
    up, down = np.argsort(-(values + bonus), kind="stable"), np.argsort(values - bonus, kind="stable")
    if which == "LA":
        return up[:k]
    if which == "SA":
        return down[:k]
    top = up[: k - k // 2]
    bottom = [i for i in down if i not in set(top)][: k // 2]
    return np.concatenate([top, np.array(bottom, dtype=int)])


def _to_beat(values: np.ndarray, which: str) -> tuple[float, float]:
    """What another eigenvalue has to lie below, or above, in order to be one of those wanted."""
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


@dataclass
class _Search:
    """Thick-restart Lanczos on the complement of locked vectors; `radius` and `spent` grow over its runs."""

    op: LinearOperator
    size: int
    tol: float
    seed: int
    budget: int
    spent: int = 0
    radius: float = 0.0
    draws: int = 0
    buffer: torch.Tensor = field(init=False)
    others: tuple[np.ndarray, np.ndarray, np.ndarray] = field(init=False)  # values, residuals and coefficients of the
    # last run's Ritz vectors that it did not find worth returning

    def __post_init__(self) -> None:
        self.buffer = torch.empty(self.size + 1, self.op.shape[0], dtype=self.op.dtype, device=self.op.device)
        self.eps = torch.finfo(self.op.dtype).eps

    def allowed(self, values: np.ndarray) -> np.ndarray:
        """The residual under which a pair counts as converged."""
        return np.maximum(self.tol * np.abs(values), 10 * self.eps * self.radius)

    def run(
        self,
        k: int,
        which: str,
        *,
        locked: torch.Tensor | None = None,
        beat: tuple[float, float] | None = None,
        start: torch.Tensor | None = None,
    ) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """k wanted pairs orthogonal to the rows of `locked`: values (k,), vectors (k, n), residuals (k,).

        beat: with k = 2 at both ends: only a pair below the first or above the second is wanted; give up once none can
        reach there.
        """
        begun = self.spent
        locked = self.buffer[:0] if locked is None else locked
        room = self.op.shape[0] - len(locked)
        size = min(self.size, room)
        k = min(k, room)
        projected = np.zeros((size, size))
        coupling = np.zeros((len(locked), size))  # locked . A basis: locked pairs are not exact
        filled = 0
        self._fresh(0, locked)
        if start is not None:
            # The random part keeps every direction within reach of the search.
            guess = start.to(self.buffer).sum(dim=1)
            self.buffer[0] = guess / norm(guess) + START_NOISE * self.buffer[0]
            self.buffer[0] /= norm(self.buffer[0])
        while True:
            filled += 1
            column, coupling[:, filled - 1], beta = self._expand(filled - 1, locked)
            projected[:filled, filled - 1] = projected[filled - 1, :filled] = column
            values, small = scipy.linalg.eigh(projected[:filled, :filled])
            self.radius = max(self.radius, float(np.abs(values).max()))
            exhausted = filled == room
            residuals = np.zeros(filled) if exhausted else np.abs(beta * small[-1])
            wanted = select(values, min(k, filled), which)
            settled = filled >= k and bool(np.all(residuals[wanted] <= self.allowed(values[wanted])))
            if beat is not None:
                settled = self.spent - begun >= STEPS and self._beaten(values, residuals, beat)
            if exhausted or settled or self.spent >= self.budget:
                others = np.delete(np.arange(filled), wanted)
                self.others = values[others], residuals[others], small[:, others]
                outside = np.linalg.norm(coupling[:, :filled] @ small[:, wanted], axis=0)
                return values[wanted], self._combine(small[:, wanted], filled), np.hypot(residuals[wanted], outside)
            if beta <= 10 * self.eps * self.radius:  # an invariant subspace: go on in a new direction
                self._fresh(filled, locked)
                beta = 0.0
            if filled == size:
                filled = self._restart(projected, coupling, values, small, k, which)

    def seen_all(self, vectors: torch.Tensor, beat: tuple[float, float]) -> bool:
        """Whether a random vector shows nothing below the first or above the second outside the pairs last found.

        The search's other Ritz vectors are left out too as far as that changes little: a residual r at a distance d
        from there moves an eigenvalue by at most r^2 / d, and all together may move one by the tolerance.
        """
        beyond = self.allowed(np.nan_to_num(np.array(beat)))
        low, high = float(beat[0] - beyond[0]), float(beat[1] + beyond[1])
        values, residuals, small = self.others
        closest = self.eps * self.radius + np.finfo(float).tiny
        moves = residuals**2 / np.maximum(np.minimum(values - low, high - values), closest)
        order = np.argsort(moves)
        harmless = order[np.cumsum(moves[order]) <= beyond.min()]
        more = self._combine(small[:, harmless], len(small))
        basis = torch.cat([vectors, more], out=self.buffer[: len(vectors) + len(more)])
        before, steps = self.op.products, min(STEPS, self.budget - self.spent)
        clear = nothing_beyond(self.op, basis, low, high, seed=self.seed, stream="topk trial", steps=steps)
        self.spent += self.op.products - before
        return clear

    def _beaten(self, values: np.ndarray, residuals: np.ndarray, beat: tuple[float, float]) -> bool:
        """Whether neither end can still reach past `beat`, or one that does has converged. That is asked more strictly
        than of the pairs: a mixture of a cluster's members passes for an eigenvalue that is less extreme."""
        ends = np.array([0, -1])
        reach = values[ends] + np.array([-1, 1]) * residuals[ends]
        threats = ends[(reach < beat[0]) | (reach > beat[1])]
        return bool(np.all(residuals[threats] <= STRICTER * self.allowed(values[threats])))

    def _expand(self, last: int, locked: torch.Tensor) -> tuple[np.ndarray, np.ndarray, float]:
        """Multiply the newest vector; the image's coefficients against the basis and against what is locked, and the
        norm of the new direction."""
        image = self.op @ self.buffer[last]
        self.spent += 1
        (column, outside), beta = orthogonalize_(image, self.buffer[: last + 1], locked)
        if not np.isfinite(beta):
            raise NonFiniteError(f"the operator's product number {self.spent} is not finite; check what it multiplies")
        if beta > 0:
            torch.div(image, beta, out=self.buffer[last + 1])
        return column, outside, beta

    def _fresh(self, row: int, locked: torch.Tensor) -> None:
        """A random direction orthogonal to everything held, into the buffer's `row`."""
        vector = gaussian(self.op, seed=self.seed, index=self.draws, stream="topk")
        self.draws += 1
        for _ in range(2):
            _, left = orthogonalize_(vector, self.buffer[:row], locked)
            vector /= left
        self.buffer[row] = vector

    def _combine(self, small: np.ndarray, filled: int) -> torch.Tensor:
        """Ritz vectors, one a row, from columns of coefficients; of length one to the last digit."""
        rotation = torch.as_tensor(small.T, dtype=self.op.dtype, device=self.op.device)
        vectors = rotation @ self.buffer[:filled]
        return vectors.div_(row_dots(vectors, vectors).sqrt()[:, None].to(vectors.dtype))

    def _restart(
        self, projected: np.ndarray, coupling: np.ndarray, values: np.ndarray, small: np.ndarray, k: int, which: str
    ) -> int:
        """Keep the wanted Ritz vectors and as many neighbours as fit in half of the basis, then the newest vector."""
        size = len(values)
        keep = np.sort(select(values, min(k + max((size - k) // 3, 1), size - 1), which))
        newest = self.buffer[size].clone()
        self.buffer[: len(keep)] = self._combine(small[:, keep], size)
        self.buffer[len(keep)] = newest
        coupling[:, : len(keep)] = coupling @ small[:, keep]
        projected[:] = 0
        projected[np.arange(len(keep)), np.arange(len(keep))] = values[keep]
        return len(keep)


def _dense(op: LinearOperator, k: int, which: str) -> Eigenpairs:
    n = op.shape[0]
    matrix = (op @ torch.eye(n, dtype=op.dtype, device=op.device)).double().cpu().numpy()
    matrix = (matrix + matrix.T) / 2
    values, vectors = scipy.linalg.eigh(matrix)
    keep = np.sort(select(values, k, which))
    values, vectors = values[keep], vectors[:, keep]
    residuals = np.linalg.norm(matrix @ vectors - vectors * values, axis=0)
    vectors = torch.as_tensor(vectors, dtype=op.dtype, device=op.device)
    return Eigenpairs(values, vectors, residuals, np.ones(k, dtype=bool), n)
