"""Spectra along a training with the Hugging Face Trainer."""

from __future__ import annotations

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectra.backend import ranks
from spectra.integrations.attached import NO_SPECTRUM, check_options, ending_no_training, recording_why_unmade, warn
from spectra.integrations.trainer_batches import first_batches
from spectra.integrations.trainer_log import TrainerLog
from spectra.integrations.trainer_loss import (
    NOT_FOUND,
    calling_trainer,
    loss_of,
    notes_of_accumulation,
    notes_of_precision,
)
from spectra.operators.hessian.isolation import unwrap
from spectra.operators.hessian.sharded_weights import is_sharded
from spectra.runs.kept import randomness_kept
from spectra.runs.probe import START, SpectrumProbe
from spectra.runs.provenance import fingerprint_of_weights
from spectra.runs.schedule import Schedule
from spectra.runs.signals import Signal

BEST = "load_best_model_at_end: measured at the weights of {}, not at those of training step {}"
GOES_ON = "this training goes on with the run in {}: its step 0 is training step {} there"


class SpectrumCallback(TrainerCallback):
    """Measure the spectrum at the start of a training, along it, and at the end.

        trainer.add_callback(SpectrumCallback(every=200))

    What is measured is the loss that the Trainer trains: its `compute_loss`, overridden or not, with label smoothing or
    `compute_loss_func`, on batches that its own loader draws and its own collator makes. The training ends with the
    same weights, bit for bit, as without the callback.

    Where FSDP2 shards the model, all ranks measure it together, each with the batches of its own loader.

    **Logs.** The numbers of each spectrum go through `Trainer.log`: `trainer.state.log_history` holds them, and every
    reporting callback gets them at the training step's number, "spectra/rms" with "spectra/rms_low" and
    "spectra/rms_high" and so on (`SpectrumProbe`, log). An overridden `log` is passed over, as it may empty counters of
    the training. So that the last spectrum is logged before they close, transformers' reporting callbacks are moved
    behind this one.

    A training that goes on adds to its run. From a checkpoint its steps count on; so they do where a second `train()`
    starts at step 0 with the weights that the run has reached, which a warning and the records say. What cannot be
    measured ends no training: there is one warning, and a record that says why.

    Args:
        every: Optimizer steps between two measurements, or a fraction of the training, below 1. None: 200, unless
            another argument says when.
        at: Optimizer steps, or fractions of the training, that are measured.
        when: A signal such as `spectra.LossPlateau()`. It gets what the Trainer logs of its training, an entry for each
            log: "loss", and "grad_norm" as "gradient_norm".
        max_overhead: The largest share of the wall time that measurements may take, see `spectra.Schedule`.
        schedule: All four of these as one value, in the place of them.
        batches: What the loss is taken over, see `SpectrumProbe`. None: the first batches of the training data.
        batch_count: How many batches are taken from the training data: those that the Trainer's loader yields first, in
            the order of its sampler or batch sampler. What is random in them is drawn with the Trainer's seed.
        out: The run folder. None: "spectra" in the Trainer's output folder, or in that of a trial of a search.
        trainer: The Trainer. None: the one that calls.
        log: Called as log(scalars, step) in the place of the Trainer's own log.
        **options: Other options of `SpectrumProbe`, such as probes, steps, params, modes and strict. With `loss` that
            loss is measured, not the Trainer's.

    Attributes:
        probe: The `SpectrumProbe`, with its `records`; None before the training starts, and where nothing can be
            measured.

    Raises:
        InputError: If `batch_count` is below 1, a part of the schedule is out of its range, or there is no such option.
            With `strict`, when the training starts, whatever `SpectrumProbe` raises.
    """

    def __init__(
        self,
        every: int | float | None = None,
        *,
        at: Iterable[int | float] = (),
        when: Signal | None = None,
        max_overhead: float | None = None,
        schedule: Schedule | None = None,
        batches: Any = None,
        batch_count: int = 1,
        out: str | os.PathLike[str] | None = None,
        trainer: Trainer | None = None,
        log: Callable[[dict[str, float], int], Any] | None = None,
        **options: Any,
    ):
        self.schedule = Schedule.of(schedule, every=every, at=at, when=when, max_overhead=max_overhead)
        check_options(batch_count, options)
        self.batches, self.batch_count, self.out, self.options = batches, batch_count, out, options
        self.trainer, self.log = trainer, log
        self.probe: SpectrumProbe | None = None
        self._drawn: tuple[Any, ...] = ()  # what the batches of the last training were drawn from, they and their notes
        self._model: weakref.ref[nn.Module] | None = None  # that was trained last
        self._out = ""
        self._in_training = False
        self._first = 0  # the training step of the run at which this training starts
        self._reached = 0  # the last training step of the run
        self._logger: TrainerLog | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the probe and measure the model as it is."""
        self._release()
        self._in_training = True
        trainer, model = self.trainer or calling_trainer(self), unwrap(kwargs["model"])
        first = state.is_world_process_zero
        if not first and not is_sharded(model):  # all ranks measure a sharded model together
            return
        self._logger = None if trainer is None else TrainerLog(trainer, self)
        out = str(self.out) if self.out is not None else os.path.join(_output_folder(args, trainer), "spectra")
        same = self._model is not None and self._model() is model and self._out == out
        self._first = self._reached if same and state.global_step == 0 else 0
        self._model, self._out = weakref.ref(model), out
        with self._ending_no_training(), randomness_kept():
            recording = recording_why_unmade(out, model, self._first + state.global_step, self.options)
            with recording if first else contextlib.nullcontext():
                probe = self._probe(args, trainer, model, kwargs.get("train_dataloader"), state.max_steps)
            self.probe = probe
            if state.global_step == 0:
                self._first = _first_step(probe, model, self._first)
            self._reached = self._first + state.global_step
            probe.total_steps = self._first + state.max_steps
            if self._first:
                probe.notes.append(GOES_ON.format(out, self._first))
                warn(probe.notes[-1])
            probe.measure(self._reached, START)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time; the last training step is left to `on_train_end`."""
        if not self._in_training:  # added by another callback when the training had begun
            self.on_train_begin(args, state, control, **kwargs)
        self._reached = self._first + state.global_step
        if self.probe is None:
            return
        if self._logger is not None and self.schedule.when is not None:
            for step, numbers in self._logger.new_numbers(state):
                self.probe.report(self._first + step, **numbers)
        if state.global_step < state.max_steps:
            with self._ending_no_training():
                self.probe.step(self._reached)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the trained model, unless its last training step was measured, and let others write to the run."""
        self._in_training = False
        if self.probe is None:
            return
        self._open_log()
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            best = os.path.basename(state.best_model_checkpoint)
            self.probe.notes.append(BEST.format(best, state.global_step))
        with self._ending_no_training():
            self.probe.close(self._first + state.global_step)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the spectrum of the start, now that every reporting callback is set up."""
        self._open_log()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log the spectrum of the start where this callback was added in the middle of an epoch."""
        self._open_log()

    def __getstate__(self) -> dict[str, Any]:
        """The settings: a probe, a Trainer and its data belong to their process."""
        return {**self.__dict__, "probe": None, "trainer": None, "_drawn": (), "_model": None, "_logger": None}

    def _probe(
        self, args: TrainingArguments, trainer: Trainer | None, model: nn.Module, loader: Any, total_steps: int
    ) -> SpectrumProbe:
        """The probe on the Trainer's loss and batches."""
        device = next(model.parameters()).device

        def prepare() -> tuple[list[Any], dict[str, Any], list[str]]:
            return self._prepared(args, trainer, loader)

        batches, options, notes = ranks.together(prepare, device) if is_sharded(model) else prepare()
        options = {"schedule": self.schedule, "total_steps": total_steps or None, **options}
        probe = SpectrumProbe(model, batches, out=self._out, **options)
        probe.notes += notes
        return probe

    def _prepared(
        self, args: TrainingArguments, trainer: Trainer | None, loader: Any
    ) -> tuple[list[Any], dict[str, Any], list[str]]:
        """The batches of the probe, its options, and what its records are to say of both."""
        notes, options = notes_of_precision(args), dict(self.options)
        own = options.get("loss") is None
        if own:
            options["loss"], said = (None, [NOT_FOUND]) if trainer is None else loss_of(trainer)
            notes += said
        batches = self.batches
        if batches is None:
            batches, said = self._batches(args, trainer, loader)
            notes += said
            if own and trainer is not None:
                notes += notes_of_accumulation(trainer, options["loss"], batches[0])
        options["log"] = self._logger if self.log is None else self.log
        return batches, options, notes

    def _batches(self, args: TrainingArguments, trainer: Trainer | None, loader: Any) -> tuple[list[Any], list[str]]:
        """The first batches of the training data; those of the last training where it had the same data."""
        data = (loader, None) if trainer is None else (trainer.train_dataset, trainer.data_collator)
        if not self._drawn or any(one is not other for one, other in zip(data, self._drawn, strict=False)):
            self._drawn = (*data, *first_batches(loader, self.batch_count, seed=args.seed))
        return self._drawn[2], self._drawn[3]

    def _open_log(self) -> None:
        """Log what waits to be logged."""
        if self._logger is not None:
            with self._ending_no_training("the spectrum was not logged"), randomness_kept():
                self._logger.open()

    def _release(self) -> None:
        """Let others write to the run of an earlier training, which may have ended with an error."""
        if self.probe is not None and self.probe.run is not None:
            self.probe.run.close()
        self.probe = None

    def _ending_no_training(self, what: str = NO_SPECTRUM) -> contextlib.AbstractContextManager[None]:
        """What fails is a warning, unless `strict` was asked for."""
        return ending_no_training(bool(self.options.get("strict")), what)


def _output_folder(args: TrainingArguments, trainer: Trainer | None) -> str:
    """The Trainer's output folder; in a search of hyperparameters that of the trial."""
    folder = getattr(trainer, "_get_output_dir", lambda trial: args.output_dir)
    return str(folder(getattr(trainer, "_trial", None)))


def _first_step(probe: SpectrumProbe, model: nn.Module, reached: int) -> int:
    """The training step of its run at which a training starts that counts from 0.

    That is `reached`, where this process trained the model so far, and the last one that the run holds, where the model
    has the weights that it had then. It is 0 for a training that is repeated from the weights of the start.
    """
    measured, now = [record for record in probe.records if record.is_measured], fingerprint_of_weights(model)
    if not now or any(record.weights == now for record in measured if record.step == 0):
        return 0
    last = max(measured, key=lambda record: record.step, default=None)
    return reached or (last.step if last is not None and last.weights == now else 0)
