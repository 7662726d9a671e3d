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


def lanczos(
    op: LinearOperator,
    start: torch.Tensor,
    steps: int,
    *,
    reorthogonalize: str = "full",
    on_step: Callable[[], None] | None = None,
) -> Tridiagonal:
    """Run at most `steps` steps of the three-term recurrence from `start` (n,), one product each.

    beta_j q_{j+1} = A q_j - alpha_j q_j - beta_{j-1} q_{j-1}, with scalars in float64 and vectors in the operator's
    dtype. reorthogonalize: "full" keeps the basis and applies classical Gram-Schmidt twice at every step (Giraud,
    Langou and Rozloznik, 2005); "none" keeps three vectors whatever the number of steps: converged Ritz values then
    come back as copies whose weights add up to the right total (Greenbaum, Linear Algebra Appl. 113, 1989).
    Stops early where the residual falls to rounding level relative to the norm of T.
    Raises NonFiniteError if a product is not finite.
    """
    if reorthogonalize not in ("full", "none"):
        raise InputError(f"reorthogonalize must be 'full' or 'none', got {reorthogonalize!r}")
    if steps < 1:
        raise InputError(f"at least one Lanczos step is expected, got {steps}")
    steps = min(steps, op.shape[0])
    length = norm(start)
    if not (length > 0 and math.isfinite(length)):
        raise InputError(f"the start vector must be finite and not zero, its norm is {length}")
    rounding = 10 * torch.finfo(op.dtype).eps

    vector, previous, beta, scale = start / length, None, 0.0, 0.0
    basis = torch.empty(steps, op.shape[0], dtype=op.dtype, device=op.device) if reorthogonalize == "full" else None
    alphas: list[float] = []
    betas: list[float] = []
    for step in range(steps):
        if basis is not None:
            basis[step] = vector
        residual = op @ vector
        if previous is not None:
            residual.sub_(previous, alpha=beta)
        alpha = dot(residual, vector)
        residual.sub_(vector, alpha=alpha)
        if basis is not None:
            orthogonalize_(residual, basis[: step + 1])
        previous_beta, beta = beta, norm(residual)
        if not math.isfinite(alpha + beta):
            raise NonFiniteError(
                f"the operator's product is not finite at Lanczos step {step}; check what it multiplies"
            )
        alphas.append(alpha)
        if on_step is not None:
            on_step()
        scale = max(scale, abs(alpha) + beta + previous_beta)
        if beta <= rounding * scale:
            betas.append(0.0)
            break
        betas.append(beta)
        previous, vector = vector, residual / beta
    kept = None if basis is None else basis[: len(alphas)]
    return Tridiagonal(np.array(alphas), np.array(betas), kept)


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
