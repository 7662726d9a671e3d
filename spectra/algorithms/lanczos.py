"""The Lanczos recurrence: a symmetric operator seen through a small tridiagonal matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spectra.backend import memory
from spectra.backend.errors import InputError
from spectra.backend.float32 import in_float32
from spectra.backend.vectors import row_dots, subtract_
from spectra.operators.base import LinearOperator

POLICIES = ("auto", "full", "none")
BASIS_LIMIT = 32 << 20  # bytes of basis up to which reorthogonalising costs next to nothing, as it stays in a cache


@dataclass(frozen=True)
class Tridiagonal:
    """The Jacobi matrix T of a start vector after m steps, A Q = Q T + beta_m q_{m+1} e_m^T.

    alphas: (m,) its diagonal. betas: (m,) the off-diagonal, betas[j] between j and j + 1; the last is the norm of the
    residual, zero after a breakdown (the Krylov space is invariant and T exact). basis: (m, n) the rows q_j, where
    they were kept.
    """

    alphas: np.ndarray
    betas: np.ndarray
    basis: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.alphas)


class Recurrence:
    """Three-term recurrences from several start vectors, advanced together as far as it is worth.

    beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1}, with scalars in float64 and vectors in the operator's
    dtype. A step costs a product for each start vector, all asked for at once, and waits for the device once.
    starts: (k, n), or (n,) for one; unit vectors are used as they are, not copied. keep_basis: how many basis vectors
    of each to hold and reorthogonalise against (0: none). first_images: A applied to `starts`, (k, n), where the caller
    has it already; it is overwritten.
    `broken` tells that every residual fell to rounding level relative to the norm of its T: no further step is
    possible. A single one that did so rests, as a vector of zeros, while the others go on.
    """

    def __init__(
        self,
        op: LinearOperator,
        starts: torch.Tensor,
        *,
        keep_basis: int = 0,
        first_images: torch.Tensor | None = None,
    ):
        starts = torch.atleast_2d(starts)
        lengths = row_dots(starts, starts).sqrt()
        if not bool((lengths > 0).all() and torch.isfinite(lengths).all()):
            raise InputError(f"the start vectors must be finite and not zero, their norms are {lengths.tolist()}")
        self.op = op
        images = None if first_images is None else torch.atleast_2d(first_images)
        if bool(((lengths - 1).abs() > 4 * torch.finfo(op.dtype).eps).any()):  # else copies would be for nothing
            scale = lengths[:, None].to(starts.dtype)
            starts, images = starts / scale, None if images is None else images / scale
        self._vectors, self._previous, self._first_images = starts, None, images
        count, size = len(starts), min(keep_basis, op.shape[0])
        self._alphas: list[np.ndarray] = []  # of every start vector, a step each
        self._betas: list[np.ndarray] = []
        self._scales, self._lengths = np.zeros(count), np.zeros(count, dtype=int)
        self._going = np.ones(count, dtype=bool)
        self._beta = torch.zeros(count, dtype=torch.float64, device=op.device)
        self._basis = torch.empty(count, size, op.shape[0], dtype=op.dtype, device=op.device) if size else None

    @property
    def broken(self) -> bool:
        return not self._going.any()

    def advance(self, steps: int, *, on_step: Callable[[], None] | None = None) -> None:
        """Take `steps` more steps, or fewer where the recurrences end."""
        for _ in range(steps):
            if self.broken or len(self._alphas) >= self.op.shape[0]:
                return
            self._step()
            if on_step is not None:
                on_step()

    def tridiagonals(self) -> list[Tridiagonal]:
        """What has been found so far, for each start vector."""
        shape = len(self._alphas), len(self._lengths)
        alphas, betas = np.reshape(self._alphas, shape), np.reshape(self._betas, shape)
        return [
            Tridiagonal(alphas[:m, row], betas[:m, row], None if self._basis is None else self._basis[row, :m])
            for row, m in enumerate(self._lengths)
        ]

    def _step(self) -> None:
        step, vectors = len(self._alphas), self._vectors
        if self._basis is not None:
            if step >= self._basis.shape[1]:
                raise InputError(f"the basis was planned for {self._basis.shape[1]} steps; plan for more")
            self._basis[:, step] = vectors
        if step == 0 and self._first_images is not None:
            residuals, self._first_images = self._first_images, None
        else:
            residuals = self.op.rows(vectors)
        if self._previous is None:
            alpha = row_dots(residuals, vectors)
        else:
            alpha = subtract_(residuals, self._previous, self._beta, against=vectors)
        square = subtract_(residuals, vectors, alpha, against=residuals)
        if self._basis is not None:
            square = _orthogonalize_each_(residuals, self._basis[:, : step + 1])
        beta = square.sqrt()
        alphas, betas = torch.stack([alpha, beta]).cpu().numpy()  # the step's one wait for the device
        if not np.isfinite(alphas + betas).all():
            self.op.blame(vectors)
        if self._basis is not None and self._needs_another(alphas, betas):
            beta = _orthogonalize_each_(residuals, self._basis[:, : step + 1]).sqrt()
            betas = beta.cpu().numpy()
        self._record(alphas, betas)
        self._beta = torch.where(torch.as_tensor(self._going, device=beta.device), beta, 0)
        scale = torch.where(self._beta > 0, 1 / self._beta, 0)[:, None]
        self._previous, self._vectors = vectors, residuals.mul_(scale.to(vectors.dtype))

    def _needs_another(self, alphas: np.ndarray, betas: np.ndarray) -> bool:
        """Whether one pass of Gram-Schmidt may have left more than the root of rounding, which is all that T's accuracy
        needs (Simon, Math. Comp. 42, 1984): rounding is relative to the norm of T, and grows as a residual shrinks."""
        scales = np.maximum(self._scales, np.abs(alphas) + betas)
        return bool((betas[self._going] < np.sqrt(torch.finfo(self.op.dtype).eps) * scales[self._going]).any())

    def _record(self, alphas: np.ndarray, betas: np.ndarray) -> None:
        """Keep a step's scalars, and notice which recurrences it ended."""
        going = self._going
        before = self._betas[-1] if self._betas else 0.0
        self._scales = np.where(going, np.maximum(self._scales, np.abs(alphas) + betas + before), self._scales)
        self._lengths += going
        self._going = going & (betas > 10 * torch.finfo(self.op.dtype).eps * self._scales)
        self._alphas.append(np.where(going, alphas, 0.0))
        self._betas.append(np.where(self._going, betas, 0.0))


