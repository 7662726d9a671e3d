"""Spectra along a training: an observer for any training loop, which leaves model and training as they were."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from spectra.algorithms.batch_noise import batch_noise
from spectra.algorithms.block_size import max_vectors_in_memory
from spectra.algorithms.lanczos import choose_reorthogonalization
from spectra.algorithms.slq import largest_eigenpairs, slq
from spectra.algorithms.topk import Eigenpairs, default_basis_size
from spectra.backend import ranks
from spectra.backend.errors import InputError
from spectra.backend.vectors import norm
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import summarize
from spectra.operators.base import HasLoss, LinearOperator
from spectra.operators.hessian.batches import as_batches
from spectra.operators.hessian.isolation import random_states_kept, unwrap
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.parameters import Selection
from spectra.runs.folder import Run
from spectra.runs.provenance import device_name, fingerprint, versions
from spectra.runs.record import SpectrumRecord
from spectra.runs.settings import DEFLATED, MeasurementSettings

SYMMETRIC = 1e-3  # a symmetry gap above this is noted in the record

OperatorBuilder = Callable[..., LinearOperator]


class SpectrumProbe:
    """Measure the Hessian spectrum of a model every so many training steps.

        probe = SpectrumProbe(model, batches, every=200, out="runs/a")
        for i, batch in enumerate(loader):
            ...                       # forward, backward, optimizer
            probe.step(i)

    The loss is taken over the same batches, with the same probe vectors, at every checkpoint, so that differences
    between checkpoints are paired. Weights, gradients, buffers, modes and random states are left bit for bit as they
    were: training with the probe ends with the same weights as training without it.

    Args:
        model: The model that is trained.
        batches: What the loss is taken over: a list of batches as the model takes them, see `spectra.Objective`.
        every: Training steps between two measurements.
        out: A run folder to make (`spectra.Run`). None: records are kept in `records` alone.
        modes: Which Hessians to measure, {name: builder}. A builder is called as builder(model, batches, params=,
            loss=, microbatch=), with engine=, precision= and spread= where they are set, and returns an operator
            that has a loss: a HessianOperator, or a MeanOperator of them. None: {"full": HessianOperator}.
        params: Which parameters, see `spectra.ParameterSpace`. None: all that are trained.
        loss: (outputs, targets) -> scalar, see `spectra.Objective`. None: the model's own loss.
        settings: How to measure. None: the defaults of `MeasurementSettings`.
        extras: Called with the model before a measurement; returns numbers to store beside the spectrum, by name.
        config: Facts for the run's config.json. They take the place of the probe's own entries of the same name.
        progress: Called as progress(products done, products in all) during a measurement.
        **options: Fields of `MeasurementSettings` (probes, steps, seed, deflate, ...) that differ from `settings`.

    Attributes:
        records: The records so far.
        run: The run folder; None without `out`, and on all ranks of torch.distributed but the first. With
            spread="probes" or "batches" all ranks have to make the same calls.

    Raises:
        InputError: If a setting is out of its range, `out` holds a run, or the operator refuses the model.
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
        settings: MeasurementSettings | None = None,
        extras: Callable[[nn.Module], Mapping[str, float]] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], Any] | None = None,
        **options: Any,
    ):
        if every < 1 or every != int(every):
            raise InputError(f"every must be a whole number of training steps, at least 1, got {every}")
        self.settings = dataclasses.replace(settings or MeasurementSettings(), **options)
        ranks.check_spread(self.settings.spread)
        self.model, self.batches, self.every = model, as_batches(batches), every
        self.modes: dict[str, OperatorBuilder] = {"full": HessianOperator} if modes is None else dict(modes)
        self.extras, self.progress = extras, progress
        self._operator_options = {"params": params, "loss": loss, **self.settings.operator_options()}
        self.records: list[SpectrumRecord] = []
        self._checks: dict[str, dict[str, float]] = {}  # by mode
        self._outliers: dict[str, torch.Tensor] = {}  # by mode, the last checkpoint's deflated vectors
        self.run: Run | None = None
        if out is not None and ranks.rank() == 0:
            self.run = Run.create(out, {**self._facts(), **self.settings.to_config(), **(config or {})})

    def step(self, i: int) -> list[SpectrumRecord]:
        """Measure if training step i is a multiple of `every`; to be called once a training step.

        Args:
            i: The training step.

        Returns:
            The new records, one for each mode; none if it is not time.
        """
        return self.measure(i) if i % self.every == 0 else []

    def measure(self, step: int, label: str = "") -> list[SpectrumRecord]:
        """Measure now, and append the records to the run.

        Args:
            step: The training step that the records name.
            label: A name for the occasion, such as "start".

        Returns:
            The new records, one for each mode.

        Raises:
            InputError: If the operator refuses the model or the batches.
            NonFiniteError: If a loss, a gradient or a Hessian-vector product holds NaN or infinity.
        """
        device = next(self.model.parameters()).device
        extras = {}
        with random_states_kept(device):
            if self.extras is not None:
                extras = {name: float(value) for name, value in self.extras(self.model).items()}
            return [self._measure_mode(mode, step, label, extras) for mode in self.modes]

    def _measure_mode(self, mode: str, step: int, label: str, extras: dict[str, float]) -> SpectrumRecord:
        """Measure the spectrum of one mode and append its record."""
        started = time.perf_counter()
        op = self._build(mode, self.batches)
        if not isinstance(op, HasLoss):
            built = type(op).__name__
            raise InputError(f"expected an operator with a loss for mode {mode!r}, got a {built}: use HessianOperator")
        try:
            checks = self._check(op, mode)
            loss, gradient_norm = op.loss(), norm(op.gradient())
            policy = choose_reorthogonalization(op, self.settings.steps, self.settings.reorthogonalize)
            with torch.no_grad():
                density = self._density(op, mode, policy)
        finally:
            op.close()
        estimates = summarize(density, self.settings.near_zero_tol)
        noise = self._batch_noise(mode, estimates) if self.settings.batch_groups else {}
        record = SpectrumRecord(
            step=step,
            mode=mode,
            loss=loss,
            gradient_norm=gradient_norm,
            dimension=op.shape[0],
            estimates=estimates,
            batch_noise=noise,
            reorthogonalize="exact" if density.exact else policy,
            products=op.products,
            seconds=time.perf_counter() - started,
            label=label,
            extras={**extras, "zero_share": density.zero_share()},
            checks=checks,
            versions=versions(),
            dtype=str(op.dtype).removeprefix("torch."),
            device=device_name(op.device),
            engine=op.engine_used,
            notes=_notes(op, checks),
            **self.settings.to_record(),
        )
        if self.run is not None:
            record = self.run.append(record, density)
        self.records.append(record)
        return record

    def _build(self, mode: str, batches: list[Any]) -> LinearOperator:
        """The operator of a mode on some batches."""
        return self.modes[mode](self.model, batches, **self._operator_options)

    def _check(self, op: HasLoss, mode: str) -> dict[str, float]:
        """The operator's checks, by name; made once a run for each mode, as they cost a few products."""
        if mode not in self._checks:
            self._checks[mode] = dataclasses.asdict(op.preflight())
        return self._checks[mode]

    def _density(self, op: LinearOperator, mode: str, policy: str) -> SpectralDensity:
        """The spectral density, by stochastic Lanczos quadrature after deflation."""
        return slq(
            op,
            probes=self.settings.probes,
            steps=self.settings.steps,
            seed=self.settings.seed,
            deflate=self._deflated(op, mode),
            reorthogonalize=policy,
            spread="probes" if self.settings.spread == "probes" else "none",
            progress=self.progress,
        )

    def _deflated(self, op: LinearOperator, mode: str) -> Eigenpairs | int:
        """The eigenpairs to deflate, searched from those of the last checkpoint; 0 for none."""
        wanted = self.settings.deflate
        if wanted is None:
            wanted = DEFLATED if 2 * default_basis_size(DEFLATED) <= max_vectors_in_memory(op) else 0
        if not wanted or wanted + self.settings.steps >= op.shape[0]:
            return 0
        pairs = largest_eigenpairs(op, wanted, seed=self.settings.seed, start=self._outliers.get(mode))
        self._outliers[mode] = pairs.vectors
        return pairs

    def _batch_noise(self, mode: str, full: dict[str, Estimate]) -> dict[str, dict[str, float]]:
        """How much of each interval is probe noise and how much is batch noise, as the record keeps it."""
        splits = batch_noise(
            lambda batches: self._build(mode, batches),
            self.batches,
            groups=self.settings.batch_groups,
            probes=self.settings.probes,
            steps=self.settings.steps,
            seed=self.settings.seed,
            deflate=len(self._outliers[mode].T) if mode in self._outliers else 0,
            near_zero_tol=self.settings.near_zero_tol,
            full=full,
        )
        return {name: split.to_dict() for name, split in splits.items()}

    def _facts(self) -> dict[str, Any]:
        """What config.json says of model and data."""
        model = unwrap(self.model)
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "modes": list(self.modes),
            "batches": fingerprint(self.batches),
        }


def _notes(op: HasLoss, checks: Mapping[str, float]) -> list[str]:
    """The operator's notes, and one of our own if it is not symmetric."""
    gap = checks["symmetry_gap"]
    if gap > SYMMETRIC:
        return [*op.notes, f"the operator is not symmetric: u.Av and v.Au differ by {gap:.1e}"]
    return list(op.notes)
