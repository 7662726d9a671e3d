"""Spectra along a training: an observer for any training loop, which leaves model and training as they were."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import numbers
import os
import re
import time
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter
from torch.utils.data import DataLoader

from spectra.algorithms.batch_noise import batch_noise
from spectra.algorithms.block_size import max_vectors_in_memory
from spectra.algorithms.congruence import Congruence
from spectra.algorithms.inertia import count_below
from spectra.algorithms.lanczos import choose_reorthogonalization
from spectra.algorithms.progress import Callback, Progress
from spectra.algorithms.slq import largest_eigenpairs, slq
from spectra.algorithms.topk import Eigenpairs, default_basis_size
from spectra.backend import ranks
from spectra.backend.errors import InputError, NonFiniteError
from spectra.backend.vectors import norm
from spectra.estimates.counts import CountBelow
from spectra.estimates.density import SpectralDensity
from spectra.estimates.estimate import Estimate
from spectra.estimates.quantities import summarize
from spectra.operators.base import HasLoss, LinearOperator
from spectra.operators.blocks import Blocks, blocks_of
from spectra.operators.hessian.batches import as_batches, contents_of
from spectra.operators.hessian.checks import hessian_mode
from spectra.operators.hessian.isolation import MODULE_TABLES, unwrap
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.parameters import ParameterSpace, Selection
from spectra.operators.hessian.sharded_weights import is_sharded
from spectra.runs.carried import Carried
from spectra.runs.checked import Checked, check, take_over
from spectra.runs.failure import Failure, give_memory_back
from spectra.runs.folder import FolderError, Run
from spectra.runs.jsonlines import plain
from spectra.runs.kept import model_kept, randomness_kept, without_optimizer_steps
from spectra.runs.object_state import held, kept, modules_in
from spectra.runs.provenance import device_name, fingerprint, fingerprint_of_weights, versions
from spectra.runs.record import SpectrumRecord
from spectra.runs.scalars import PREFIX, scalars
from spectra.runs.schedule import Overhead, Schedule
from spectra.runs.settings import DEFLATED, MeasurementSettings
from spectra.runs.signals import HISTORY, Signal, in_words
from spectra.runs.unsaved import UnsavedRun

SYMMETRIC = 1e-3  # a symmetry gap above this is noted in the record
START, END = "start", "end"
STRAIGHT_THROUGH = "quantized layers are measured by their straight-through derivative, the mode 'ste'"
OTHER_SCHEDULE = "measured by another schedule than the run began with ({}): {}"
BATCHES_CHANGED = (
    "the batches hold other values than when the probe was made, as a buffer does that the training fills again: give "
    "the probe copies of its own (tensor.clone())"
)
OTHER_PARAMETERS = "measured over {} parameters, after {} at training step {}: what is trained has changed"
OTHER_TRAINING = (
    "the record of training step {} in this folder was measured at other weights: earlier records may be of another "
    "training"
)
ON_SIGNAL = "measured on a signal: {}"
SILENT_STEPS = 1000  # training steps after which a signal that was told nothing is worth a warning
OCCASIONS = ("", START, END)  # labels that say when, not of which weights: a training step has one such spectrum

OperatorBuilder = Callable[..., LinearOperator]

NO_CHANGE_OF_VARIABLES = (
    "the negative share of a sharded model is measured without a change of variables, whose factors multiply whole "
    "matrices: its interval is wider than on one device"
)


class SpectrumProbe:
    """Measure the Hessian spectrum of a model every so many training steps.

        with SpectrumProbe(model, batches, every=200, out="runs/a") as probe:
            for i, batch in enumerate(loader):
                ...                       # forward, backward, optimizer
                probe.step(i)

    The loss is taken over the same batches, with the same probe vectors, at every checkpoint, so that differences
    between checkpoints are paired. Weights, gradients, buffers, modes and random states are left bit for bit as they
    were: training with the probe ends with the same weights as training without it.

    **When.** `every`, `at`, `when` and `max_overhead` say when to measure, see `spectra.Schedule`. Where `step` is not
    called at a training step that is due, the next call measures. The first call of `step` measures, whatever its
    training step, and so does `close`, or the end of the `with` block, unless the last
    training step was measured. Without `close` the last spectrum is that of the last training step that was due.

    **A failure ends no training.** A measurement that fails, for NaN in the weights, for want of memory, on a full
    disk, leaves a record with the status "failed", the reason and a remedy, and one warning for each reason. With
    `strict` it raises. What is a mistake in how the probe was made is refused when it is made.

    **A run goes on.** Where `out` holds a run with the same settings, on the same batches, of a model of the same
    class and size, records are added to it, and a training step that it holds is not measured again.

    Args:
        model: The model that is trained.
        batches: What the loss is taken over: a list of batches as the model takes them, see `spectra.Objective`.
        every: Training steps between two measurements, or a fraction of the training, below 1. None: 200, unless
            another argument says when.
        at: Training steps, or fractions of the training, that are measured.
        when: A signal such as `spectra.LossPlateau()`, which is asked after every training step.
        max_overhead: The largest share of the wall time that measurements may take, see `spectra.Schedule`.
        schedule: All four of these as one value, in the place of them.
        total_steps: The training steps in all; needed where fractions of the training are given.
        log: Called as log({name: number}, step) after a measurement, with names such as "spectra/rms",
            "spectra/rms_low" and "spectra/rms_high", and the mode in them where several are measured. Of an unresolved
            quantity the ends of its interval alone are logged. Random numbers that it draws are put back; what it
            raises is a warning.
        log_prefix: What these names begin with, for trainings with several probes.
        out: A run folder to make, or to go on with (`spectra.Run`). None: records are kept in memory.
        modes: Which Hessians to measure, {name: builder}. A builder is called as builder(model, batches, params=,
            loss=, microbatch=), with engine=, precision=, spread= and training= where they are set, and returns an
            operator that has a loss: a HessianOperator, or a MeanOperator of them. None: {"full": HessianOperator}, or
            {"ste": HessianOperator} for a quantized model, whose straight-through derivative is measured, which the
            records then say.
        params: Which parameters, see `spectra.ParameterSpace`. None: all that are trained.
        blocks: Diagonal blocks to measure beside the whole, from the same graphs: "layers", globs, module types or a
            mapping, see `spectra.blocks_of`. Each leaves a record whose mode ends in the name of the block, as in
            "full: model.layers.0".
        loss: (outputs, targets) -> scalar, see `spectra.Objective`. None: the model's own loss.
        settings: How to measure. None: the defaults of `MeasurementSettings`.
        extras: Called with the model before a measurement; returns numbers to store beside the spectrum, by name.
            What it changes in the model, and the random numbers it draws, are put back.
        config: Facts for the run's config.json. They take the place of the probe's own entries of the same name, and
            have to be the same where a run goes on, but for the entries "presentation", "facts" and
                "schedule".
        progress: Called as progress(products done, products in all) during a measurement.
        strict: Whether a measurement that fails raises its error.
        training: Whether to measure in training mode. By default the model is measured in evaluation mode.
        **options: Fields of `MeasurementSettings` (probes, steps, seed, deflate, ...) that differ from `settings`.

    Attributes:
        records: The records so far, with those that the folder held.
        notes: What every later record is to say of how it was measured.
        run: The run folder; None without `out`, and on all ranks of torch.distributed but the first. With
            spread="probes" or "batches", and for a sharded model, all ranks have to make the same calls.

    Raises:
        InputError: If a setting is out of its range, the batches or a mode cannot be used, or `out` holds a run with
            other settings, is written by another process, or cannot be written.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Any,
        *,
        every: int | float | None = None,
        at: Iterable[int | float] = (),
        when: Signal | None = None,
        max_overhead: float | None = None,
        schedule: Schedule | None = None,
        total_steps: int | None = None,
        log: Callable[[dict[str, float], int], Any] | None = None,
        log_prefix: str = PREFIX,
        out: str | os.PathLike[str] | None = None,
        modes: Mapping[str, OperatorBuilder] | None = None,
        params: Selection = None,
        blocks: Blocks | None = None,
        loss: Callable[..., torch.Tensor] | None = None,
        settings: MeasurementSettings | None = None,
        extras: Callable[[nn.Module], Mapping[str, float]] | None = None,
        config: Mapping[str, Any] | None = None,
        progress: Callable[[int, int], Any] | None = None,
        strict: bool = False,
        training: bool = False,
        **options: Any,
    ):
        if not isinstance(model, nn.Module):
            raise InputError(f"the model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(settings, MeasurementSettings | None):
            raise InputError(f"settings must be MeasurementSettings, got {type(settings).__name__}")
        self.settings = (settings or MeasurementSettings()).changed(**options)
        ranks.check_spread(self.settings.spread)
        # whether all ranks make one measurement together, and one of them writes it
        self._shared = self.settings.spread != "none" or is_sharded(unwrap(model))
        self.schedule = Schedule.of(schedule, every=every, at=at, when=when, max_overhead=max_overhead)
        self.total_steps = _check_length(total_steps, self.schedule)
        if log is not None and not callable(log):
            raise InputError(f"log must be a function (scalars, step), got {type(log).__name__}")
        if not isinstance(log_prefix, str) or not log_prefix.strip("/"):
            raise InputError(f'log_prefix must be a name such as "{PREFIX}", got {log_prefix!r}')
        self.model, self.strict, self.training = model, strict, training
        self.log, self.log_prefix = log, log_prefix.strip("/")
        own = hessian_mode(unwrap(model))
        self.modes = _check_modes({own: HessianOperator} if modes is None else modes, training=training)
        self.notes = [STRAIGHT_THROUGH] if modes is None and own == "ste" else []
        self.extras, self.progress = extras, progress
        params = _check_params(model, params)
        self._operator_options = {"params": params, "loss": loss, **self.settings.operator_options()}
        if training:
            self._operator_options["training"] = True
        if isinstance(blocks, Iterable) and not isinstance(blocks, str | Mapping):
            blocks = list(blocks)
        self.blocks = blocks
        self._block_names: dict[str, list[str]] = {}  # by mode
        self._operator: LinearOperator | None = None  # of the mode that is measured, for the whole and its blocks
        with self._undisturbed():
            if is_sharded(unwrap(model)):
                if self.settings.batch_groups:
                    raise InputError("batch_groups is not supported for a sharded model: leave it out")
                self.batches = ranks.together(lambda: _read(batches), next(model.parameters()).device)
            else:
                self.batches = _read(batches)
            self._try_modes()
            contents = (content for batch in self.batches for content in contents_of(batch))
            self._tensors = [content for content in contents if isinstance(content, torch.Tensor)]
            self._values = fingerprint(self._tensors)
        self._checked: dict[str, Checked] = {}  # by mode
        self._outliers: dict[str, torch.Tensor] = {}  # by mode, the last checkpoint's deflated vectors
        self._congruences: dict[str, Congruence] = {}  # by mode, the last checkpoint's change of variables
        self._measured_over: dict[
            str, tuple[int, tuple[str, ...], int]
        ] = {}  # by mode: how many parameters, which, when
        self._warned: set[str] = set()
        self._last_step: int | None = None  # that `step` was called with
        self._measured_steps: set[int] = set()
        plan = {"schedule": self.schedule.to_config()}
        facts = {**self._facts(params), **plan, **self.settings.to_config(), **(config or {})}
        self.run: Run | None = None
        self._earlier: list[SpectrumRecord] = []  # what the folder held, and is not measured again
        self._foreign: set[tuple[str, int]] = (
            set()
        )  # (mode, training step) of those that were measured at other weights
        if out is not None:
            self._open(out, facts)
        self._history: deque[dict[str, float]] = deque(maxlen=HISTORY)  # what the training reported since a measurement
        self._silent_steps = 0  # at which the signal was not told what it needs; -1 once it was
        self._why: list[str] = []  # a note on why the training step is measured that is being measured
        self._overhead = Overhead(self.schedule.max_overhead, expected=_seconds_of_last(self._earlier))
        self._memory = UnsavedRun(facts)
        self.records: list[SpectrumRecord] = [] if self.run is None else list(self._earlier)

    # -- the life of a probe

    def step(self, i: int, **numbers: Any) -> list[SpectrumRecord]:
        """Tell the probe that training step i is done; to be called once a training step, in any loop.

        It measures at the first call, if nothing was recorded yet, and where the schedule says so. A training step is
        measured once: i counts the steps of the whole training, and does not start again with an epoch.

        Args:
            i: The training step.
            **numbers: What a signal (`when`) decides by, such as loss= and gradient_norm=. A tensor is read only where
                there is a signal.

        Returns:
            The new records, one for each mode; none if it is not time.
        """
        i = int(i)
        before, self._last_step = self._last_step, i
        if before is not None and i < before:
            self._warn(f"training step {i} comes after {before}: count the steps of the whole training")
        self._overhead.start()
        self.report(i, **numbers)
        first = not self._measured_steps and not any(record.is_measured for record in self._earlier)
        if i in self._measured_steps or not (first or self._is_due(i, since=before)):
            return []
        new = self._measure(i, START if first else "")[1]
        self._why = []
        return new

    def report(self, step: int, **numbers: Any) -> None:
        """Tell the signal (`when`) what the training knows of a training step.

        Args:
            step: The training step.
            **numbers: Numbers by name, such as loss= and gradient_norm=.
        """
        if self.schedule.when is None or not numbers:
            return
        try:
            self._history.append({"step": step, **{name: float(value) for name, value in numbers.items()}})
        except (TypeError, ValueError, RuntimeError) as error:
            if self.strict:
                raise
            self._warn(f"a number of training step {step} cannot be read: {Failure.of(error)}")

    def close(self, last_step: int | None = None) -> None:
        """Measure the end, if there is one that was not measured, and let others write.

        Args:
            last_step: The last training step. None: the one that `step` was called with last, if it was called.
        """
        if last_step is not None:
            self._last_step = last_step
        try:
            if self._last_step is not None and self._silent_steps > 0:
                self._warn_of_silence()
            if self._last_step is not None and self._last_step not in self._measured_steps:
                self._measure(self._last_step, END)
        finally:
            if self.run is not None:
                self.run.close()

    def __enter__(self) -> SpectrumProbe:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: types.TracebackType | None) -> None:
        if kind is not None:  # the training broke off: this is not its end
            self._last_step = None
        self.close()

    def measure(self, step: int, label: str = "") -> list[SpectrumRecord]:
        """Measure now, and append the records to the run.

        A mode that the folder held at this training step when the probe was made is not measured again, unless `label`
        names other weights: another label than "start" or "end" that the folder does not hold.

        Args:
            step: The training step that the records name.
            label: A name for the occasion, such as "start".

        Returns:
            The records, one for each mode: new ones, and those that the folder held.

        Raises:
            InputError: With `strict`, if the operator refuses the model or the batches.
            NonFiniteError: With `strict`, if a loss, a gradient or a Hessian-vector product holds NaN or infinity.
        """
        return self._measure(step, label)[0]

    def density(self, record: SpectrumRecord) -> SpectralDensity:
        """The spectral density of a record.

        Args:
            record: One of `records`.

        Returns:
            The density that its numbers were read from.

        Raises:
            InputError: If the measurement failed, or its file cannot be read.
        """
        return self.as_run().density(record)

    def as_run(self) -> Run:
        """The run with the records: that of the folder, or one in memory. Functions of `spectra.plots` take a probe."""
        return self._memory if self.run is None else self.run

    def save_state(self, path: str | os.PathLike[str]) -> None:
        """Write what the next measurement takes over from the last: checks, outliers, the change of variables.

        A checkpoint of a training keeps it, so that a training that goes on from there measures the same bits.

        Args:
            path: A safetensors file to write.
        """
        checks = {mode: (found.figures, found.notes) for mode, found in self._checked.items()}
        Carried(checks, self._outliers, self._congruences).save(path)

    def load_state(self, path: str | os.PathLike[str]) -> None:
        """Take over what a probe of the same training has written.

        Args:
            path: A file of `save_state`.

        Raises:
            InputError: If it cannot be read.
        """
        carried = Carried.load(path)
        checks = {mode: taken for mode, taken in carried.checks.items() if mode in self.modes}
        self._checked = {mode: Checked.taken_from(self.model, *taken) for mode, taken in checks.items()}
        self._outliers, self._congruences = carried.outliers, carried.congruences

    # -- measuring

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Put back random states, and all that the loss function holds, such as a discriminator or a list of losses.

        Its modules run in the mode that the model runs in. An optimizer step is refused.
        """
        loss, own = self._operator_options["loss"], set(self.model.modules())
        others = [module for module in modules_in(loss) if not own & set(module.modules())]
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))  # tensors made in it have no graph
            stack.enter_context(randomness_kept())
            stack.enter_context(without_optimizer_steps())
            stack.enter_context(kept(loss, *_code_and_state(self.model)))
            for module in others:
                stack.enter_context(model_kept(module))
                stack.enter_context(kept(*(vars(part) for part in module.modules())))
            for part in (part for module in others for part in module.modules()):
                part.training = part.training and self.training
            yield

    def _measure(self, step: int, label: str) -> tuple[list[SpectrumRecord], list[SpectrumRecord]]:
        """Measure the modes that the folder did not hold. Returns the record of every mode, and those that are new."""
        started = self._overhead.start()
        records, new = self._measure_modes(step, label)
        if new:
            seconds = self._overhead.start() - started
            self._overhead.add(seconds, as_expected=all(record.is_measured for record in new))
        self._history.clear()
        self._log(records, step)
        return records, new

    def _measure_modes(self, step: int, label: str) -> tuple[list[SpectrumRecord], list[SpectrumRecord]]:
        """What `_measure` returns."""
        self._measured_steps.add(step)
        targets = self._targets()
        held = {name: self._held(name, step, label) for name in targets}
        modes = [targets[name][0] for name, record in held.items() if record is None]  # of what is still to measure
        records, new = [], []
        with self._undisturbed():
            extras: dict[str, float] | Failure | None = None
            for name, record in held.items():
                if record is None:
                    mode = modes.pop(0)
                    extras = self._extras() if extras is None else extras
                    record = self._record(name, step, label, extras, last_of_mode=mode not in modes)
                    new.append(record)
                records.append(record)
        return records, new

    def _targets(self) -> dict[str, tuple[str, str]]:
        """What is measured, {name in records: (mode, block)}; the block is "" for the whole."""
        found: dict[str, tuple[str, str]] = {}
        for mode in self.modes:
            found[mode] = (mode, "")
            found |= {f"{mode}: {block}": (mode, block) for block in self._block_names.get(mode, ())}
        return found

    def _close_operator(self) -> None:
        """Free the graphs of the operator of the mode that is measured."""
        op, self._operator = self._operator, None
        if isinstance(op, HasLoss):
            op.close()

    def _is_due(self, step: int, *, since: int | None) -> bool:
        """Whether the schedule says to measure, the same on all ranks that share a measurement.

        It does where it names the training step, or one that was passed over since the last that the probe was told of.
        """
        schedule, self._why = self.schedule, []
        passed = range(step if since is None else min(since + 1, step), step + 1)
        due = any(schedule.names(each, self.total_steps) for each in passed)
        if schedule.when is not None and self._signalled(step) and not due:
            due, self._why = True, [ON_SIGNAL.format(in_words(schedule.when))]
        shared = self._shared
        if not due and not (shared and schedule.when is not None):
            return False
        due = due and self._overhead.has_room()
        if shared and (schedule.when is not None or schedule.max_overhead is not None):
            due = ranks.all_gather(due)[0]  # clocks and losses differ between ranks
        return due

    def _signalled(self, step: int) -> bool:
        """What the signal says. One that fails says no, with a warning."""
        needed = getattr(self.schedule.when, "needs", None)
        if needed is None or any(needed in numbers for numbers in self._history):
            self._silent_steps = -1  # it was heard once
        self._silent_steps += self._silent_steps >= 0
        if self._silent_steps == SILENT_STEPS:
            self._warn_of_silence()
        try:
            with randomness_kept():
                return bool(self.schedule.when(tuple(self._history)))  # type: ignore[misc]
        except Exception as error:
            if self.strict:
                raise
            self._warn(f"the signal failed at training step {step}: {Failure.of(error, where='when=')}")
            return False

    def _warn_of_silence(self) -> None:
        needed = getattr(self.schedule.when, "needs", "")
        self._warn(
            f"{in_words(self.schedule.when)} needs the {needed.replace('_', ' ')}, which was not reported: call "
            f"probe.step(i, {needed}=...)"
        )

    def _log(self, records: list[SpectrumRecord], step: int) -> None:
        """Hand the numbers of the records to `log`. What it raises is a warning, unless `strict`."""
        if self.log is None or (self._shared and ranks.rank() != 0):
            return
        several, values = len(self.modes) > 1, {}
        for record in records:
            if (record.mode, record.step) in self._foreign:  # those numbers are not of this training
                continue
            named = several or bool(record.block)
            values |= scalars(record, prefix=self.log_prefix, several_modes=named, occasions=OCCASIONS)
        if not values:
            return
        try:
            with randomness_kept():
                self.log(values, step)
        except Exception as error:
            if self.strict:
                raise
            self._warn(f"the spectrum of training step {step} was not logged: {Failure.of(error, where='log=')}")

    def _held(self, mode: str, step: int, label: str) -> SpectrumRecord | None:
        """The record that the folder held of a mode at a training step; None if it is to be measured."""
        for record in self._earlier:
            same = record.label == label or label in OCCASIONS
            if record.is_measured and (record.mode, record.step) == (mode, step) and same:
                now = fingerprint_of_weights(self.model) if record.weights else ""
                if now not in ("", record.weights):
                    self._note_other_weights(record)
                return record
        return None

    def _note_other_weights(self, record: SpectrumRecord) -> None:
        """Say, now and in later records, that the folder holds a record that was measured at other weights."""
        self._foreign.add((record.mode, record.step))
        if not any(note.startswith(OTHER_TRAINING[:20]) for note in self.notes):
            self.notes.append(OTHER_TRAINING.format(record.step))
        if self.run is not None:
            self._warn(
                f"{self.run.folder} keeps its record of training step {record.step}, which was measured at other "
                "weights: choose another out= for another training"
            )

    def _extras(self) -> dict[str, float] | Failure:
        """The numbers that are stored beside a spectrum, or why there are none."""
        if self.extras is None:
            return {}
        try:
            with model_kept(self.model):
                return {str(name): float(value) for name, value in self.extras(self.model).items()}
        except Exception as error:
            if self.strict:
                raise
            return Failure.of(error, where="extras=")

    def _record(
        self, mode: str, step: int, label: str, extras: dict[str, float] | Failure, *, last_of_mode: bool
    ) -> SpectrumRecord:
        """Measure a mode or a block of it and append its record; a failure is recorded too, unless `strict`.

        The blocks of a mode share an operator, which is closed after the last of them.
        """
        started = time.perf_counter()
        if isinstance(extras, Failure):
            return self._failed(mode, step, label, started, extras)
        try:
            record, density = self._measure_mode(mode, step, label, extras, started, last_of_mode=last_of_mode)
            record = self.as_run().append(record, density)
        except BaseException as error:
            with contextlib.suppress(Exception):  # the first error is the one to report
                self._close_operator()
            if self.strict or not isinstance(error, Exception):
                raise
            failure = Failure.of(error)
        else:
            self.records.append(record)
            return record
        give_memory_back()  # now that the error is gone, with the tensors that its traceback held
        return self._failed(mode, step, label, started, failure)

    def _failed(self, mode: str, step: int, label: str, started: float, failure: Failure) -> SpectrumRecord:
        """Append the record of a failed measurement to the run, if that can be written, and warn."""
        seconds = time.perf_counter() - started
        record = failure.to_record(self.settings, mode=mode, step=step, label=label, seconds=seconds)
        with contextlib.suppress(Exception):  # the disk is full, or the folder has another writer now
            record = self.as_run().append(record)
        self.records.append(record)
        self._warn(f"no spectrum at training step {step} ({mode}): {failure}", failure.reason)
        return record

    def _warn(self, message: str, reason: str | None = None) -> None:
        """Warn once for each reason, whatever numbers are in it. Where warnings are errors, nothing is raised."""
        reason = re.sub(r"[-+.\d]*\d", "0", reason or message)
        if reason not in self._warned:
            self._warned.add(reason)
            with contextlib.suppress(Warning):
                warnings.warn(message, stacklevel=2)

    def _measure_mode(
        self, name: str, step: int, label: str, extras: dict[str, float], started: float, *, last_of_mode: bool
    ) -> tuple[SpectrumRecord, SpectralDensity]:
        """The spectrum of one mode, or of a block of it: its record and density."""
        mode, block = self._targets()[name]
        weights = fingerprint_of_weights(self.model)
        if self._operator is None:
            if fingerprint(self._tensors) != self._values:
                raise InputError(BATCHES_CHANGED)
            self._operator = self._build(mode, self.batches)
        op = self._operator
        if not isinstance(op, HasLoss):
            raise _no_loss(mode, op)
        if self.blocks is not None and mode not in self._block_names:  # the operator could not be built before
            self._block_names[mode] = list(blocks_of(op, self.blocks))  # type: ignore[arg-type]
        checked = self._check(op, mode)
        loss, gradient = op.loss(), op.gradient()
        target: LinearOperator = op  # type: ignore[assignment]
        self._note_other_parameters(mode, op, step)
        if block:
            target = blocks_of(op, self.blocks)[block]  # type: ignore[arg-type]
            gradient = target.block.take(gradient)  # type: ignore[attr-defined]
        policy = choose_reorthogonalization(target, self.settings.steps, self.settings.reorthogonalize)
        with torch.no_grad():
            density = self._density(target, name, policy)
        if last_of_mode:
            self._close_operator()
        estimates = summarize(density, self.settings.near_zero_tol)
        noise = self._batch_noise(mode, estimates) if self.settings.batch_groups and not block else {}
        record = SpectrumRecord(
            step=step,
            mode=name,
            block=block,
            loss=loss,
            gradient_norm=norm(gradient, over=target.shards),
            dimension=target.shape[0],
            estimates=estimates,
            batch_noise=noise,
            reorthogonalize="exact" if density.exact else policy,
            products=target.products,
            seconds=time.perf_counter() - started,
            label=label,
            extras={**extras, "zero_share": density.zero_share()},
            checks=checked.figures,
            versions=versions(),
            dtype=str(op.dtype).removeprefix("torch."),
            device=device_name(op.device),
            engine=op.engine_used,
            notes=[*self.notes, *self._why, *_notes(op, checked)],
            weights=weights,
            count={} if density.count is None else density.count.cost(),
            **self.settings.to_record(),
        )
        return record, density

    def _note_other_parameters(self, mode: str, op: LinearOperator, step: int) -> None:
        """Say in later records that other parameters are trained than at the measurement before."""
        before = self._measured_over.get(mode)
        names = tuple(getattr(getattr(op, "space", None), "names", ()))
        if before is not None and before[:2] != (op.shape[0], names):
            self.notes = [note for note in self.notes if not note.startswith(OTHER_PARAMETERS[:16])]
            self.notes.append(OTHER_PARAMETERS.format(op.shape[0], before[0], before[2]))
        self._measured_over[mode] = (op.shape[0], names, step)

    def _build(self, mode: str, batches: list[Any]) -> LinearOperator:
        """The operator of a mode on some batches."""
        return self.modes[mode](self.model, batches, **self._operator_options)

    def _check(self, op: HasLoss, mode: str) -> Checked:
        """What the checks found; made once a run for each mode, as they cost a few products, and for new parameters."""
        known = self._checked.get(mode)
        if known is None or not known.holds_for(self.model) or not take_over(op, known):
            known = self._checked[mode] = check(op, self.model)
        return known

    def _density(self, op: LinearOperator, mode: str, policy: str) -> SpectralDensity:
        """The spectral density, by stochastic Lanczos quadrature after deflation, with the count below zero."""
        count, recurrences = Progress(self.progress, 0), self.settings.probes * self.settings.steps
        deflate = self._deflated(op, mode, count.part(recurrences + self.settings.count_products))
        density = slq(
            op,
            probes=self.settings.probes,
            steps=self.settings.steps,
            seed=self.settings.seed,
            deflate=deflate,
            reorthogonalize=policy,
            spread="probes" if self.settings.spread == "probes" else "none",
            progress=count.part(self.settings.count_products),
        )
        density = density.with_origin(replace(density.origin, mode=density.origin.mode or mode))
        return density if density.exact else density.with_count(self._count_below_zero(op, mode, count.part(0)))

    def _count_below_zero(self, op: LinearOperator, mode: str, progress: Callback) -> CountBelow | None:
        """The count after a change of variables, which is searched from that of the last checkpoint."""
        start = self._congruences.get(mode)
        notes = getattr(op, "notes", None)
        if op.shards is not None and notes is not None and NO_CHANGE_OF_VARIABLES not in notes:
            notes.append(NO_CHANGE_OF_VARIABLES)
        found = count_below(
            op,
            products=self.settings.count_products,
            seed=self.settings.seed,
            start=None if start is None else start.to(op.device),
            progress=progress,
        )
        if found is None:
            return None
        count, congruence = found
        if congruence is not None:
            self._congruences[mode] = congruence.to(torch.device("cpu"))  # as the outliers
        return count

    def _deflated(self, op: LinearOperator, mode: str, progress: Callback) -> Eigenpairs | int:
        """The eigenpairs to deflate, searched from those of the last checkpoint; 0 for none."""
        wanted = self.settings.deflate
        if wanted is None:
            wanted = DEFLATED if 2 * default_basis_size(DEFLATED) <= max_vectors_in_memory(op) else 0
        if not wanted or wanted + self.settings.steps >= op.shape[0]:
            return 0
        start = self._outliers.get(mode)
        if start is not None:  # parameters that were frozen, added or pruned meanwhile have other eigenvectors
            start = start.to(op.device) if start.shape[0] == op.entries else None
        pairs = largest_eigenpairs(op, wanted, seed=self.settings.seed, start=start, progress=progress)
        self._outliers[mode] = pairs.vectors.cpu()  # between two checkpoints the device belongs to the training
        return pairs

    def _batch_noise(self, mode: str, full: dict[str, Estimate]) -> dict[str, dict[str, float]]:
        """How much of each interval is due to the probe vectors and how much to the batches, as the record keeps it."""
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

    # -- making a probe

    def _try_modes(self) -> None:
        """Build the operator of each mode once, so that a mode that cannot be used is refused before the training."""
        for mode in self.modes:
            try:
                op = self._build(mode, self.batches)
            except NonFiniteError:
                continue  # weights may be mended until the first measurement
            except InputError:
                raise
            except Exception:  # memory, say: the measurement will tell
                continue
            if not isinstance(op, HasLoss):
                raise _no_loss(mode, op)
            if self.blocks is not None:
                self._block_names[mode] = list(blocks_of(op, self.blocks))  # type: ignore[arg-type]
            op.close()

    def _open(self, out: str | os.PathLike[str], config: Mapping[str, Any]) -> None:
        """Make or open the run folder, on the first rank. Where ranks share a measurement, all know what it holds."""
        error = ""
        if ranks.rank() == 0:
            try:
                self.run = Run.open_or_create(out, config)
                self._earlier = self.run.records
            except InputError as refusal:
                error = str(refusal)
            except OSError as refusal:
                error = f"{out} cannot be written ({refusal.strerror or refusal}): choose another out="
        if self._shared:
            error, self._earlier = ranks.all_gather((error, self._earlier))[0]
        if error:
            raise FolderError(error)
        before = None if self.run is None else self.run.config.get("schedule")
        if before is not None and before != plain(config["schedule"]):
            self.notes.append(OTHER_SCHEDULE.format(_in_words(before), _in_words(config["schedule"])))

    def _facts(self, params: Selection) -> dict[str, Any]:
        """What config.json says of model and data."""
        model = unwrap(self.model)
        known = [p for p in model.parameters() if not isinstance(p, UninitializedParameter)]
        return {
            "model": type(model).__name__,
            "parameters": sum(p.numel() for p in known),
            "params": _params_in_words(model, params),
            "modes": list(self.modes),
            "training": self.training,
            "batches": fingerprint(self.batches),
            **({} if self.blocks is None else {"blocks": self._block_names}),
        }


def _read(batches: Any) -> list[Any]:
    """The batches. What a loader, its data set and its samplers hold is put back.

    Raises InputError for a loader of data that can be read only once.
    """
    if not isinstance(batches, DataLoader):
        return as_batches(batches)
    if any(isinstance(item, Iterator) for item in held(batches.dataset)):
        raise InputError(
            "the loader's data hold an iterator that can be read only once, and the training would miss what is "
            "measured: pass a list of batches"
        )
    with kept(batches):
        return as_batches(batches)


def _code_and_state(model: nn.Module) -> list[Any]:
    """What a walk through the model starts from: the classes of its modules, and their attributes but for tensors."""
    tables = [vars(module) for module in model.modules()]
    return [*map(type, model.modules()), *(v for table in tables for k, v in table.items() if k not in MODULE_TABLES)]


def _notes(op: HasLoss, checked: Checked) -> list[str]:
    """The operator's notes, those of the checks, and one of our own if it is not symmetric."""
    gap = checked.figures.get("symmetry_gap", 0.0)
    notes = list(dict.fromkeys([*checked.notes, *op.notes]))
    if gap > SYMMETRIC:
        notes.append(f"the operator is not symmetric: u.Av and v.Au differ by {gap:.1e}")
    return notes


