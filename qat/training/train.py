"""Training a language model, quantized or not, with the Hugging Face Trainer as the engine."""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from qat.layers.linear import decay_exempt
from qat.text.corpus import Blocks
from qat.training.checkpoints import CheckpointingTrainer, Checkpoints
from qat.training.config import TrainConfig
from qat.training.evaluate import evaluate
from qat.training.progress import progress_bar
from spectra.backend.errors import NonFiniteError
from spectra.runs.folder import Run

Loss = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]


@dataclass(frozen=True)
class TrainResult:
    """The result of a training.

    Attributes:
        steps: Training steps.
        curve: Pairs (training step, validation loss), from step 0 to the last.
        seconds: How long it took.
    """

    steps: int
    curve: tuple[tuple[int, float], ...]
    seconds: float

    @property
    def validation_loss(self) -> float:
        """The validation loss after the last training step."""
        return self.curve[-1][1]


def train(
    model: nn.Module,
    train_blocks: Blocks,
    validation_blocks: Blocks,
    config: TrainConfig,
    *,
    name: str = "training",
    run: Run | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    telemetry: Any = None,
    device: str | None = None,
    checkpoints: Checkpoints | None = None,
    loss: Loss | None = None,
) -> TrainResult:
    """Train a language model in place.

    The same `config.seed` gives the same batches in the same order. A training that goes on from a checkpoint ends with
    the weights and lines of one that was never interrupted, bit for bit on a CPU; `run` then holds what was recorded up
    to the checkpoint.

    Args:
        model: A causal language model of transformers, quantized or not.
        train_blocks: Blocks to train on.
        validation_blocks: Blocks that the validation loss is the mean over.
        config: How to train.
        name: What the progress bar and error messages call the training.
        run: A run folder. It gets a line of telemetry every `config.telemetry_every` steps and at every evaluation.
        callbacks: Further callbacks of the Trainer; at every training step they are called before that of this module.
        telemetry: Has `measure() -> dict`. It is called before the gradients are freed, and its numbers join the line.
        device: "cpu", "cuda", or None for a GPU if there is one.
        checkpoints: Where and when the training is saved, and what it goes on from; None: not at all.
        loss: Called as loss(model, inputs), with input_ids and labels; returns the mean loss of a batch. None: the
            model's own.

    Returns:
        The validation curve.

    Raises:
        NonFiniteError: A loss is NaN or infinite; the message names the step. What was recorded is kept.
    """
    set_seed(config.seed)
    arguments = TrainingArguments(
        # it asks for a folder, and without checkpoints saves nothing there
        output_dir=tempfile.gettempdir() if checkpoints is None else str(checkpoints.folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        max_grad_norm=config.gradient_clip,
        seed=config.seed,
        use_cpu=device == "cpu" or not torch.cuda.is_available(),
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        report_to=[],
        remove_unused_columns=False,
    )
    _ = arguments.device
    arguments._n_gpu = min(arguments.n_gpu, 1)  # on all GPUs the Trainer would train on a larger batch
    optimizer = make_optimizer(model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, config))
    watch = _Watch(validation_blocks, config, name=name, run=run, telemetry=telemetry)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        callbacks=[*callbacks, watch, *([] if checkpoints is None else [checkpoints])],
        optimizers=(optimizer, schedule),
    )
    trainer.watch, trainer.checkpoints, trainer.loss = watch, checkpoints, loss
    trainer.ordered = Subset(train_blocks, data_order(len(train_blocks), config))
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    resumed = None if checkpoints is None else checkpoints.resumed
    try:
        model.to(arguments.device)
        if resumed is None:
            watch.validate(model, 0)
        else:
            watch.go_on(resumed.step)
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.folder))
    finally:
        watch.close()
        if checkpoints is not None:
            checkpoints.close()
        model.zero_grad(set_to_none=True)
    return TrainResult(config.steps, tuple(watch.curve), time.perf_counter() - started)


def schedule_factor(step: int, config: TrainConfig) -> float:
    """The factor on the learning rate in one training step.

    Warmup, over the first w = warmup * steps: (step + 1) / w. Then "constant": 1; "cosine": (1 + cos(pi t)) / 2, with t
    the share of the remaining steps that is done; "wsd": 1, and (steps - step) / d over the last d = decay * steps.

    Args:
        step: The number of training steps before this one, 0 <= step < steps.
        config: How to train.

    Returns:
        The factor, 0 to 1.

    Example:
        >>> schedule_factor(9, TrainConfig(steps=10, schedule="wsd", decay=0.5))
        0.2
    """
    warmup = config.warmup * config.steps
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if config.schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (config.steps - warmup))))
    decay = config.decay * config.steps
    if config.schedule == "wsd" and decay > 0:
        return max(0.0, min(1.0, (config.steps - step) / decay))
    return 1.0


