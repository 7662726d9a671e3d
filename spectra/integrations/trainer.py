"""A spectrum along a Hugging Face Trainer's run, with one line."""

from __future__ import annotations

from typing import Any

from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from spectra.backend.errors import InputError
from spectra.runs.probe import SpectrumProbe


class SpectrumCallback(TrainerCallback):
    """`trainer.add_callback(SpectrumCallback(every=200))` measures the spectrum at the start, every 200 steps and at
    the end of training.

    every: optimizer steps between measurements. batches: what the loss is taken over; by default the first
    `batch_count` batches of the training data, in the data set's own order, collated as the Trainer does.
    out: the run folder, by default "spectra" in the Trainer's output folder. Other options are
    `spectra.SpectrumProbe`'s. After training `callback.probe.records` holds the records.
    """

    def __init__(self, every: int = 200, *, batches: Any = None, batch_count: int = 1, out: Any = None, **options: Any):
        if every < 1:
            raise InputError(f"every must be at least 1 step, got {every}")
        self.every, self.batches, self.batch_count, self.out, self.options = every, batches, batch_count, out, options
        self.probe: SpectrumProbe | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        batches = self.batches
        if batches is None:
            batches = first_batches(kwargs["train_dataloader"], self.batch_count, rows=args.per_device_train_batch_size)
        out = self.out if self.out is not None else f"{args.output_dir}/spectra"
        self.probe = SpectrumProbe(kwargs["model"], batches, every=self.every, out=out, **self.options)
        self.probe.measure(state.global_step, "start")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.probe is not None and state.global_step < state.max_steps:
            self.probe.step(state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.probe is not None:
            self.probe.measure(state.global_step, "end")


def first_batches(loader: DataLoader, count: int, *, rows: int) -> list[Any]:
    """The first `count` batches of a loader's data set, in its order. The loader itself is not iterated: that would
    move its sampler and with it the training data."""
    dataset, collate = loader.dataset, loader.collate_fn
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError("the data set cannot be indexed, so batches cannot be taken from it: pass batches=[...]")
    length = len(dataset)  # type: ignore[arg-type]
    starts = range(0, min(count * rows, length), rows)
    return [collate([dataset[i] for i in range(start, min(start + rows, length))]) for start in starts]
