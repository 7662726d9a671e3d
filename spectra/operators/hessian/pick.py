"""Which engine multiplies a block of vectors: the one asked for, or the fastest of those timed at the first block."""

from __future__ import annotations

import time

import torch

from spectra.backend import memory
from spectra.backend.errors import InputError, NonFiniteError, first_line
from spectra.operators.hessian.engines import ENGINES, CapturedProducts
from spectra.operators.hessian.graphs import GraphStore, Part

CAPTURE_BELOW = 0.2  # seconds a vector and microbatch: slower products are compute-bound, and capturing gains nothing
CLEARLY_FASTER = 0.9  # part of a simpler engine's time below which another engine replaces it
SINGLE_CALLS = 3  # products of single vectors before other engines are timed for them
WARM_BELOW = 0.1  # seconds: a first call below this may be mostly warm-up, so it is timed again
AGREEMENT = 1e-2  # relative difference from "reverse" above which an engine's products are taken to be wrong


class EnginePick:
    """Multiplies blocks of vectors with the Hessian.

    An engine is picked once for each block size, and kept when the weights change. Captured products are recorded anew.

    Args:
        graphs: The gradient's graphs.
        engine: One of `spectra.operators.hessian.engines.ENGINES`.
        part: Positions of the parameters of a diagonal block; None for all of them.
    """

    def __init__(self, graphs: GraphStore, engine: str, part: Part = None):
        if engine not in ENGINES:
            raise InputError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
        self.graphs, self.engine, self.part, self.used = graphs, engine, part, ""
        self._picked: dict[int, str] = {}
        self._captured: dict[int, CapturedProducts] = {}
        self._single_calls = 0
        self._compared: set[int] = set()  # block sizes whose products were compared with those of single vectors

    def forget(self) -> None:
        """Drop captured products, which belong to earlier weights."""
        self._captured.clear()

    def pick_again(self) -> None:
        """Pick engines anew: which of them is the fastest depends on which graphs are kept."""
        self._picked.clear()
        self._captured.clear()
        self._single_calls = 0

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
            self._picked[count], products = self._pick(vectors)
            self.used = self._picked[count]
            return products
        if self.engine in ("auto", "reverse"):
            return self._run(self.used, vectors)
        return self._compared_with_one(vectors)

    def _compared_with_one(self, vectors: torch.Tensor) -> torch.Tensor:
        """The products by the engine that was asked for. For a new block size the first is compared with a single one.

        (Products of single vectors have been compared with differences of the gradient.)
        """
        try:
            products = self._run(self.engine, vectors)
            if len(vectors) == 1 or len(vectors) in self._compared:
                return products
            single = self._run(self.engine, vectors[:1])
        except (RuntimeError, InputError) as error:
            # the loss itself has been computed before, so the engine causes this failure
            known = isinstance(error, InputError) and (self.engine != "forward" or isinstance(error, NonFiniteError))
            if known or isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(
                f"engine={self.engine!r} cannot multiply through this model ({first_line(error)[:200]}): use "
                "engine='auto' or 'reverse'"
            ) from error
        if not _agrees(products[:1], single):
            raise InputError(
                f"engine={self.engine!r} gives other products for {len(vectors)} vectors at once than for one, which "
                "are wrong: use engine='reverse'"
            )
        self._compared.add(len(vectors))
        return products

    def _engine_for(self, vectors: torch.Tensor) -> str:
        """The engine for a block of this size; "" if it has to be picked."""
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
        return self.graphs.multiply(vectors, engine, self.part)

    def _capture(self, engine: str, example: torch.Tensor) -> CapturedProducts:
        if self.graphs.prepare():
            self._captured.clear()  # a recording of earlier weights would multiply by the Hessian there
        count = len(example)
        if count not in self._captured:
            self._captured[count] = self.graphs.capture(example, engine, self.part)
        return self._captured[count]

    def _pick(self, vectors: torch.Tensor) -> tuple[str, torch.Tensor]:
        """Time the candidates, the simplest first. Return the fastest that agrees with "reverse", and its products."""
        best, products = "reverse", None
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
                products = found
            if took / len(sample) < CLEARLY_FASTER * shortest:
                best, shortest = engine, took / len(sample)
        if not best.startswith("captured"):
            self._captured.clear()
        return best, self._run(best, vectors) if products is None else products

    def _candidates(self, vectors: torch.Tensor, single: float) -> list[str]:
        """The engines that may beat "reverse", which took `single` seconds a vector."""
        batch = len(vectors) > 1 and self._batch_fits(vectors)
        launch_bound = single < CAPTURE_BELOW * len(self.graphs.objective.pieces)
        capture = vectors.device.type == "cuda" and self.graphs.keeps_every_graph and launch_bound
        engines = {"batched": batch, "captured": capture, "captured batched": batch and capture}
        return [engine for engine, possible in engines.items() if possible]

    def _batch_fits(self, vectors: torch.Tensor) -> bool:
        """Whether memory allows the products of all vectors at once."""
        once = self.graphs.footprint().product(max(self.graphs.objective.rows))
        return len(vectors) * once < memory.available(vectors.device) // 2

    def _seconds(self, engine: str, vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        took, products = self._timed(engine, vectors)
        if took < WARM_BELOW or vectors.device.type == "cuda":
            took = min(self._timed(engine, vectors)[0] for _ in range(2))
        return took, products

    def _timed(self, engine: str, vectors: torch.Tensor) -> tuple[float, torch.Tensor]:
        _wait(vectors.device)
        started = time.perf_counter()
        products = self._run(engine, vectors)
        _wait(vectors.device)
        return time.perf_counter() - started, products


def _agrees(found: torch.Tensor, reference: torch.Tensor) -> bool:
    difference = float((found - reference).double().norm())
    return not difference > AGREEMENT * float(reference.double().norm())  # NaN counts as agreement: it is found later


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