def data_order(blocks: int, config: TrainConfig) -> list[int]:
    """The order in which blocks are trained on: one permutation of all blocks after another, drawn from the seed.

    Args:
        blocks: How many blocks there are.
        config: How to train.

    Returns:
        The index of a block for each sequence of the training.
    """
    generator = torch.Generator().manual_seed(config.seed)
    needed = config.steps * config.batch_size
    order: list[int] = []
    while len(order) < needed:
        order += torch.randperm(blocks, generator=generator).tolist()
    return order[:needed]


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices alone: none on biases, and none on the scales of quantizers.

    Args:
        model: The model; parameters that are frozen are left out.
        config: How to train.

    Returns:
        The optimizer.
    """
    exempt = decay_exempt(model)
    decayed, others = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and name not in exempt else others).append(parameter)
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate)


class _Trainer(CheckpointingTrainer):
    """The Trainer with a fixed data order and a check of every loss."""

    watch: _Watch
    loss: Loss | None
    ordered: Subset

    def get_train_dataloader(self) -> DataLoader:
        return DataLoader(self.ordered, batch_size=self.args.per_device_train_batch_size)

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: Any, **options: Any) -> Any:
        if self.loss is not None:
            return self.loss(model, inputs)
        return model(**inputs).loss  # the mean over the tokens of this batch, in every version of the Trainer

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.watch.loss = self.watch.finite(loss.item(), "training loss", self.state.global_step + 1)
        return loss


class _Watch(TrainerCallback):
    """Validation losses, telemetry lines, and the progress bar."""

    def __init__(self, blocks: Blocks, config: TrainConfig, *, name: str, run: Run | None, telemetry: Any) -> None:
        self.blocks, self.config, self.name, self.run, self.telemetry = blocks, config, name, run, telemetry
        self.evaluation_steps = frozenset(config.evaluation_steps())
        self.loss = math.nan
        self.curve: list[tuple[int, float]] = []
        self.measured: dict[str, float] = {}
        self.bar = progress_bar(config.steps, name, "steps")

    def finite(self, loss: float, what: str, step: int) -> float:
        """The loss. Raises NonFiniteError, and writes a last line of telemetry, if it is NaN or infinite."""
        if math.isfinite(loss):
            return loss
        if self.run is not None:
            self.run.append_telemetry({"step": step, "loss": loss})
        kept = "" if self.run is None else f"; what was recorded is in {self.run.folder}"
        raise NonFiniteError(
            f"{self.name}: the {what} is {loss} at step {step} of {self.config.steps}: "
            f"use a learning rate below {self.config.learning_rate:g}, or check the model's weights{kept}"
        )

    def validate(self, model: nn.Module, step: int) -> float:
        """Measure the validation loss, add it to the curve and return it."""
        loss = evaluate(model, self.blocks, batch_size=self.config.batch_size).loss
        self.curve.append((step, self.finite(loss, "validation loss", step)))
        if step == 0 and self.run is not None:
            self.run.append_telemetry({"step": 0, "validation_loss": loss})
        return loss

    def go_on(self, step: int) -> None:
        """Take up the curve and the bar of a training that was saved after this step."""
        lines = [] if self.run is None else self.run.telemetry
        curve = [(line["step"], line["validation_loss"]) for line in lines if "validation_loss" in line]
        self.curve = curve or [(step, math.nan)]
        self.bar.update(step)

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.telemetry is not None and self._due(state.global_step + 1):
            self.measured = self.telemetry.measure()  # after the update, while the gradients are still there

    def on_step_end(self, args, state, control, *, model: nn.Module, lr_scheduler: Any, **kwargs) -> None:
        step = state.global_step
        line = {
            "step": step,
            "loss": self.loss,
            "learning_rate": self.config.learning_rate * schedule_factor(step - 1, self.config),
        }
        if step in self.evaluation_steps:
            line["validation_loss"] = self.validate(model, step)
        if self.run is not None and self._due(step):
            self.run.append_telemetry(line | self.measured)
        self.bar.update()
        self.bar.set_postfix_str(f"loss {self.loss:.3f}, validation {self.curve[-1][1]:.3f}", refresh=False)

    def _due(self, step: int) -> bool:
        return step % self.config.telemetry_every == 0 or step in self.evaluation_steps

    def close(self) -> None:
        self.bar.close()
