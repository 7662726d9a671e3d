"""Which engine multiplies a block of vectors: the one asked for, or the fastest of those timed at the first block."""

from __future__ import annotations

import time

import torch

from spectra.backend import memory
from spectra.backend.errors import InputError, NonFiniteError, first_line
from spectra.operators.hessian.engines import ENGINES, CapturedProducts
from spectra.operators.hessian.graphs import GraphStore

CAPTURE_BELOW = 0.2  # seconds a vector and microbatch: slower products are compute-bound, and launches cost nothing
CLEARLY_FASTER = 0.9  # of the time of a simpler engine, before that one is replaced
SINGLE_CALLS = 3  # products of one vector before it is worth looking for a faster engine for more of them
WARM_BELOW = 0.1  # seconds: a shorter first call was mostly warming up, so it is timed again
AGREEMENT = 1e-2  # relative difference from "reverse" above which an engine's products are taken to be wrong


class EnginePick:
    """Multiplies blocks of vectors with the Hessian.

    The pick is made once for a block size and outlives a change of weights. What was captured does not.

    Args:
        graphs: the gradient's graphs.
        engine: one of `spectra.operators.hessian.engines.ENGINES`.
    """

    def __init__(self, graphs: GraphStore, engine: str):
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        self.graphs, self.engine, self.used = graphs, engine, ""
        self._picked: dict[int, str] = {}
        self._captured: dict[int, CapturedProducts] = {}
        self._single_calls = 0
        self._compared: set[int] = set()  # sizes of block whose products were compared with single ones

    def forget(self) -> None:
        """Drop what belongs to the weights as they were."""
        self._captured.clear()

    def multiply(self, vectors: torch.Tensor) -> torch.Tensor:
        """The products of the rows of `vectors`, (k, n)."""
        return self.graphs.run_within_memory(lambda: self._multiply(vectors), self.reduce_memory, vectors=len(vectors))

    def reduce_memory(self) -> str:
        """Use less memory from here on: one vector at a time, then as `GraphStore.reduce_memory`."""
        self._captured.clear()
        if self.used not in ("reverse", ""):
            self.used = self.engine = "reverse"
            return "one vector at a time"
        return self.graphs.reduce_memory()

    def _multiply(self, vectors: torch.Tensor) -> torch.Tensor:
        count = len(vectors)
        self.used = self._engine_for(vectors)
        if not self.used:
            self._picked[count], images = self._pick(vectors)
            self.used = self._picked[count]
            return images
        if self.engine in ("auto", "reverse"):
            return self._run(self.used, vectors)
        return self._compared_with_one(vectors)

    def _compared_with_one(self, vectors: torch.Tensor) -> torch.Tensor:
        """The products by the engine that was asked for: the first of a new size of block against that of one vector.

        The products of single vectors are compared with differences of the gradient.
        """
        try:
            images = self._run(self.engine, vectors)
            if len(vectors) == 1 or len(vectors) in self._compared:
                return images
            single = self._run(self.engine, vectors[:1])
        except (RuntimeError, InputError) as error:
            # the loss was computed before without forward mode, so a failure now is one of the engine
            known = isinstance(error, InputError) and (self.engine != "forward" or isinstance(error, NonFiniteError))
            if known or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"engine={self.engine!r} cannot multiply through this model ({first_line(error)[:200]}): use "
                "engine='auto' or 'reverse'"
            ) from error
        if not _agrees(images[:1], single):
            raise InputError(
                f"engine={self.engine!r} gives other products for {len(vectors)} vectors at once than for one, which "
                "are wrong: use engine='reverse'"
            )
        self._compared.add(len(vectors))
        return images

    def _engine_for(self, vectors: torch.Tensor) -> str:
        """The engine for such a block, "" where one has to be picked."""
        if self.engine != "auto":
            return self.engine
        if len(vectors) == 1 and 1 not in self._picked:
            self._single_calls += 1
            if vectors.device.type != "cuda" or self._single_calls <= SINGLE_CALLS:
                return "reverse"
        return self._picked.get(len(vectors), "")

    def _run(self, engine: str, vectors: torch.Tensor) -> torch.Tensor:
        if engine == "captured":
            return torch.cat([self._capture("reverse", vector)(vector) for vector in vectors.split(1)])
        if engine == "captured batched":
            return self._capture("batched", vectors)(vectors)
        return self.graphs.multiply(vectors, engine)

    def _capture(self, engine: str, example: torch.Tensor) -> CapturedProducts:
        if self.graphs.prepare():
            self._captured.clear()  # a recording of earlier weights would multiply by the Hessian there
        count = len(example)
        if count not in self._captured:
            self._captured[count] = self.graphs.capture(example, engine)
        return self._captured[count]

    def _pick(self, vectors: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Time the candidates, the simplest first: the fastest whose products agree with those of "reverse"."""
        best, images = "reverse", None
        shortest, reference = self._seconds("reverse", vectors[:1])
        for engine in self._candidates(vectors, shortest):
            sample = vectors[:1] if engine == "captured" else vectors
            try:
                took, found = self._seconds(engine, sample)
            except (RuntimeError, NotImplementedError, InputError):  # no memory, or an operation without a rule for it
                continue
            if not _agrees(found[:1], reference):
                self.graphs.note(f"engine '{engine}' gives other products than 'reverse' and is not used")
                continue
            if len(sample) == len(vectors):
                images = found
            if took / len(sample) < CLEARLY_FASTER * shortest:
                best, shortest = engine, took / len(sample)
        if not best.startswith("captured"):
            self._captured.clear()
        return best, self._run(best, vectors) if images is None else images

    def _candidates(self, vectors: torch.Tensor, single: float) -> list[str]:
        """The engines that may beat "reverse", which took `single` seconds a vector."""
        batch = len(vectors) > 1 and self._batch_fits(vectors)
        launch_bound = single < CAPTURE_BELOW * len(self.graphs.objective.pieces)
        capture = vectors.device.type == "cuda" and self.graphs.keeps_every_graph and launch_bound
        engines = {"batched": batch, "captured": capture, "captured batched": batch and capture}
        return [engine for engine, possible in engines.items() if possible]

    def _batch_fits(self, vectors: torch.Tensor) -> bool:
        """Whether as many products as there are vectors may be under way at once."""
        once = self.graphs.footprint().product(max(self.graphs.objective.rows))
        return len(vectors) * once < memory.available(vectors.device) // 2

    def _seconds(self, engine: str, vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        took, images = self._timed(engine, vectors)
        if took < WARM_BELOW or vectors.device.type == "cuda":
            took = min(self._timed(engine, vectors)[0] for _ in range(2))
        return took, images

    def _timed(self, engine: str, vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        _wait(vectors.device)
        started = time.perf_counter()
        images = self._run(engine, vectors)
        _wait(vectors.device)
        return time.perf_counter() - started, images


def _agrees(found: torch.Tensor, reference: torch.Tensor) -> bool:
    difference = float((found - reference).double().norm())
    return not difference > AGREEMENT * float(reference.double().norm())  # NaN counts as agreement: it is found later


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
