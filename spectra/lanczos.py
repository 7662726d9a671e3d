"""The Lanczos recurrence: a symmetric operator seen through a small tridiagonal matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from spectra import memory
from spectra.errors import InputError, NonFiniteError
from spectra.operators import LinearOperator
from spectra.vectors import dot, norm

POLICIES = ("auto", "full", "none")
BASIS_LIMIT = 1 << 30  # bytes of basis that "auto" is willing to hold


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
    """The three-term recurrence from one start vector, to be advanced as far as it is worth.

    beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1}, with scalars in float64 and vectors in the operator's
    dtype, one product a step. keep_basis: how many basis vectors to hold and reorthogonalise against (0: none).
    first_image: A times `start`, where the caller has it already.
    `broken` tells that the residual fell to rounding level relative to the norm of T: no further step is possible.
    """

    def __init__(
        self, op: LinearOperator, start: torch.Tensor, *, keep_basis: int = 0, first_image: torch.Tensor | None = None
    ):
        length = norm(start)
        if not (length > 0 and math.isfinite(length)):
            raise InputError(f"the start vector must be finite and not zero, its norm is {length}")
        self.op, self.broken = op, False
        self._vector, self._previous = start / length, None
        self._first_image = None if first_image is None else first_image / length
        self._alphas: list[float] = []
        self._betas: list[float] = []
        self._scale = 0.0
        size = min(keep_basis, op.shape[0])
        self._basis = torch.empty(size, op.shape[0], dtype=op.dtype, device=op.device) if size else None

    def advance(self, steps: int, *, on_step: Callable[[], None] | None = None) -> None:
        """Take `steps` more steps, or fewer where the recurrence ends."""
        for _ in range(steps):
            if self.broken or len(self._alphas) >= self.op.shape[0]:
                return
            self._step()
            if on_step is not None:
                on_step()

    def tridiagonal(self) -> Tridiagonal:
        """What has been found so far."""
        basis = None if self._basis is None else self._basis[: len(self._alphas)]
        return Tridiagonal(np.array(self._alphas), np.array(self._betas), basis)

    def _step(self) -> None:
        step, vector = len(self._alphas), self._vector
        if self._basis is not None:
            if step >= len(self._basis):
                raise InputError(f"the basis was planned for {len(self._basis)} steps; plan for more")
            self._basis[step] = vector
        if step == 0 and self._first_image is not None:
            residual, self._first_image = self._first_image, None
        else:
            residual = self.op @ vector
        previous_beta = 0.0
        if self._previous is not None:
            previous_beta = self._betas[-1]
            residual.sub_(self._previous, alpha=previous_beta)
        alpha = dot(residual, vector)
        residual.sub_(vector, alpha=alpha)
        if self._basis is not None:
            orthogonalize_(residual, self._basis[: step + 1])
        beta = norm(residual)
        if not math.isfinite(alpha + beta):
            raise NonFiniteError(
                f"the operator's product is not finite at Lanczos step {step}; check what it multiplies"
            )
        self._scale = max(self._scale, abs(alpha) + beta + previous_beta)
        self.broken = beta <= 10 * torch.finfo(self.op.dtype).eps * self._scale
        self._alphas.append(alpha)
        self._betas.append(0.0 if self.broken else beta)
        if not self.broken:
            self._previous, self._vector = vector, residual.div_(beta)


def lanczos(op: LinearOperator, start: torch.Tensor, steps: int, *, reorthogonalize: str = "full") -> Tridiagonal:
    """Run at most `steps` steps of the recurrence from `start` (n,), one product each.

    reorthogonalize: "full" keeps the basis and applies classical Gram-Schmidt twice at every step (Giraud, Langou and
    Rozloznik, 2005); "none" keeps three vectors whatever the number of steps: converged Ritz values then come back as
    copies whose weights add up to the right total (Greenbaum, Linear Algebra Appl. 113, 1989).
    Stops early where the residual falls to rounding level relative to the norm of T.
    Raises InputError for unusable arguments, NonFiniteError if a product is not finite.
    """
    if reorthogonalize not in ("full", "none"):
        raise InputError(f"reorthogonalize must be 'full' or 'none', got {reorthogonalize!r}")
    if steps < 1:
        raise InputError(f"at least one Lanczos step is expected, got {steps}")
    recurrence = Recurrence(op, start, keep_basis=steps if reorthogonalize == "full" else 0)
    recurrence.advance(steps)
    return recurrence.tridiagonal()


def orthogonalize_(vector: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """Take out of `vector` (n,) its part in the orthonormal rows of `basis` (m, n), in place, as two matrix products
    done twice. Returns the coefficients (m,)."""
    total = basis @ vector
    vector.sub_(total @ basis)
    correction = basis @ vector
    vector.sub_(correction @ basis)
    return total + correction


def choose_policy(op: LinearOperator, steps: int, reorthogonalize: str) -> str:
    """ "auto" resolved: "full" where the basis of `steps` vectors is small (1 GiB, a quarter of free memory), else
    "none"."""
    if reorthogonalize not in POLICIES:
        raise InputError(f"reorthogonalize must be one of {', '.join(POLICIES)}, got {reorthogonalize!r}")
    if reorthogonalize != "auto":
        return reorthogonalize
    size = steps * op.shape[0] * torch.finfo(op.dtype).bits // 8
    return "full" if size <= min(BASIS_LIMIT, memory.available(op.device) // 4) else "none"