@in_float32
def lanczos(op: LinearOperator, start: torch.Tensor, steps: int, *, reorthogonalize: str = "full") -> Tridiagonal:
    """Run at most `steps` steps of the recurrence from `start` (n,), one product each.

    reorthogonalize: "full" keeps the basis and applies classical Gram-Schmidt at every step, twice where a residual is
    small (Giraud, Langou and Rozloznik, 2005); "none" keeps three vectors whatever the number of steps: converged Ritz
    values then come back as copies whose weights add up to the right total (Greenbaum, Linear Algebra Appl. 113, 1989).
    Stops early where the residual falls to rounding level relative to the norm of T.
    Raises InputError for unusable arguments, NonFiniteError if a product is not finite.
    """
    if reorthogonalize not in ("full", "none"):
        raise InputError(f"reorthogonalize must be 'full' or 'none', got {reorthogonalize!r}")
    if steps < 1:
        raise InputError(f"at least one Lanczos step is expected, got {steps}")
    recurrence = Recurrence(op, start, keep_basis=steps if reorthogonalize == "full" else 0)
    recurrence.advance(steps)
    return recurrence.tridiagonals()[0]


def _orthogonalize_each_(vectors: torch.Tensor, bases: torch.Tensor) -> torch.Tensor:
    """Take out of each row of `vectors` (k, n) its part in its own basis (k, m, n), in place, in one pass. The squared
    norms of what is left, (k,)."""
    coefficients = torch.bmm(vectors[:, None], bases.transpose(1, 2))  # a CPU takes 16 times as long for the transposed
    vectors[:, None].baddbmm_(coefficients, bases, alpha=-1)
    return row_dots(vectors, vectors)


def choose_policy(op: LinearOperator, steps: int, reorthogonalize: str) -> str:
    """ "auto" resolved: "full" where the basis of `steps` vectors is small (32 MiB, a quarter of free memory), else
    "none", which the shares and sums of a density do not depend on (`lanczos`)."""
    if reorthogonalize not in POLICIES:
        raise InputError(f"reorthogonalize must be one of {', '.join(POLICIES)}, got {reorthogonalize!r}")
    if reorthogonalize != "auto":
        return reorthogonalize
    size = steps * op.vector_bytes
    return "full" if size <= min(BASIS_LIMIT, memory.available(op.device) // 4) else "none"
