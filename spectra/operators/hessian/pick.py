"""Which engine multiplies a block of vectors: the one asked for, or the fastest at the first block."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import torch

from spectra.backend import memory
from spectra.backend.errors import InputError
from spectra.operators.hessian.engines import ENGINES, CapturedProducts

if TYPE_CHECKING:
    from spectra.operators.hessian.operator import HessianOperator

T = TypeVar("T")
CAPTURE_BELOW = 0.2  # seconds a vector and microbatch: longer ones are bound by arithmetic, launching costs nothing
CLEARLY = 0.9  # of the time of a simpler engine, before that one is left
SINGLE_CALLS = 3  # products of one vector before it is worth while to look for a faster engine for more of them
WARM_BELOW = 0.1  # seconds: a shorter first call was mostly warming up; on a GPU any, it allocates and captures


class EnginePick:
    """Multiplies blocks for a HessianOperator. The pick is made once for a size of block and outlives a change of
    weights; what was captured does not."""

    def __init__(self, op: HessianOperator, engine: str):
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        self.op, self.engine, self.used = op, engine, ""
        self._picked: dict[int, str] = {}
        self._captured: dict[int, CapturedProducts] = {}
        self._single_calls = 0

    def forget(self) -> None:
        """Give back what belongs to the weights as they were."""
        self._captured.clear()

    def __call__(self, vectors: torch.Tensor) -> torch.Tensor:
        """The products of the rows of `vectors`: (k, n)."""
        return self.in_memory(lambda: self._multiply(vectors), len(vectors))

    def in_memory(self, run: Callable[[], T], count: int) -> T:
        """What `run` returns, for a product with `count` vectors. Out of memory, the operator goes on with less, and
        notes that."""
        while True:
            try:
                return run()
            except torch.OutOfMemoryError as error:
                reason = str(error).splitlines()[0]
            self._lighter(count, reason)  # outside, where the failed attempt's tensors are gone

    def _multiply(self, vectors: torch.Tensor) -> torch.Tensor:
        count = len(vectors)
        self.used = self._way(vectors)
        if not self.used:
            self._picked[count], images = self._pick(vectors)
            self.used = self._picked[count]
            return images
        return self._run(self.used, vectors)

    def _way(self, vectors: torch.Tensor) -> str:
        """The engine for such a block, "" where one has to be picked."""
        if self.engine != "auto":
            return self.engine
        if len(vectors) == 1 and 1 not in self._picked:
            self._single_calls += 1
            if vectors.device.type != "cuda" or self._single_calls <= SINGLE_CALLS:
                return "reverse"
        return self._picked.get(len(vectors), "")

    def _run(self, way: str, vectors: torch.Tensor) -> torch.Tensor:
        if way == "captured":
            return torch.cat([self._capture("reverse", vector)(vector) for vector in vectors.split(1)])
        if way == "captured batched":
            return self._capture("batched", vectors)(vectors)
        return self.op.multiply(vectors, way)

    def _capture(self, way: str, example: torch.Tensor) -> CapturedProducts:
        self.op.prepare()  # a recording of earlier weights would multiply by the Hessian there
        count = len(example)
        if count not in self._captured:
            self._captured[count] = self.op.capture(example, way)
        return self._captured[count]

    def _pick(self, vectors: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Time the candidates, the simplest first: the fastest, and the images of the block."""
        best, images = "reverse", None
        shortest, _ = self._seconds("reverse", vectors[:1])
        for way in self._candidates(vectors, shortest):
            sample = vectors[:1] if way == "captured" else vectors
            try:
                took, found = self._seconds(way, sample)
            except (RuntimeError, NotImplementedError):  # no memory for it, or an operation that has no rule for it
                continue
            if len(sample) == len(vectors):
                images = found
            if took / len(sample) < CLEARLY * shortest:
                best, shortest = way, took / len(sample)
        if not best.startswith("captured"):
            self._captured.clear()
        return best, self._run(best, vectors) if images is None else images

    def _candidates(self, vectors: torch.Tensor, single: float) -> list[str]:
        """What may beat "reverse", which took `single` seconds a vector."""
        batch = len(vectors) > 1 and self._batch_fits(vectors)
        launches = single < CAPTURE_BELOW * len(self.op.objective.pieces)
        capture = vectors.device.type == "cuda" and self.op.keeps_every_graph and launches
        ways = {"batched": batch, "captured": capture, "captured batched": batch and capture}
        return [way for way, possible in ways.items() if possible]

    def _batch_fits(self, vectors: torch.Tensor) -> bool:
        """Whether as many products as there are vectors may be under way at once."""
        once = self.op.footprint().product(max(self.op.objective.rows))
        return len(vectors) * once < memory.available(vectors.device) // 2

    def _seconds(self, way: str, vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        took, images = self._timed(way, vectors)
        if took < WARM_BELOW or vectors.device.type == "cuda":
            took = min(self._timed(way, vectors)[0] for _ in range(2))
        return took, images

    def _timed(self, way: str, vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        _wait(vectors.device)
        started = time.perf_counter()
        images = self._run(way, vectors)
        _wait(vectors.device)
        return time.perf_counter() - started, images

    def _lighter(self, count: int, reason: str) -> None:
        """Do with less memory from here on: one vector at a time, then graphs rebuilt, then smaller microbatches."""
        self._captured.clear()
        if self.used not in ("reverse", ""):
            self.used = self.engine = "reverse"
            change = "one vector at a time"
        else:
            change = self.op.lighten()
        if not change:
            raise InputError(
                f"a product with {count} vectors does not fit in memory, not even a row of a batch at a time: measure "
                "fewer parameters (params=), shorter sequences, or on a larger device"
            )
        if self.op.device.type == "cuda":
            torch.cuda.empty_cache()
        note = f"out of memory, went on with {change}"
        self.op.notes.append(note)
        warnings.warn(f"{note} ({reason})", stacklevel=2)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
