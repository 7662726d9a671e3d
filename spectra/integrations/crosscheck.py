"""PyHessian itself beside this engine, on the same model, batches and loss."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import nn

from spectra.algorithms.slq import slq
from spectra.algorithms.topk import topk
from spectra.algorithms.trace import trace
from spectra.backend.errors import InputError, first_line
from spectra.backend.extras import need
from spectra.estimates.estimate import Estimate
from spectra.operators.hessian.batches import as_batches, rows_in
from spectra.operators.hessian.isolation import isolated, random_states_kept, unwrap
from spectra.operators.hessian.objective import Objective
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.parameters import ParameterSpace, Selection

EIG = "PyHessian 0.1 calls torch.eig, which torch has removed: torch.linalg.eig took its place here"
COPY = (
    "PyHessian ran on a copy of the model: it sets evaluation mode and keeps it, and leaves gradients with their graph "
    "in .grad"
)
TASKS = ("preparation", "eigenvalues", "trace", "density")
SAME_LOSS = 1e-5  # relative difference of two losses that rounding in float32 may make


@dataclass(frozen=True)
class Compared:
    """One quantity, from PyHessian and from this engine.

    Attributes:
        quantity: Its name.
        pyhessian: PyHessian's number; NaN where it has none.
        spectra: This engine's, with its interval.
    """

    quantity: str
    pyhessian: float
    spectra: Estimate

    @property
    def inside(self) -> bool | None:
        """Whether PyHessian's number lies in the interval; None where it has none."""
        return None if math.isnan(self.pyhessian) else bool(self.spectra.low <= self.pyhessian <= self.spectra.high)

    @property
    def verdict(self) -> str:
        """Where PyHessian's number lies: inside the interval, or how far it is from the value."""
        if self.inside is None:
            return "no number"
        if self.inside:
            return "inside"
        distance = abs(self.pyhessian - self.spectra.value)
        side = "below" if self.pyhessian < self.spectra.value else "above"
        if distance > abs(self.spectra.value):
            return f"outside, {distance:.2g} {side}"
        return f"outside, {100 * distance / abs(self.spectra.value):.2g} % {side}"

    def __str__(self) -> str:
        return f"{self.quantity}: PyHessian {self.pyhessian:.5g}, spectra {self.spectra}: {self.verdict}"


@dataclass(frozen=True)
class Cost:
    """What a part of the work cost: seconds, and Hessian-vector products."""

    seconds: float
    products: int


