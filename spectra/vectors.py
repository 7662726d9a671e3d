"""Long vectors: probes that do not depend on device or order, and sums that do not lose digits.

A float32 norm over ten million entries can be off by 4e-4 on a CPU, which spoils every eigenvalue below that, so
dots and norms accumulate in float64 whatever the vectors hold.
"""

from __future__ import annotations

import math
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from spectra.operators import LinearOperator

STRETCH = 1 << 20  # numbers drawn by one generator
BLOCK = 1024  # products summed in one go before float64 takes over


def dot(u: torch.Tensor, v: torch.Tensor) -> float:
    """u . v accumulated in float64. u, v: (n,)."""
    return float(row_dots(u[None], v[None]))


def norm(v: torch.Tensor) -> float:
    """||v||_2 accumulated in float64. v: (n,)."""
    return math.sqrt(dot(v, v))


def row_dots(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The dot products of corresponding rows, (k,) in float64, on the vectors' device. u, v: (k, n).

    Blocks of a thousand products are summed in the vectors' dtype and the blocks in float64: as exact as float64
    throughout to within a few units of float32's last digit, and several times faster.
    """
    products = u * v
    if products.dtype == torch.float64:
        return products.sum(dim=1)
    whole = products.shape[1] // BLOCK * BLOCK
    blocks = products[:, :whole].reshape(len(products), -1, BLOCK).sum(dim=2)
    return blocks.sum(dim=1, dtype=torch.float64) + products[:, whole:].sum(dim=1, dtype=torch.float64)


def orthonormal_rows(rows: torch.Tensor) -> torch.Tensor:
    """Rows with the same span, orthonormal to rounding. rows: (k, n), k <= n, linearly independent.

    Two rounds of Cholesky QR, which are matrix products, where the rows are nearly orthonormal already (Yamamoto et
    al., Electron. Trans. Numer. Anal. 44, 2015); Householder QR otherwise.
    """
    gram = (rows @ rows.T).double()
    if not torch.linalg.matrix_norm(gram - torch.eye(len(rows), dtype=torch.float64, device=rows.device)) < 0.5:
        return torch.linalg.qr(rows.T)[0].T.contiguous()
    for _ in range(2):
        factor = torch.linalg.cholesky((rows @ rows.T).double())
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(rows)).to(factor), upper=False)
        rows = inverse.to(rows.dtype) @ rows
    return rows


def gaussian(op: LinearOperator, *, seed: int, index: int, stream: str) -> torch.Tensor:
    """n independent standard normal numbers for (seed, index, stream), drawn on the CPU so that every device sees the
    same. (n,)

    Each stretch of a million has a generator of its own, mixed from the three and its number by NumPy's SeedSequence:
    seeds s and s + 1 have no vector in common, and the stretches can be drawn side by side.
    """
    n, dtype = op.shape[0], torch.float64 if op.dtype == torch.float64 else torch.float32
    kind: Any = np.float64 if dtype == torch.float64 else np.float32
    numbers = np.empty(n, dtype=kind)
    parts = [numbers[start : start + STRETCH] for start in range(0, n, STRETCH)]
    key = [seed & 0xFFFFFFFFFFFFFFFF, index, zlib.crc32(stream.encode())]

    def fill(number: int) -> None:
        source = np.random.Generator(np.random.SFC64(np.random.SeedSequence([*key, number])))
        source.standard_normal(out=parts[number], dtype=kind)

    if len(parts) == 1:
        fill(0)
    else:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(fill, range(len(parts))))
    return torch.from_numpy(numbers).to(op.device)


def probe(op: LinearOperator, *, seed: int, index: int) -> torch.Tensor:
    """Probe `index` of `seed`: a direction drawn uniformly from the unit sphere. (n,)

    Such probes make the distribution of every estimate a function of the eigenvalues alone, whatever the
    eigenvectors, so intervals that cover on a diagonal matrix cover on any. Signs (Rademacher) do not: on a diagonal
    matrix all their spread disappears.
    """
    vector = gaussian(op, seed=seed, index=index, stream="probe")
    return vector / norm(vector)
