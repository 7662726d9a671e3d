"""The interface of a tool, and two tools without other libraries: `spectra` and the procedure of the WinQ paper."""

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
TOLERANCES = (ACCURACY, ACCURACY / 10)  # of residuals, which bound the errors
# The error of an eigenvalue is of the order of its squared residual. So this is often enough, but the tool cannot tell.
LOOSE = 0.03


@dataclass(frozen=True)
class Way:
    """One of a tool's functions for a density, run(probes, steps).

    on_top_of: the name of another way whose time is added, where this one is only an additional part.
    """

    run: Callable[[int, int], Any]
    on_top_of: str | None = None


@dataclass(frozen=True)
class Trace:
    """A trace, with the samples that it is the mean of, or the half-width of the tool's own 95 % interval.

    as_root: whether the half-width falls with the root of the number of products.
    """

    value: float
    samples: list[float] | None = None
    half_width: float | None = None
    as_root: bool = False


@dataclass(frozen=True)
class Eigenvalues:
    """What an eigenvalue search returned.

    converged: what the tool itself reports. ends: "both", or "magnitude" for a tool that finds the largest magnitudes.
    """

    values: list[float]
    converged: bool
    ends: str = "both"


class Tool:
    """A tool on a case. `products` counts every vector that it multiplied with the Hessian.

    A method returns {name of a way: function}. `eigenvalues` returns several functions of growing effort for each way;
    they are tried until one has converged and is right.
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
        """Remove what the tool attached to the model."""
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
    """The procedure that the text of the WinQ paper (arXiv 2605.17471) describes.

    The graph is rebuilt at every product, the three-term recurrence keeps no basis, batches are processed one by one,
    and everything is in the precision of the model.
    """

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
            product = self.product(vector)
            if below:
                product -= below[-1] * previous
            diagonal.append(torch.dot(product, vector).item())
            product -= diagonal[-1] * vector
            below.append(product.norm().item())
            previous, vector = vector, product / below[-1]
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
    """The engines to time by name beside "auto". "forward" takes minutes to compile: --tools spectra:engine=forward."""
    captured = ("captured", "captured batched") if device == "cuda" else ()
    return ("reverse", "batched", *captured)