@dataclass(frozen=True)
class CrossCheck:
    """PyHessian's numbers beside this engine's.

    Attributes:
        quantities: What was compared.
        costs: For each part of the work, what it cost PyHessian and this engine. The preparation of this engine holds
            its checks, which take about five products more than are counted.
        notes: What PyHessian did otherwise than asked, and what was done for it to run.
        dimension: The number of parameters measured.
        loss: The loss over all batches.
        device: The device.
    """

    quantities: tuple[Compared, ...]
    costs: dict[str, tuple[Cost, Cost]]
    notes: tuple[str, ...]
    dimension: int
    loss: float
    device: str

    def to_dict(self) -> dict[str, Any]:
        """The same in types that JSON has."""
        quantities = {
            each.quantity: {
                "pyhessian": each.pyhessian,
                "spectra": each.spectra.to_dict(),
                "inside": each.inside,
                "verdict": each.verdict,
            }
            for each in self.quantities
        }
        costs = {
            name: {"pyhessian": vars(theirs), "spectra": vars(ours)} for name, (theirs, ours) in self.costs.items()
        }
        facts = {"dimension": self.dimension, "loss": self.loss, "device": self.device}
        return {**facts, "quantities": quantities, "costs": costs, "notes": list(self.notes)}

    def __str__(self) -> str:
        lines = [str(each) for each in self.quantities]
        for name, both in self.costs.items():
            theirs, ours = (f"{cost.seconds:.3g} s, {cost.products} products" for cost in both)
            lines.append(f"{name}: PyHessian {theirs}; spectra {ours}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def crosscheck(
    model: nn.Module,
    batches: Any,
    loss: Callable[..., torch.Tensor] | None = None,
    *,
    params: Selection = None,
    top: int = 1,
    probes: int = 4,
    steps: int = 40,
    max_iterations: int = 100,
    tol: float = 1e-3,
    seed: int = 0,
) -> CrossCheck:
    """Run PyHessian and this engine on the same model, batches and loss, and compare what they find.

    PyHessian gets a copy of the model, of which the other parameters are frozen, and is called as its users call it:
    with `data` for one batch, which is quickest, and with a loader for several. Its numbers are taken as they come,
    stopped by its own rules. Both are random, so that PyHessian's number may lie outside the interval because it took
    fewer random vectors; what it took is in the costs and the notes.

    Args:
        model: The model. It is left as it was.
        batches: See `spectra.Objective`.
        loss: See `spectra.Objective`.
        params: Which parameters, see `spectra.ParameterSpace`; by default all trainable ones.
        top: How many eigenvalues of largest magnitude.
        probes: Random vectors of the density.
        steps: Lanczos steps for each.
        max_iterations: The most iterations of PyHessian for an eigenvalue, and the most samples of a trace.
        tol: The tolerance of both for eigenvalues, and of PyHessian's rule for the trace.
        seed: Of the random vectors.

    Returns:
        The `CrossCheck`.

    Raises:
        InputError: If PyHessian is not installed, or the model, the batches or a number cannot be used.

    Example:
        >>> import torch
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 30), torch.nn.Tanh(), torch.nn.Linear(30, 2))
        >>> batch = (torch.randn(64, 8), torch.randint(2, (64,)))
        >>> found = crosscheck(model, [batch], torch.nn.CrossEntropyLoss())
        >>> [cost.products for cost in found.costs["density"]]  # 4 random vectors of 40 steps, in both
        [160, 160]
        >>> found.quantities[2].quantity, found.quantities[2].inside
        ('largest eigenvalue, density', True)
    """
    need("pyhessian")
    for name, number in {"top": top, "probes": probes, "steps": steps, "max_iterations": max_iterations}.items():
        if number < 1:
            raise InputError(f"{name.replace('_', '-')} must be at least 1, got {number}")
    batches = as_batches(batches)
    asked = SimpleNamespace(top=top, probes=probes, steps=steps, max_iterations=max_iterations, tol=tol, seed=seed)
    ours, costs_of_ours, op = _ours(model, batches, loss, params, asked)
    theirs = _Theirs(unwrap(model), batches, loss, op.space.names, asked)
    theirs.run()
    number_of = theirs.numbers
    quantities = tuple(Compared(name, number_of.get(name, math.nan), estimate) for name, estimate in ours.items())
    costs = {task: (theirs.costs[task], costs_of_ours[task]) for task in TASKS if task in theirs.costs}
    own_loss = theirs.loss
    notes = list(theirs.notes)
    if own_loss is not None and abs(own_loss - op.loss()) > SAME_LOSS * abs(op.loss()):
        notes.insert(0, f"PyHessian weights batches by their rows: its loss is {own_loss:.6g}, not {op.loss():.6g}")
    found = CrossCheck(quantities, costs, tuple(notes), op.shape[0], op.loss(), op.device.type)
    op.close()
    return found


