"""Long vectors: probes that do not depend on device or order, and sums that do not lose digits.

A float32 norm over ten million entries can be off by 4e-4 on a CPU, which spoils every eigenvalue below that, so
dots and norms accumulate in float64 whatever the vectors hold.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch

STRETCHES = {"cpu": 1 << 16, "cuda": 1 << 22}  # numbers worked on in one go: what a cache holds, what fills a GPU
CHOLESKY_LIMIT = 1e-6  # of a factor's diagonal: rows nearer to dependence lose too many digits in a Gram matrix
ENOUGH_LEFT = 0.1  # of a vector, after one pass of Gram-Schmidt, for it to be orthogonal to ten units of rounding
DOTS = {"cpu": 1 << 17, "cuda": 1 << 26}  # numbers of a dot product, the most that float32 sums without loss there


class VectorSpace(Protocol):
    """What a vector has to fit: any operator. shape: (n, n)."""

    shape: tuple[int, int]
    dtype: torch.dtype
    device: torch.device


def dot(u: torch.Tensor, v: torch.Tensor) -> float:
    """u . v accumulated in float64. u, v: (n,)."""
    return float(row_dots(u[None], v[None]))


def norm(v: torch.Tensor) -> float:
    """||v||_2 accumulated in float64. v: (n,)."""
    return math.sqrt(dot(v, v))


def row_dots(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The dot products of corresponding rows, (k,) in float64, on the vectors' device. u, v: (k, n).

    Long rows are summed in stretches by the vendor's dot product, in the vectors' dtype and one pass over memory, and
    the stretches in float64: as exact as float64 throughout to within a few units of float32's last digit.
    """
    if u.shape[1] < _sized(STRETCHES, u.device):
        return (u * v).sum(dim=1, dtype=torch.float64)
    width = _sized(DOTS, u.device)
    dots = [torch.dot(a, b) for row in zip(u, v, strict=True) for a, b in _stretches(width, *row)]
    return _row_sums(dots, len(u))


def subtract_(rows: torch.Tensor, others: torch.Tensor, factors: torch.Tensor, against: torch.Tensor) -> torch.Tensor:
    """rows -= factors * others in place; then the dot products of corresponding rows with `against`, as `row_dots`.

    rows, others, against: (k, n); factors: (k,) in float64. On a CPU one pass over memory does both.
    """
    if rows.device.type != "cpu" or rows.shape[1] < STRETCHES["cpu"]:
        rows.addcmul_(others, factors[:, None].to(rows.dtype), value=-1)
        return row_dots(rows, against)
    dots = [
        torch.dot(part.sub_(other, alpha=factor), partner)
        for factor, *row in zip(factors.tolist(), rows, others, against, strict=True)
        for part, other, partner in _stretches(DOTS["cpu"], *row)
    ]
    return _row_sums(dots, len(rows))


def _row_sums(dots: list[torch.Tensor], count: int) -> torch.Tensor:
    """The sums over each of `count` rows of the dot products of its stretches, in float64."""
    return torch.stack(dots).view(count, -1).sum(dim=1, dtype=torch.float64)


