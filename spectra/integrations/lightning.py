"""Spectra along a training with Lightning."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.backend.extras import missing
from spectra.integrations.attached import NO_SPECTRUM, check_options, ending_no_training, recording_why_unmade
from spectra.integrations.lightning_loss import batches_as_trained, loss_of, notes_of_training
from spectra.integrations.trainer_batches import first_batches
from spectra.operators.hessian.isolation import unwrap
from spectra.runs.kept import randomness_kept
from spectra.runs.probe import START, SpectrumProbe
from spectra.runs.schedule import Schedule
from spectra.runs.signals import Signal

PACKAGES = ("lightning.pytorch", "pytorch_lightning")  # the same code under two names


def _callback_class() -> Any:
    """Lightning's class of callbacks, from the package that the program has imported, or from one that is installed."""
    imported = [name for name in PACKAGES if name in sys.modules]
    installed = [name for name in PACKAGES if find_spec(name.partition(".")[0]) is not None]
    for name in (*imported, *installed):
        return importlib.import_module(name).Callback
    raise missing("pytorch_lightning")


class SpectrumLightningCallback(_callback_class()):
    """Measure the spectrum at the start of a training, along it, and at the end.

        trainer = Trainer(callbacks=[SpectrumLightningCallback(every=200)])

    What is measured is the loss that the module's `training_step` returns, on batches that the training's own loader
    draws and the module's transfer hooks have passed. What `training_step` logs meanwhile is not logged, and what it
    changes, such as the state of metrics, is put back. The training ends with the same weights, bit for bit, as without
    the callback.

    **Logs.** The numbers of each spectrum go to the loggers of the Lightning Trainer, at the optimizer step that they
    belong to: "spectra/rms" with "spectra/rms_low" and "spectra/rms_high" and so on (`SpectrumProbe`, log).

    A training that goes on from a checkpoint adds to its run. What cannot be measured ends no training: there is one
    warning, and a record that says why.

    Args:
        every: Optimizer steps between two measurements, or a fraction of the training, below 1. None: 200, unless
            another argument says when.
        at: Optimizer steps, or fractions of the training, that are measured.
        when: A signal such as `spectra.LossPlateau()`. It gets the "loss" that `training_step` returned, and the
            "gradient_norm" before clipping, once an optimizer step.
        max_overhead: The largest share of the wall time that measurements may take, see `spectra.Schedule`.
        schedule: All four of these as one value, in the place of them.
        batches: What the loss is taken over, see `SpectrumProbe`. None: the first batches of the training data.
        batch_count: How many batches are taken from the training data: those that its loader yields first, in the order
            of its sampler.
        seed_of_data: Seed of what is random in these batches.
        out: The run folder. None: "spectra" in the folder of the Trainer's first logger, or in its root folder.
        log: Called as log(scalars, step) in the place of the Trainer's loggers.
        **options: Other options of `SpectrumProbe`, such as probes, steps, params, modes and strict. With `loss` that
            loss is measured, not that of `training_step`.

    Attributes:
        probe: The `SpectrumProbe`, with its `records`; None before the training starts, and where nothing can be
            measured.

    Raises:
        InputError: If `batch_count` is below 1, a part of the schedule is out of its range, or there is no such option.
            With `strict`, when the training starts, whatever `SpectrumProbe` raises, and if the module optimizes
            manually, so that `training_step` returns no loss.
        MissingExtraError: When this module is imported, if neither `lightning` nor `pytorch_lightning` is installed.
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
        seed_of_data: int = 0,
        out: str | os.PathLike[str] | None = None,
        log: Callable[[dict[str, float], int], Any] | None = None,
        **options: Any,
    ):
        super().__init__()
        self.schedule = Schedule.of(schedule, every=every, at=at, when=when, max_overhead=max_overhead)
        check_options(batch_count, options)
        self.batches, self.batch_count, self.seed_of_data = batches, batch_count, seed_of_data
        self.out, self.options = out, options
        self._given_log = log  # Lightning gives every callback a `log` of its own
        self.probe: SpectrumProbe | None = None
        self._reached = 0  # the last optimizer step
        self._gradient_norm: torch.Tensor | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Make the probe and measure the module as it is."""
        self._release()
        self._reached, folder = trainer.global_step, trainer.log_dir  # which all ranks have to ask for
        if not trainer.is_global_zero:
            return
        out = str(self.out) if self.out is not None else os.path.join(folder or ".", "spectra")
        module = unwrap(pl_module)
        with self._ending_no_training(), randomness_kept():
            with recording_why_unmade(out, module, self._reached, self.options):
                self.probe = self._probe(trainer, module, out)
            self.probe.measure(self._reached, START)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        """Note the norm of the gradient, where a signal may ask for it."""
        if self.probe is not None and self.schedule.when is not None:
            gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
            self._gradient_norm = nn.utils.get_total_norm(gradients)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Measure if it is time; batches without an optimizer step are passed over."""
        if self.probe is None or trainer.global_step == self._reached:
            return
        self._reached = trainer.global_step
        numbers: dict[str, Any] = {}
        if self.schedule.when is not None:
            loss = outputs.get("loss") if isinstance(outputs, dict) else outputs
            numbers = {"loss": loss, "gradient_norm": self._gradient_norm}
        with self._ending_no_training():
            self.probe.step(self._reached, **{name: value for name, value in numbers.items() if value is not None})

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure the trained module, unless its last step was measured, and let others write to the run."""
        if self.probe is not None:
            with self._ending_no_training():
                self.probe.close(trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Let others write to the run of a training that broke off."""
        self._release()

    def _probe(self, trainer: Any, module: Any, out: str) -> SpectrumProbe:
        """The probe on the loss of `training_step`."""
        options = {"schedule": self.schedule, "log": self._given_log or _log_to_loggers(trainer), **self.options}
        notes = notes_of_training(trainer)
        if options.get("loss") is None:
            options["loss"] = loss_of(module)
        if self.schedule.fractions:
            options.setdefault("total_steps", _length(trainer))
        batches = self.batches
        if batches is None:
            drawn, said = first_batches(_loader(trainer), self.batch_count, seed=self.seed_of_data)
            batches, notes = batches_as_trained(trainer, module, drawn, seed=self.seed_of_data), notes + said
        probe = SpectrumProbe(module, batches, out=out, **options)
        probe.notes += notes
        return probe

    def _release(self) -> None:
        """Let others write to the run of an earlier training."""
        if self.probe is not None and self.probe.run is not None:
            self.probe.run.close()
        self.probe = None

    def _ending_no_training(self, what: str = NO_SPECTRUM) -> contextlib.AbstractContextManager[None]:
        """What fails is a warning, unless `strict` was asked for."""
        return ending_no_training(bool(self.options.get("strict")), what)

    def __getstate__(self) -> dict[str, Any]:
        """The settings: a probe belongs to its process."""
        return {**self.__dict__, "probe": None, "_gradient_norm": None}


def _log_to_loggers(trainer: Any) -> Callable[[dict[str, float], int], None]:
    """A function that gives scalars to every logger of a Lightning Trainer."""

    def log(values: dict[str, float], step: int) -> None:
        for logger in trainer.loggers:
            logger.log_metrics(metrics={**values, "epoch": float(trainer.current_epoch)}, step=step)
            logger.save()

    return log


def _length(trainer: Any) -> int | None:
    """The optimizer steps in all; None where nothing bounds them."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if 0 < steps < float("inf") else None


def _loader(trainer: Any) -> Any:
    """The loader of the training data. Raises InputError where there are several."""
    loader = trainer.train_dataloader
    if isinstance(loader, dict | list | tuple):
        raise InputError(f"batches cannot be taken from {len(loader)} loaders at once: pass batches=[...]")
    return loader
