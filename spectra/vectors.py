"""Long vectors: probes that do not depend on device or order, and sums that do not lose digits.

A float32 norm over ten million entries can be off by 4e-4 on a CPU, which spoils every eigenvalue below that, so
dots and norms accumulate in float64 whatever the vectors hold.
"""

from __future__ import annotations

import zlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from spectra.operators import LinearOperator


def dot(u: torch.Tensor, v: torch.Tensor) -> float:
    """u . v accumulated in float64. u, v: (n,)."""
    return float((u * v).sum(dtype=torch.float64))


def norm(v: torch.Tensor) -> float:
    """||v||_2 accumulated in float64. v: (n,)."""
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def generator(*, seed: int, index: int, stream: str) -> torch.Generator:
    """A CPU generator that depends on (seed, index, stream) alone, and shares no stretch with any other.

    The three are mixed by NumPy's SeedSequence, so seeds s and s + 1 have no vector in common.
    """
    entropy = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, index, zlib.crc32(stream.encode())])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0]) >> 1)


def gaussian(op: LinearOperator, *, seed: int, index: int, stream: str) -> torch.Tensor:
    """n independent standard normal numbers for (seed, index, stream), drawn on the CPU so that every device sees the
    same. (n,)"""
    source = generator(seed=seed, index=index, stream=stream)
    dtype = torch.float64 if op.dtype == torch.float64 else torch.float32
    return torch.randn(op.shape[0], generator=source, dtype=dtype).to(op.device)


def probe(op: LinearOperator, *, seed: int, index: int) -> torch.Tensor:
    """Probe `index` of `seed`: a direction drawn uniformly from the unit sphere. (n,)

    Such probes make the distribution of every estimate a function of the eigenvalues alone, whatever the
    eigenvectors, so intervals that cover on a diagonal matrix cover on any. Signs (Rademacher) do not: on a diagonal
    matrix all their spread disappears.
    """
    vector = gaussian(op, seed=seed, index=index, stream="probe")
    return vector / norm(vector)
