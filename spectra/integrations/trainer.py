"""Spectra along a training with the Hugging Face Trainer."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import warnings
from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectra.backend.errors import InputError
from spectra.integrations.trainer_batches import first_batches
from spectra.integrations.trainer_loss import (
    NOT_FOUND,
    calling_trainer,
    loss_of,
    notes_of_precision,
)
from spectra.operators.hessian.checks import StraightThrough
from spectra.runs.failure import Failure
from spectra.runs.kept import randomness_kept
from spectra.runs.probe import END, START, OperatorBuilder, SpectrumProbe, default_modes
from spectra.runs.settings import MeasurementSettings

STRAIGHT_THROUGH = "quantized layers are measured by their straight-through derivative, the mode 'ste'"
BEST = "load_best_model_at_end: measured at the weights of {}, not at those of training step {}"


class SpectrumCallback(TrainerCallback):
    """Measure the spectrum at the start of a training, every so many training steps, and at the end.

        trainer.add_callback(SpectrumCallback(every=200))

    What is measured is the loss that the Trainer trains: its `compute_loss`, overridden or not, with label smoothing or
    `compute_loss_func`, on batches of the training data collated by the Trainer's own collator. The training ends with
    the same weights, bit for bit, as without the callback.

    A training that goes on, from a checkpoint or by a second `train()`, adds to its run. What cannot be measured ends
    no training: there is one warning, and a record that says why where there is a run already.

    Args:
        every: Optimizer steps between two measurements.
        batches: What the loss is taken over, see `SpectrumProbe`. None: the first batches of the training data.
        batch_count: How many batches are taken from the training data, in the data set's own order, collated as the
            Trainer does. Random collators draw with the Trainer's seed.
        out: The run folder. None: "spectra" in the Trainer's output folder.
        trainer: The Trainer. None: the one that calls.
        **options: Other options of `SpectrumProbe`, such as probes, steps, params, modes and strict. With `loss` that
            loss is measured, not the Trainer's.

    Attributes:
        probe: The `SpectrumProbe`, with its `records`; None before the training starts, and where nothing can be
            measured.

    Raises:
        InputError: If `every` or `batch_count` is below 1, or there is no such option. With `strict`, when the training
            starts, whatever `SpectrumProbe` raises.
    """

    def __init__(
        self,
        every: int = 200,
        *,
        batches: Any = None,
        batch_count: int = 1,
        out: str | os.PathLike[str] | None = None,
        trainer: Trainer | None = None,
        **options: Any,
    ):
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}")
        if batch_count < 1:
            raise InputError(f"batch_count must be at least 1 batch, got {batch_count}")
        known = inspect.signature(SpectrumProbe).parameters
        MeasurementSettings().changed(**{name: value for name, value in options.items() if name not in known})
        self.every, self.batches, self.batch_count, self.out, self.options = every, batches, batch_count, out, options
        self.trainer = trainer
        self.probe: SpectrumProbe | None = None
        self._notes: list[str] = []  # for the records; the list that the probe's builders read

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the probe and measure the model as it is."""
        self._release()
        if not state.is_world_process_zero:
            return
        trainer = self.trainer or calling_trainer(self)
        with self._ending_no_training(), randomness_kept():
            probe = self._probe(args, trainer, kwargs["model"], kwargs.get("train_dataloader"))
            self.probe = probe
            probe.measure(state.global_step, START)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time; the last training step is left to `on_train_end`."""
        if self.probe is not None and state.global_step < state.max_steps:
            with self._ending_no_training():
                self.probe.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the trained model, unless its last training step was measured, and let others write to the run."""
        if self.probe is None:
            return
        try:
            if all(record.step != state.global_step for record in self.probe.records):
                if args.load_best_model_at_end and state.best_model_checkpoint is not None:
                    best = os.path.basename(state.best_model_checkpoint)
                    self._notes.append(BEST.format(best, state.global_step))
                with self._ending_no_training():
                    self.probe.measure(state.global_step, END)
        finally:
            if self.probe.run is not None:
                self.probe.run.close()

    def __getstate__(self) -> dict[str, Any]:
        """The settings: a probe and a Trainer belong to their process."""
        return {**self.__dict__, "probe": None, "trainer": None}

    def _probe(self, args: TrainingArguments, trainer: Trainer | None, model: Any, loader: Any) -> SpectrumProbe:
        """The probe on the Trainer's loss and batches."""
        self._notes = notes_of_precision(args)
        options = dict(self.options)
        if options.get("loss") is None:
            options["loss"], said = (None, [NOT_FOUND]) if trainer is None else loss_of(trainer)
            self._notes += said
        batches = self.batches
        if batches is None:
            rows = args.per_device_train_batch_size
            batches, said = first_batches(loader, self.batch_count, rows=rows, seed=args.seed)
            self._notes += said
        modes = options.pop("modes", None)
        if modes is None:
            modes = default_modes(model)
            if any(isinstance(module, StraightThrough) for module in model.modules()):
                self._notes.append(STRAIGHT_THROUGH)
        if isinstance(modes, dict):  # what is none is refused by the probe
            modes = {name: _noted(builder, self._notes) for name, builder in modes.items()}
        out = self.out if self.out is not None else f"{args.output_dir}/spectra"
        return SpectrumProbe(model, batches, every=self.every, out=out, modes=modes, **options)

    def _release(self) -> None:
        """Let others write to the run of an earlier training, which may have ended with an error."""
        if self.probe is not None and self.probe.run is not None:
            self.probe.run.close()
        self.probe = None

    @contextlib.contextmanager
    def _ending_no_training(self) -> Iterator[None]:
        """What fails is a warning, unless `strict` was asked for."""
        try:
            yield
        except Exception as error:
            if self.options.get("strict"):
                raise
            with contextlib.suppress(Warning):  # where warnings are errors
                warnings.warn(f"no spectrum of this training: {Failure.of(error).reason}", stacklevel=3)


def _noted(builder: OperatorBuilder, notes: list[str]) -> OperatorBuilder:
    """A builder whose operators have these notes too."""
    if not callable(builder):
        return builder

    @functools.wraps(builder)
    def build(*arguments: Any, **options: Any) -> Any:
        operator = builder(*arguments, **options)
        for member in getattr(operator, "operators", [operator]):  # a mean of operators collects its members' notes
            if isinstance(getattr(member, "notes", None), list):
                member.notes.extend(note for note in notes if note not in member.notes)
        return operator

    return build