def _ours(
    model: nn.Module, batches: list[Any], loss: Any, params: Selection, asked: SimpleNamespace
) -> tuple[dict[str, Estimate], dict[str, Cost], HessianOperator]:
    """This engine's estimates by name, what each part cost, and the operator."""
    op = HessianOperator(model, batches, params, loss)
    costs: dict[str, Cost] = {}
    importlib.import_module("torch._dynamo")  # which the first measurement of a process would wait for

    def timed(task: str, work: Callable[[], Any]) -> Any:
        before = op.products
        found, seconds = _seconds(work, op.device)
        costs[task] = Cost(seconds, op.products - before)
        return found

    timed("preparation", op.preflight)
    top = min(asked.top, op.shape[0])
    pairs = timed("eigenvalues", lambda: topk(op, top, tol=asked.tol, seed=asked.seed))
    estimates = {}
    for place, i in enumerate(np.argsort(-np.abs(pairs.values), kind="stable"), start=1):
        value, reach = float(pairs.values[i]), float(pairs.residuals[i]) + op.rounding() * abs(pairs.values[i])
        reason = "" if pairs.resolved[i] else pairs.unverified or "the search did not converge"
        estimates[_eigenvalue(place)] = Estimate(value, value - reach, value + reach, not reason, reason)
    estimates["trace"] = timed("trace", lambda: trace(op, probes=asked.max_iterations, seed=asked.seed))
    density = timed("density", lambda: slq(op, probes=asked.probes, steps=asked.steps, seed=asked.seed))
    estimates |= {
        "largest eigenvalue, density": density.lambda_max(),
        "smallest eigenvalue, density": density.lambda_min(),
        "root-mean-square eigenvalue": density.rms(),
        "negative share": density.negative_share(),
    }
    return estimates, costs, op


def _eigenvalue(place: int) -> str:
    return "eigenvalue of largest magnitude" if place == 1 else f"eigenvalue {place} by magnitude"