def _stretches(width: int, *vectors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Corresponding parts of vectors (n,), at most `width` long."""
    return zip(*(vector.split(width) for vector in vectors), strict=True)


def coefficients(basis: torch.Tensor, vector: torch.Tensor) -> torch.Tensor:
    """basis @ vector as `row_dots` sums it: (m,) in float64. basis: (m, n), vector: (n,)."""
    if vector.device.type != "cpu":
        return (basis @ vector).double()
    width = STRETCHES["cpu"]
    total = torch.zeros(len(basis), dtype=torch.float64)
    for start in range(0, len(vector), width):
        total += basis[:, start : start + width] @ vector[start : start + width]
    return total


def inner_products(rows: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """rows @ others.T in float64, of as many columns at a time as a cache holds. (k, j)"""
    width = max(_sized(STRETCHES, rows.device) // max(len(rows), len(others), 1), 1)
    total = torch.zeros(len(rows), len(others), dtype=torch.float64, device=rows.device)
    for start in range(0, rows.shape[1], width):
        part = rows[:, start : start + width].double()
        other = part if others is rows else others[:, start : start + width].double()
        total.addmm_(part, other.T)
    return total


def orthogonalize_(vector: torch.Tensor, *bases: torch.Tensor) -> tuple[list[np.ndarray], float]:
    """Take out of `vector` (n,) its part in the rows of `bases`, each (m, n), which are orthonormal together, in place.
    Returns the coefficients, an array (m,) for each basis, and the norm of what is left.

    Classical Gram-Schmidt: matrix products, a second time where so little was left that rounding shows in it (Daniel,
    Gragg, Kaufman and Stewart, Math. Comp. 30, 1976).
    """
    totals = [np.zeros(len(basis)) for basis in bases]
    left = norm(vector)
    for _ in range(2):
        before = left
        found = torch.cat([coefficients(basis, vector) for basis in bases])
        parts = found.split([len(basis) for basis in bases])
        for basis, part in zip(bases, parts, strict=True):
            vector.addmv_(basis.T, part.to(vector.dtype), alpha=-1)
        totals = [total + part.cpu().numpy() for total, part in zip(totals, parts, strict=True)]
        left = norm(vector)
        if left > ENOUGH_LEFT * before:
            break
    return totals, left


def take_out_(vectors: torch.Tensor, basis: torch.Tensor) -> torch.Tensor:
    """The rows of `vectors` without their part in the orthonormal rows of `basis`, in place, in one pass. (k, n)"""
    return vectors.addmm_(vectors @ basis.T, basis, alpha=-1)


def orthonormal_rows(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """rows = L Q with L (k, k) lower triangular in float64 and Q (k, n) orthonormal to rounding. rows: (k, n), k <= n.

    Two rounds of Cholesky QR with Gram matrices in float64, which are matrix products (Yamamoto et al., Electron.
    Trans. Numer. Anal. 44, 2015; Yamazaki, Tomov and Dongarra, SIAM J. Sci. Comput. 37, 2015, for the precision);
    Householder QR where the rows are too nearly dependent for that.
    """
    lower = torch.eye(len(rows), dtype=torch.float64, device=rows.device)
    basis = rows
    for _ in range(2):
        factor, failed = torch.linalg.cholesky_ex(inner_products(basis, basis))
        sizes = torch.diagonal(factor)
        if failed or not sizes.min() > CHOLESKY_LIMIT * sizes.max():
            basis, upper = torch.linalg.qr(rows.T)
            return upper.T.double(), basis.T.contiguous()
        inverse = torch.linalg.solve_triangular(factor, torch.eye(len(rows)).to(factor), upper=False)
        basis, lower = inverse.to(rows.dtype) @ basis, lower @ factor
    return lower, basis


def gaussian(space: VectorSpace, *, seed: int, index: int, stream: str) -> torch.Tensor:
    """n independent standard normal numbers for (seed, index, stream), the same to rounding on every device. (n,)

    Box and Muller's transform of hashed counters, i -> (r cos a, r sin a), where r^2 / -2 is the logarithm of one half
    of hash(key + i) and a the other half as an angle. The hash is SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), and
    NumPy's SeedSequence mixes the key, so seeds s and s + 1 have no vector in common. Resolution of float32.
    """
    words = [seed & 0xFFFFFFFFFFFFFFFF, index, zlib.crc32(stream.encode())]
    key = int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0])
    n, half = space.shape[0], (space.shape[0] + 1) // 2
    numbers = torch.empty(n, dtype=space.dtype, device=space.device)
    stretch = _sized(STRETCHES, space.device)
    for start in range(0, half, stretch):
        stop = min(start + stretch, half)
        numbers[start:stop], second = _normal_pairs(key, start, stop, space.device)
        numbers[half + start : half + stop] = second[: n - half - start]
    return numbers


def _sized(table: dict[str, int], device: torch.device) -> int:
    """The entry for this kind of device, or that of a CPU."""
    return table.get(device.type, table["cpu"])


def _normal_pairs(key: int, start: int, stop: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The pairs of normal numbers of the counters from start to stop, in float32."""
    z = torch.arange(start, stop, device=device).mul_(_signed(0x9E3779B97F4A7C15)).add_(_signed(key))
    z ^= _shifted(z, 30)
    z *= _signed(0xBF58476D1CE4E5B9)
    z ^= _shifted(z, 27)
    z *= _signed(0x94D049BB133111EB)
    z ^= _shifted(z, 31)
    first, second = z.view(torch.int32).view(-1, 2).unbind(dim=1)
    radius = first.float().abs_().add_(0.5).mul_(2.0**-31).log_().mul_(-2).sqrt_()
    angle = second.float().mul_(math.pi * 2.0**-31)
    return radius * angle.cos(), radius * angle.sin()


def _signed(word: int) -> int:
    """The int64 with the bits of an unsigned 64-bit word."""
    word &= 0xFFFFFFFFFFFFFFFF
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: torch.Tensor, bits: int) -> torch.Tensor:
    """Shifted right, with zeros coming in: torch's shift repeats the sign."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def probe(space: VectorSpace, *, seed: int, index: int) -> torch.Tensor:
    """Probe `index` of `seed`: a direction drawn uniformly from the unit sphere. (n,)

    Such probes make the distribution of every estimate a function of the eigenvalues alone, whatever the
    eigenvectors, so intervals that cover on a diagonal matrix cover on any. Signs (Rademacher) do not: on a diagonal
    matrix all their spread disappears.
    """
    vector = gaussian(space, seed=seed, index=index, stream="probe")
    return vector.div_(norm(vector))
