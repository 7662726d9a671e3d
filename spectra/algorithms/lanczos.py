"""The Lanczos recurrence, which reduces a symmetric operator to a small tridiagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spectra.backend import memory
from spectra.backend.errors import InputError, check_whole
from spectra.backend.float32 import in_float32
from spectra.backend.shards import Shards
from spectra.backend.vectors import row_dots, subtract_and_dot_
from spectra.operators.base import LinearOperator, check_is_operator

REORTHOGONALIZATION = ("auto", "full", "none")
SMALL_BASIS_BYTES = 32 << 20  # a basis up to this size fits in a cache, where reorthogonalizing costs little
EARLY = 0.03  # part of the tolerable loss of orthogonality at which a recurrence that does it seldom reorthogonalizes
BREAKDOWN = 10  # units of rounding error, relative to the norm of T, below which a residual counts as zero


@dataclass(frozen=True)
class Tridiagonal:
    """The Jacobi matrix T of a start vector after m Lanczos steps: A Q = Q T + beta_m q_{m+1} e_m^T.

    Attributes:
        alphas: (m,) the diagonal of T.
        betas: (m,) the off-diagonal, and last the norm of the residual; betas[j] couples rows j and j + 1. The last is
            zero after a breakdown: the Krylov space is then invariant, and the eigenvalues of T are eigenvalues of A.
        basis: (m, n) with the Krylov basis vectors q_j in its rows, or None where they were not stored.
        lost: The largest inner product of two basis vectors that a reorthogonalization found too late to keep T
            accurate to rounding error (Simon, Math. Comp. 42, 1984); 0 where all were found in time.
    """

    alphas: np.ndarray
    betas: np.ndarray
    basis: torch.Tensor | None = None
    lost: float = 0.0

    @property
    def steps(self) -> int:
        """m, the number of Lanczos steps."""
        return len(self.alphas)


@in_float32
def lanczos(op: LinearOperator, start: torch.Tensor, steps: int, *, reorthogonalize: str = "full") -> Tridiagonal:
    """The Jacobi matrix of a start vector by the Lanczos recurrence.

    beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1}, with one product in each step. The recurrence ends early
    at a breakdown, where the residual falls to rounding level relative to the norm of T.

    Args:
        op: A, a symmetric operator (n, n).
        start: (n,), finite and not zero; it need not be normalized.
        steps: The largest number of Lanczos steps, at least 1.
        reorthogonalize: "full" stores the basis and orthogonalizes each new vector against it by classical
            Gram-Schmidt, twice where the residual is small (Giraud, Langou and Rozloznik, Comput. Math. Appl. 50,
            2005). "none" stores three vectors whatever the number of steps. Converged Ritz values then appear several
            times, and the weights of the copies add up to the right weight (Greenbaum, Linear Algebra Appl. 113, 1989).

    Returns:
        The `Tridiagonal`, with its basis if `reorthogonalize` is "full".

    Raises:
        InputError: If an argument is out of range.
        NonFiniteError: If a product is not finite.

    Example:
        >>> import numpy as np, torch, spectra
        >>> op = spectra.DiagonalOperator(np.array([1.0, 2.0, 4.0]))
        >>> found = spectra.lanczos(op, torch.ones(3, dtype=torch.float64), steps=3)
        >>> off_diagonal = np.diag(found.betas[:-1], 1)
        >>> print(np.linalg.eigvalsh(np.diag(found.alphas) + off_diagonal + off_diagonal.T).round(6))
        [1. 2. 4.]
    """
    check_is_operator(op)
    check_whole(steps=steps)
    if reorthogonalize not in ("full", "none"):
        raise InputError(f"reorthogonalize must be 'full' or 'none', got {reorthogonalize!r}")
    if steps < 1:
        raise InputError(f"at least one Lanczos step is expected, got {steps}")
    recurrence = LanczosRecurrence(op, start, basis_size=steps if reorthogonalize == "full" else 0)
    recurrence.advance(steps)
    return recurrence.tridiagonals()[0]


class LanczosRecurrence:
    """Lanczos recurrences from several start vectors, advanced together.

    Scalars are in float64, vectors in the dtype of the operator. A step multiplies all current vectors in one call, and
    waits for the device once. After a breakdown a recurrence has a vector of zeros, while the others go on.

    Args:
        op: A, a symmetric operator (n, n).
        starts: (k, n), or (n,) for one. Unit vectors are used without a copy.
        basis_size: How many basis vectors of each recurrence to store and to reorthogonalize against; 0 for none.
            With a basis no more steps than this are possible.
        seldom: Whether to reorthogonalize only before the loss of orthogonality becomes intolerable, in two steps, as
            a new vector follows from two. Else every step with a basis does.
        first_products: (k, n), A applied to `starts`, if the caller has it already; it is overwritten.

    Raises:
        InputError: If a start vector is zero or not finite.
    """

    def __init__(
        self,
        op: LinearOperator,
        starts: torch.Tensor,
        *,
        basis_size: int = 0,
        seldom: bool = False,
        first_products: torch.Tensor | None = None,
    ):
        starts = torch.atleast_2d(starts)
        lengths = row_dots(starts, starts, over=op.shards).sqrt()
        if not bool((lengths > 0).all() and torch.isfinite(lengths).all()):
            raise InputError(f"the start vectors must be finite and not zero, their norms are {lengths.tolist()}")
        self.op, self._seldom, self._lost = op, seldom, 0.0
        self._growth = 1.0  # of the loss of orthogonality since the last pass
        self._again = False  # whether the second step of two reorthogonalizes next
        products = None if first_products is None else torch.atleast_2d(first_products)
        if bool(((lengths - 1).abs() > 4 * torch.finfo(op.dtype).eps).any()):  # unit vectors need no scaled copy
            scale = lengths[:, None].to(starts.dtype)
            starts, products = starts / scale, None if products is None else products / scale
        self._vectors, self._previous, self._first_products = starts, None, products
        count, size = len(starts), min(basis_size, op.shape[0])
        self._alphas: list[np.ndarray] = []  # one array (k,) a step
        self._betas: list[np.ndarray] = []
        self._norms = np.zeros(count)  # of each T, from its largest row sum so far
        self._steps = np.zeros(count, dtype=int)
        self._active = np.ones(count, dtype=bool)  # not broken down
        self._beta = torch.zeros(count, dtype=torch.float64, device=op.device)
        self._basis = torch.empty(count, size, op.entries, dtype=op.dtype, device=op.device) if size else None

    @property
    def broken_down(self) -> bool:
        """Whether every recurrence has broken down, so that no further step is possible."""
        return not self._active.any()

    def advance(self, steps: int, *, on_step: Callable[[], None] | None = None) -> None:
        """Take more Lanczos steps, fewer if every recurrence breaks down or the dimension is reached.

        Args:
            steps: How many more steps.
            on_step: Called after each step.
        """
        for _ in range(steps):
            if self.broken_down or len(self._alphas) >= self.op.shape[0]:
                return
            self._step()
            if on_step is not None:
                on_step()

    def tridiagonals(self) -> list[Tridiagonal]:
        """The Jacobi matrix of each start vector after the steps taken so far."""
        shape = len(self._alphas), len(self._steps)
        alphas, betas = np.reshape(self._alphas, shape), np.reshape(self._betas, shape)
        return [
            Tridiagonal(
                alphas[:m, row], betas[:m, row], None if self._basis is None else self._basis[row, :m], self._lost
            )
            for row, m in enumerate(self._steps)
        ]

    def _step(self) -> None:
        """Take one step in every recurrence."""
        step, vectors, over = len(self._alphas), self._vectors, self.op.shards
        if self._basis is not None:
            if step >= self._basis.shape[1]:
                raise InputError(f"the basis has room for {self._basis.shape[1]} Lanczos steps: ask for a larger one")
            self._basis[:, step] = vectors
        residuals = self._multiply(vectors)
        if self._previous is None:
            alpha = row_dots(residuals, vectors, over=over)
        else:
            alpha = subtract_and_dot_(residuals, self._previous, self._beta, against=vectors, over=over)
        square = subtract_and_dot_(residuals, vectors, alpha, against=residuals, over=over)
        always = self._basis is not None and not self._seldom
        if always:
            square = self._orthogonalize_(residuals)[0]
        beta = square.sqrt()
        alphas, betas = torch.stack([alpha, beta]).cpu().numpy()  # the only wait for the device in this step
        if not np.isfinite(alphas + betas).all():
            self.op.raise_non_finite(vectors)
        overdue = self._basis is not None and self._seldom and self._is_overdue(alphas, betas)
        if overdue:
            square, overlap = self._orthogonalize_(residuals)
            self._watch(overlap, square)
            beta = square.sqrt()
            betas = beta.cpu().numpy()
        if (always or overdue) and self._needs_second_pass(alphas, betas):
            beta = self._orthogonalize_(residuals)[0].sqrt()
            betas = beta.cpu().numpy()
        self._append(alphas, betas)
        self._beta = torch.where(torch.as_tensor(self._active, device=beta.device), beta, 0)
        scale = torch.where(self._beta > 0, 1 / self._beta, 0)[:, None]
        self._previous, self._vectors = vectors, residuals.mul_(scale.to(vectors.dtype))

    def _multiply(self, vectors: torch.Tensor) -> torch.Tensor:
        """A applied to each row; in the first step the products that the caller gave, if any."""
        if self._first_products is None:
            return self.op.multiply_rows(vectors)
        products, self._first_products = self._first_products, None
        return products

    def _orthogonalize_(self, residuals: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`_orthogonalize_each_` against the basis so far."""
        assert self._basis is not None
        return _orthogonalize_each_(residuals, self._basis[:, : len(self._alphas) + 1], self.op.shards)

    def _is_overdue(self, alphas: np.ndarray, betas: np.ndarray) -> bool:
        """Whether the loss of orthogonality may have become intolerable since the last pass.

        A component along a converged eigenvector grows in a step by at most ||T|| / beta, the loss from rounding error.
        """
        if self._again:
            self._growth, self._again = 1.0, False
            return True
        norms, moving = np.maximum(self._norms, np.abs(alphas) + betas), self._active & (betas > 0)
        self._growth *= float((norms[moving] / betas[moving]).max(initial=1.0))
        self._again = self._growth > EARLY / np.sqrt(torch.finfo(self.op.dtype).eps)
        return self._again

    def _watch(self, overlap: torch.Tensor, square: torch.Tensor) -> None:
        """Remember a loss of orthogonality that T does not bear.

        T is as accurate as with full orthogonality while no inner product of basis vectors exceeds the square root of
        the rounding unit (Simon, Math. Comp. 42, 1984).
        """
        loss = float(torch.where(square > 0, overlap / square.sqrt(), 0).max())
        if loss > np.sqrt(torch.finfo(self.op.dtype).eps):
            self._lost = max(self._lost, loss)

    def _needs_second_pass(self, alphas: np.ndarray, betas: np.ndarray) -> bool:
        """Whether one pass of Gram-Schmidt may have left the basis less than semi-orthogonal.

        T is as accurate as with full orthogonality while inner products of basis vectors stay below the square root of
        the rounding unit (Simon, Math. Comp. 42, 1984). Rounding error is relative to the norm of T, so it matters more
        the smaller the residual is.
        """
        norms = np.maximum(self._norms, np.abs(alphas) + betas)
        return bool((betas[self._active] < np.sqrt(torch.finfo(self.op.dtype).eps) * norms[self._active]).any())

    def _append(self, alphas: np.ndarray, betas: np.ndarray) -> None:
        """Store the scalars of a step, and mark the recurrences that broke down in it."""
        active = self._active
        previous_betas = self._betas[-1] if self._betas else 0.0
        self._norms = np.where(active, np.maximum(self._norms, np.abs(alphas) + betas + previous_betas), self._norms)
        self._steps += active
        self._active = active & (betas > BREAKDOWN * torch.finfo(self.op.dtype).eps * self._norms)
        self._alphas.append(np.where(active, alphas, 0.0))
        self._betas.append(np.where(self._active, betas, 0.0))