class _Theirs:
    """PyHessian on a copy of the model.

    Args:
        model: The model, without wrappers.
        batches: A list of batches.
        loss: The loss function, None for the model's own.
        names: The names of the parameters to measure.
        asked: The arguments of `crosscheck` that are numbers.

    Attributes:
        numbers: Its numbers by quantity; one is missing where it failed.
        costs: What each part cost.
        notes: What to say of it.
        loss: The loss that it measures, None where it failed.
    """

    def __init__(self, model: nn.Module, batches: list[Any], loss: Any, names: tuple[str, ...], asked: SimpleNamespace):
        self.asked, self.notes = asked, [COPY]
        self.numbers: dict[str, float] = {}
        self.costs: dict[str, Cost] = {}
        self.loss: float | None = None
        self._products = 0
        self._model = copy.deepcopy(model)
        self._model.zero_grad(set_to_none=True)
        measured = ParameterSpace(self._model, list(names)).parameters
        for parameter in self._model.parameters():
            parameter.requires_grad_(any(parameter is each for each in measured))
        self._device = measured[0].device
        self._losses = _LossOfBatch(self._model, Objective(self._model, batches, loss), self._device)

    def run(self) -> None:
        """Measure. What it raises becomes a note."""
        with isolated(self._model), random_states_kept(self._device), self._counted() as package:
            torch.manual_seed(self.asked.seed)
            found = self._timed("preparation", lambda: self._made(package))
            if found is not None:
                self.loss = self._losses.by_rows()
                self._eigenvalues(found)
                self._trace(found)
                self._density(found)
        for parameter in self._model.parameters():
            parameter.grad = None  # it refers to the graph, which refers to it

    def _made(self, package: Any) -> Any:
        """PyHessian's object, whose inputs are the number of a batch, once for each row."""
        loader = self._losses.loader()
        data = {"data": loader[0]} if len(loader) == 1 else {"dataloader": loader}
        return package.hessian(self._losses, lambda value, _: value, cuda=self._device.type == "cuda", **data)

    def _eigenvalues(self, found: Any) -> None:
        asked = self.asked
        top = min(asked.top, sum(p.numel() for p in found.params))
        result = self._timed(
            "eigenvalues", lambda: found.eigenvalues(maxIter=asked.max_iterations, tol=asked.tol, top_n=top)
        )
        if result is None:
            return
        ordered = sorted(map(float, result[0]), key=abs, reverse=True)
        self.numbers |= {_eigenvalue(place): value for place, value in enumerate(ordered, start=1)}
        if self.costs["eigenvalues"].products == asked.max_iterations * top:
            self.notes.append(
                f"PyHessian's power iteration took all {asked.max_iterations} iterations, and says nothing of it: its "
                "eigenvalue may not have converged"
            )

    def _trace(self, found: Any) -> None:
        asked = self.asked
        samples = self._timed("trace", lambda: found.trace(maxIter=asked.max_iterations, tol=asked.tol))
        if samples is None:
            return
        self.numbers["trace"] = float(np.mean(samples))
        if len(samples) == asked.max_iterations:
            return
        error = f"; their standard error is {np.std(samples, ddof=1) / len(samples) ** 0.5:.2g}"
        below = len(samples) > 1 and np.mean(samples[:-1]) < 0  # its rule divides by the mean before, with its sign
        cause = "a running mean below zero" if below else f"its running mean moved by less than {asked.tol:g}"
        self.notes.append(
            f"PyHessian's trace ended after {len(samples)} of {asked.max_iterations} samples ({cause})"
            + (error if len(samples) > 1 else "")
        )

    def _density(self, found: Any) -> None:
        with _torch_eig() as supplied:
            self.notes += [EIG] if supplied else []
            result = self._timed("density", lambda: found.density(iter=self.asked.steps, n_v=self.asked.probes))
        if result is None:
            return
        nodes, weights = (np.array(part, dtype=float) for part in result)
        self.numbers["largest eigenvalue, density"] = float(nodes.max())
        self.numbers["smallest eigenvalue, density"] = float(nodes.min())
        self.numbers["root-mean-square eigenvalue"] = float(np.sqrt((weights * nodes**2).sum(axis=1).mean()))
        self.numbers["negative share"] = float((weights * (nodes < 0)).sum(axis=1).mean())

    def _timed(self, task: str, work: Callable[[], Any]) -> Any:
        """What the work returns, None where it fails; its cost is kept."""
        before = self._products
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about gradients that keep their graph
                found, seconds = _seconds(work, self._device)
        except Exception as error:  # whatever another library raises
            self.notes.append(f"PyHessian failed ({task}: {first_line(error)})")
            return None
        self.costs[task] = Cost(seconds, self._products - before)
        return found

    @contextlib.contextmanager
    def _counted(self) -> Iterator[Any]:
        """The package, with its two ways to multiply counted."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its docstrings hold escapes that Python refuses some day
            module = importlib.import_module("pyhessian.hessian")

        def counted(multiply: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any) -> Any:
                self._products += 1
                return multiply(*arguments)

            return call

        alone, looped = module.hessian_vector_product, module.hessian.dataloader_hv_product
        with (
            mock.patch.object(module, "hessian_vector_product", counted(alone)),
            mock.patch.object(module.hessian, "dataloader_hv_product", counted(looped)),
        ):
            yield module


class _LossOfBatch(nn.Module):
    """A model in the form that PyHessian calls: the number of a batch goes in, the loss of that batch comes out."""

    def __init__(self, model: nn.Module, objective: Objective, device: torch.device):
        super().__init__()
        self.model, self._objective, self._device = model, objective, device

    def forward(self, indices: torch.Tensor) -> torch.Tensor:
        """The loss of the batch that every entry names."""
        return self._objective.forward(self._objective.pieces[int(indices[0])], self._device)

    def loader(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """For each batch its number, once for each row, which is what PyHessian weights it by, and no targets."""
        rows = [rows_in(piece.batch) for piece in self._objective.pieces]
        return [(torch.full((count,), index), torch.zeros(count)) for index, count in enumerate(rows)]

    def by_rows(self) -> float:
        """The mean of the batches' losses, weighted by rows."""
        with torch.no_grad():
            losses = [(len(indices), float(self(indices))) for indices, _ in self.loader()]
        return sum(rows * value for rows, value in losses) / sum(rows for rows, _ in losses)


@contextlib.contextmanager
def _torch_eig() -> Iterator[bool]:
    """Supply torch.eig where torch has none that works; yields whether it was supplied."""

    def eig(matrix: torch.Tensor, eigenvectors: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Eigenvalues (m, 2), real and imaginary parts, and vectors in columns."""
        values, vectors = torch.linalg.eig(matrix)
        return torch.view_as_real(values), vectors.real

    try:
        torch.eig(torch.eye(2), eigenvectors=True)  # type: ignore[attr-defined]
    except (AttributeError, RuntimeError):
        with mock.patch.object(torch, "eig", eig, create=True):
            yield True
    else:
        yield False


def _seconds(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    """What the work returns, and how long it took."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    found = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return found, time.perf_counter() - started
