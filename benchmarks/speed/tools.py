"""What every tool is asked for, and the two that need no other library: ours and the paper's recipe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from models import Case

import spectra

EIGENVALUES = 10  # five at each end
ACCURACY = 1e-3  # relative, of each
TOLERANCES = (ACCURACY, ACCURACY / 10)  # of residuals, which then vouch for the accuracy
# An eigenvalue's error goes with the square of its residual, so this may do, but nothing in the answer tells.
LOOSE = 0.03


@dataclass(frozen=True)
class Way:
    """One of a tool's ways to compute a density, run(probes, steps). on_top_of: what comes first, by its name, where
    this is only what another call of the tool adds to it."""

    run: Callable[[int, int], Any]
    on_top_of: str | None = None


@dataclass(frozen=True)
class Trace:
    """A trace, with the samples whose mean it is or the half-width of the tool's own 95 % interval, if it has them.

    as_root: whether that half-width falls with the root of the products.
    """

    value: float
    samples: list[float] | None = None
    half_width: float | None = None
    as_root: bool = False


@dataclass(frozen=True)
class Eigenvalues:
    """What an eigenvalue search returned. converged: what the tool itself says. ends: "both", or "magnitude" for a
    tool that knows the largest magnitudes only."""

    values: list[float]
    converged: bool
    ends: str = "both"


class Tool:
    """A tool on a case. `products` counts every vector that it multiplied with the Hessian.

    A method returns {way: how to run it}. `eigenvalues` gives each way as attempts of growing effort, to be tried
    until one says it has converged and is right.
    """

    products = 0

    def __init__(self, case: Case):
        self.case = case

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        """H v. (n,)"""
        raise NotImplementedError

    def densities(self) -> dict[str, Way]:
        return {}

    def traces(self) -> dict[str, Callable[[int], Trace]]:
        return {}

    def eigenvalues(self) -> dict[str, list[Callable[[], Eigenvalues]]]:
        return {}

    def close(self) -> None:
        """Let go of what the tool attached to the model."""
        self.case.model.zero_grad(set_to_none=True)


class Spectra(Tool):
    """This project. options: those of `spectra.HessianOperator`, by name."""

    def __init__(self, case: Case, *, count: int = 1, **options: Any):
        super().__init__(case)
        self.op = spectra.HessianOperator(case.model, case.batches(count), **options)

    @property
    def products(self) -> int:
        return self.op.products

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        return self.op @ vector

    def densities(self) -> dict[str, Way]:
        def run(probes: int, steps: int) -> None:
            density = spectra.slq(self.op, probes=probes, steps=steps)
            density.density(np.linspace(density.nodes.min(), density.nodes.max(), 1024))

        return {"slq": Way(run)}

    def traces(self) -> dict[str, Callable[[int], Trace]]:
        return {name: self._trace(name) for name in ("hutchinson", "hutch++", "xtrace")}

    def _trace(self, method: str) -> Callable[[int], Trace]:
        def run(probes: int) -> Trace:
            found = spectra.trace(self.op, method=method, probes=probes)
            return Trace(found.value, half_width=found.half_width, as_root=method == "hutchinson")

        return run

    def eigenvalues(self) -> dict[str, list[Callable[[], Eigenvalues]]]:
        def attempt(tol: float, verify: bool) -> Callable[[], Eigenvalues]:
            def run() -> Eigenvalues:
                found = spectra.topk(self.op, EIGENVALUES, which="BE", tol=tol, verify=verify)
                return Eigenvalues(found.values.tolist(), bool(found.converged.all()))

            return run

        return {
            "topk": [attempt(tol, True) for tol in TOLERANCES],
            "topk, verify=False": [attempt(tol, False) for tol in TOLERANCES],
            f"topk, verify=False, tol={LOOSE:g}": [attempt(LOOSE, False)],
        }

    def close(self) -> None:
        self.op.close()
        super().close()


class Paper(Tool):
    """The recipe of the WinQ paper as its text tells it: the graph is rebuilt at every product, the three-term
    recurrence keeps no basis, batches come one after the other, all in the precision of the model."""

    def product(self, vector: torch.Tensor) -> torch.Tensor:
        self.products += 1
        return self.case.product(vector)

    def densities(self) -> dict[str, Way]:
        def run(probes: int, steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            return [self._rule(self.case.vector(probe), steps) for probe in range(probes)]

        return {"Lanczos": Way(run)}

    def _rule(self, vector: torch.Tensor, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Nodes and weights of the Gauss rule of `vector`: two tensors (steps,)."""
        diagonal: list[float] = []
        below: list[float] = []
        previous = torch.zeros_like(vector)
        for _ in range(steps):
            image = self.product(vector)
            if below:
                image -= below[-1] * previous
            diagonal.append(torch.dot(image, vector).item())
            image -= diagonal[-1] * vector
            below.append(image.norm().item())
            previous, vector = vector, image / below[-1]
        side = torch.diag(torch.tensor(below[:-1]), 1)
        nodes, rotation = torch.linalg.eigh(torch.diag(torch.tensor(diagonal)) + side + side.T)
        return nodes, rotation[0] ** 2

    def traces(self) -> dict[str, Callable[[int], Trace]]:
        def run(probes: int) -> Trace:
            samples = []
            for _ in range(probes):
                v = torch.randint(0, 2, (self.case.dimension,), device=self.case.device).to(self.case.dtype) * 2 - 1
                samples.append(torch.dot(v, self.product(v)).item())
            return Trace(sum(samples) / probes, samples)

        return {"hutchinson": run}


def engines(device: str) -> tuple[str, ...]:
    """The engines to time by name beside "auto". "forward" compiles for minutes: --tools spectra:engine=forward."""
    captured = ("captured", "captured batched") if device == "cuda" else ()
    return ("reverse", "batched", *captured)
