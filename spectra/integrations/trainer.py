"""Spectra along a training with the Hugging Face Trainer."""

from __future__ import annotations

import os
from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectra.backend.errors import InputError
from spectra.runs.probe import SpectrumProbe


class SpectrumCallback(TrainerCallback):
    """Measure the spectrum at the start of a training, every so many training steps, and at the end.

        trainer.add_callback(SpectrumCallback(every=200))

    Args:
        every: Optimizer steps between two measurements.
        batches: What the loss is taken over, see `SpectrumProbe`. None: the first batches of the training data.
        batch_count: How many batches are taken from the training data, in the data set's own order, collated as the
            Trainer does.
        out: The run folder. None: "spectra" in the Trainer's output folder.
        **options: Other options of `SpectrumProbe`, such as probes, steps, params and modes.

    Attributes:
        probe: The `SpectrumProbe`, with its `records`; None before the training starts.

    Raises:
        InputError: If `every` is below 1. When the training starts, whatever `SpectrumProbe` raises.
    """

    def __init__(
        self,
        every: int = 200,
        *,
        batches: Any = None,
        batch_count: int = 1,
        out: str | os.PathLike[str] | None = None,
        **options: Any,
    ):
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}")
        self.every, self.batches, self.batch_count, self.out, self.options = every, batches, batch_count, out, options
        self.probe: SpectrumProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the probe and measure the model as it is."""
        if not state.is_world_process_zero:
            return
        batches = self.batches
        if batches is None:
            batches = first_batches(kwargs["train_dataloader"], self.batch_count, rows=args.per_device_train_batch_size)
        out = self.out if self.out is not None else f"{args.output_dir}/spectra"
        self.probe = SpectrumProbe(kwargs["model"], batches, every=self.every, out=out, **self.options)
        self.probe.measure(state.global_step, "start")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Measure if it is time; the last training step is left to `on_train_end`."""
        if self.probe is not None and state.global_step < state.max_steps:
            self.probe.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the trained model."""
        if self.probe is not None:
            self.probe.measure(state.global_step, "end")


def first_batches(loader: DataLoader, count: int, *, rows: int) -> list[Any]:
    """Take the first batches of a loader's data set, in the data set's order.

    The loader itself is not iterated: that would advance its sampler and change the training data.

    Args:
        loader: The loader.
        count: How many batches.
        rows: How many rows each batch has; the last may have fewer.

    Returns:
        The batches, collated as the loader does.

    Raises:
        InputError: If the data set cannot be indexed.
    """
    dataset, collate = loader.dataset, loader.collate_fn
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError("the data set cannot be indexed, so batches cannot be taken from it: pass batches=[...]")
    length = len(dataset)  # type: ignore[arg-type]
    starts = range(0, min(count * rows, length), rows)
    return [collate([dataset[i] for i in range(start, min(start + rows, length))]) for start in starts]