def _orthogonalize_each_(
    vectors: torch.Tensor, bases: torch.Tensor, over: Shards | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonalize each row (k, n) against its own basis (k, m, n), in place, once.

    Returns the squared norms (k,), and the largest magnitude (k,) of the inner products that there were before.
    """
    coefficients = torch.bmm(vectors[:, None], bases.transpose(1, 2))  # bases @ vectors takes 16 times as long on a CPU
    if over is not None:
        coefficients = over.sum(coefficients)
    vectors[:, None].baddbmm_(coefficients, bases, alpha=-1)
    return row_dots(vectors, vectors, over=over), coefficients.abs().amax((1, 2)).double()


def choose_reorthogonalization(op: LinearOperator, steps: int, reorthogonalize: str) -> str:
    """Replace "auto" by "full" or "none". Either gives the same shares and sums of a density (see `lanczos`).

    Args:
        op: The operator.
        steps: How many Lanczos steps, and so how many basis vectors of n numbers.
        reorthogonalize: "auto", "full" or "none".

    Returns:
        `reorthogonalize` if it is not "auto"; else "full" where the basis takes at most 32 MiB and at most a quarter of
        the free memory, and "none" elsewhere.

    Raises:
        InputError: If `reorthogonalize` is none of these.
    """
    if reorthogonalize not in REORTHOGONALIZATION:
        raise InputError(f"reorthogonalize must be one of {', '.join(REORTHOGONALIZATION)}, got {reorthogonalize!r}")
    if reorthogonalize != "auto":
        return reorthogonalize
    size = steps * op.vector_bytes
    return "full" if size <= min(SMALL_BASIS_BYTES, memory.available(op.device) // 4) else "none"