def _no_loss(mode: str, op: object) -> InputError:
    built = type(op).__name__
    return InputError(f"expected an operator with a loss for mode {mode!r}, got a {built}: use HessianOperator")


def _check_length(total_steps: Any, schedule: Schedule) -> int | None:
    """The length of the training. Raises InputError for what is none, and where a fraction needs one."""
    number = float(total_steps) if isinstance(total_steps, numbers.Real) and not isinstance(total_steps, bool) else 0.0
    if total_steps is not None and not (number.is_integer() and number >= 1):
        raise InputError(f"total_steps must be a number of training steps, at least 1, got {total_steps!r}")
    if total_steps is None and schedule.fractions:
        raise InputError(
            f"{schedule.fractions[0]:g} is a fraction of the training, whose length is not known: pass total_steps=, "
            "or training steps"
        )
    return None if total_steps is None else int(number)


def _seconds_of_last(records: list[SpectrumRecord]) -> float:
    """How long the last measurement of a run took, with all its modes."""
    last = [record for record in records if record.is_measured][-1:]
    return sum(record.seconds for record in records if last and record.step == last[0].step)


def _in_words(schedule: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in schedule.items())


def _check_modes(modes: Any, *, training: bool) -> dict[str, OperatorBuilder]:
    """The modes as a dictionary. Raises InputError for what is none, or takes no training= where that is asked for."""
    if not isinstance(modes, Mapping) or not modes:
        raise InputError(f"modes must be a dictionary {{name: builder}} with an entry or more, got {modes!r:.80}")
    for name, builder in modes.items():
        if not isinstance(name, str) or not callable(builder):
            raise InputError(f"modes must name functions that build an operator, got {name!r}: {builder!r:.80}")
        if training and not _takes_training(builder):
            raise InputError(
                f"training=True needs a builder that takes training=, which that of mode {name!r} does not"
            )
    return dict(modes)


def _takes_training(builder: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(builder).parameters
    except (TypeError, ValueError):  # not known: the call will tell
        return True
    return "training" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def _check_params(model: nn.Module, params: Selection) -> Selection:
    """The selection, read once if it is an iterator. Raises InputError where it matches nothing."""
    if params is None:
        return None
    if isinstance(params, Iterable) and not isinstance(params, str | re.Pattern | type):
        params = list(params)
    if not any(isinstance(parameter, UninitializedParameter) for parameter in model.parameters()):
        ParameterSpace(unwrap(model), params)
    return params


def _params_in_words(model: nn.Module, params: Selection) -> Any:
    """How config.json names a selection of parameters, so that two can be compared."""
    if params is None or isinstance(params, str):
        return params
    if isinstance(params, re.Pattern):
        return params.pattern
    if isinstance(params, type):
        return params.__name__
    if isinstance(params, list):
        return [_params_in_words(model, item) for item in params]
    names = [name for name, parameter in unwrap(model).named_parameters() if params(name, parameter)]  # type: ignore[operator]
    return f"{len(names)} chosen by a function ({hashlib.sha256(' '.join(names).encode()).hexdigest()[:8]})"
