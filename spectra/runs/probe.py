"""A spectrum probe for any training loop: it looks at the model every so often and leaves no trace in it."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from spectra.backend import ranks
from spectra.algorithms.batch_noise import batch_noise
from spectra.estimates.quantities import NEAR_ZERO, summarize
from spectra.estimates.density import SpectralDensity
from spectra.algorithms.topk import Eigenpairs, default_basis
from spectra.backend.version import __version__
from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.algorithms.block_size import vectors_that_fit
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.isolation import random_states_kept, unwrap
from spectra.algorithms.lanczos import choose_policy
from spectra.operators.hessian.objective import as_batches, tensors_of
from spectra.operators.hessian.parameters import Selection
from spectra.runs.folder import Run
from spectra.runs.record import SpectrumRecord
from spectra.algorithms.slq import outliers, slq
from spectra.backend.vectors import norm

DEFLATED = 20  # outliers by default: on small language models the interval of the RMS eigenvalue is then 1.5 % wide
SYMMETRIC = 1e-3  # a gap above this is noted in the record

OperatorBuilder = Callable[..., Any]


class SpectrumProbe:
    """Measure the Hessian spectrum of `model` every `every` steps of a training loop.

        probe = SpectrumProbe(model, batches, every=200, out="runs/a")
        for i, batch in enumerate(loader):
            ...                       # forward, backward, optimizer
            probe.step(i)

    The loss is taken over the same `batches`, from the same probe vectors, at every checkpoint, so that differences
    between checkpoints are paired. Weights, gradients, buffers, modes and random states are left bit for bit as they
    were: training with the probe ends with the same weights as training without it.

    every: steps between measurements; `step(i)` measures where i is a multiple. out: a run folder to append to
    (`spectra.Run`); without it the records stay in `probe.records`.
    modes: name -> builder of the operator to measure, called as builder(model, batches, params=, loss=, microbatch=),
    with engine=, precision= and spread= where they are given, and returning a HessianOperator or a MeanOperator of
    them; by default {"full": HessianOperator}.
    probes, steps, seed, reorthogonalize: see `spectra.slq`. deflate: how many outliers to take out of the recurrence,
    found from those of the last checkpoint; by default 20 where the search for them fits in a quarter of free memory.
    near_zero_tol: |lambda| that counts as near zero.
    spread: "probes" or "batches" over the ranks of torch.distributed (`spectra.distributed`), which then all make the
    same calls; the first one writes.
    batch_groups: cut the batches into so many groups, measure with each left out too, and say in the record how much of
    every interval is probe noise and how much is batch noise (`spectra.batch_noise`); costs about as many spectra more.
    microbatch, engine, precision: see `spectra.HessianOperator`; a model in bfloat16 needs precision="float32".
    extras: model -> numbers to store beside the spectrum. config: facts for the run's config.json.
    progress: called as progress(products done, products in all) during a measurement.
    Raises InputError for an `out` that holds another run, and whatever the operator refuses.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        every: int = 200,
        out: str | os.PathLike[str] | None = None,
        modes: Mapping[str, OperatorBuilder] | None = None,
        params: Selection = None,
        loss: Callable[..., torch.Tensor] | None = None,
        probes: int = 4,
        steps: int = 100,
        seed: int = 0,
        near_zero_tol: float = NEAR_ZERO,
        deflate: int | None = None,
        reorthogonalize: str = "auto",
        microbatch: int | None = None,
        engine: str | None = None,
        precision: str | None = None,
        spread: str = "none",
        batch_groups: int = 0,
        extras: Callable[[nn.Module], Mapping[str, float]] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], Any] | None = None,
    ):
        if every < 1 or every != int(every):
            raise InputError(f"every must be a whole number of steps, at least 1, got {every}")
        if probes < 1 or steps < 1:
            raise InputError(f"probes and steps must be at least 1, got probes={probes}, steps={steps}")
        if deflate is not None and deflate < 0:
            raise InputError(f"deflate must be a number of eigenvalues, 0 or more, got {deflate}")
        if not near_zero_tol > 0:
            raise InputError(f"near_zero_tol must be positive, got {near_zero_tol}")
        self.model, self.batches, self.every = model, as_batches(batches), every
        self.modes = dict(modes) if modes is not None else {"full": HessianOperator}
        self._options: dict[str, Any] = {"params": params, "loss": loss, "microbatch": microbatch}
        self._options |= {k: v for k, v in {"engine": engine, "precision": precision}.items() if v is not None}
        self.spread = ranks.check_spread(spread)
        if spread == "batches":
            self._options["spread"] = spread
        self.probes, self.steps, self.seed = probes, steps, seed
        self.near_zero_tol, self.deflate, self.reorthogonalize = near_zero_tol, deflate, reorthogonalize
        self.extras, self.progress, self.batch_groups = extras, progress, batch_groups
        self.records: list[SpectrumRecord] = []
        self._checks: dict[str, dict[str, float]] = {}
        self._outliers: dict[str, torch.Tensor] = {}  # by mode, the last checkpoint's deflated vectors
        self.run = None
        if out is not None and ranks.rank() == 0:
            self.run = Run.create(out, {**self._settings(), **(config or {})})

    def step(self, i: int) -> list[SpectrumRecord]:
        """Call once a training step: measures where i is a multiple of `every`, and returns the new records."""
        return self.measure(i) if i % self.every == 0 else []

    def measure(self, step: int, label: str = "") -> list[SpectrumRecord]:
        """Measure now, whatever `every` says: one record a mode, appended to the run."""
        device = next(self.model.parameters()).device
        extras = {}
        with random_states_kept(device):
            if self.extras is not None:
                extras = {name: float(value) for name, value in self.extras(self.model).items()}
            return [self._measure_mode(mode, step, label, extras) for mode in self.modes]

    def _measure_mode(self, mode: str, step: int, label: str, extras: dict[str, float]) -> SpectrumRecord:
        started = time.perf_counter()
        op = self.modes[mode](self.model, self.batches, **self._options)
        try:
            if mode not in self._checks:  # once a run: it costs a few products
                self._checks[mode] = dataclasses.asdict(op.preflight())
            loss, gradient_norm = op.loss(), norm(op.gradient())
            policy = choose_policy(op, self.steps, self.reorthogonalize)
            with torch.no_grad():
                density = slq(
                    op,
                    probes=self.probes,
                    steps=self.steps,
                    seed=self.seed,
                    deflate=self._deflated(op, mode),
                    reorthogonalize=policy,
                    spread="probes" if self.spread == "probes" else "none",
                    progress=self.progress,
                )
        finally:
            op.close()
        estimates = summarize(density, self.near_zero_tol)
        noise = self._batch_noise(mode, estimates) if self.batch_groups else {}
        gap, notes = self._checks[mode]["symmetry_gap"], list(op.notes)
        if gap > SYMMETRIC:
            notes.append(f"the operator is not symmetric: u.Av and v.Au differ by {gap:.1e}")
        record = SpectrumRecord(
            step=step,
            mode=mode,
            loss=loss,
            gradient_norm=gradient_norm,
            dimension=op.shape[0],
            estimates=estimates,
            batch_noise=noise,
            near_zero_tol=self.near_zero_tol,
            probes=self.probes,
            lanczos_steps=self.steps,
            seed=self.seed,
            reorthogonalize="exact" if density.exact else policy,
            products=op.products,
            seconds=time.perf_counter() - started,
            label=label,
            extras={**extras, **self._checks[mode], "zero_share": density.zero_share()},
            versions=versions(),
            dtype=str(op.dtype).removeprefix("torch."),
            device=device_name(op.device),
            engine=op.engine_used,
            notes=notes,
        )
        if self.run is not None:
            record = self.run.append(record, density)
        self.records.append(record)
        return record

    def _batch_noise(self, mode: str, full: dict[str, Estimate]) -> dict[str, dict[str, float]]:
        splits = batch_noise(
            lambda batches: self.modes[mode](self.model, batches, **self._options),
            self.batches,
            groups=self.batch_groups,
            probes=self.probes,
            steps=self.steps,
            seed=self.seed,
            deflate=len(self._outliers[mode].T) if mode in self._outliers else 0,
            near_zero_tol=self.near_zero_tol,
            full=full,
        )
        return {name: split.to_dict() for name, split in splits.items()}

    def _deflated(self, op: Any, mode: str) -> Eigenpairs | int:
        wanted = self.deflate
        if wanted is None:
            wanted = DEFLATED if 2 * default_basis(DEFLATED) <= vectors_that_fit(op) else 0
        if not wanted or wanted + self.steps >= op.shape[0]:
            return 0
        pairs = outliers(op, wanted, seed=self.seed, start=self._outliers.get(mode))
        self._outliers[mode] = pairs.vectors
        return pairs

    def _settings(self) -> dict[str, Any]:
        """What config.json says of the measurement."""
        model = unwrap(self.model)
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "modes": list(self.modes),
            "batches": fingerprint(self.batches),
            "probes": self.probes,
            "lanczos_steps": self.steps,
            "deflated": DEFLATED if self.deflate is None else self.deflate,
            "probe_seed": self.seed,
            "near_zero_tol": self.near_zero_tol,
        }




def fingerprint(batches: list[Any]) -> str:
    """A short hash of the batches' contents, the same wherever they lie: two runs with one hash saw the same data."""
    digest = hashlib.sha256()
    for batch in batches:
        for tensor in tensors_of(batch):
            digest.update(str((tuple(tensor.shape), tensor.dtype)).encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Versions that a record names."""
    return {"spectra": __version__, "torch": torch.__version__, "python": platform.python_version()}


def device_name(device: torch.device) -> str:
    """The accelerator's name, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
