"""Training a language model, quantized or not, with the Hugging Face Trainer as the engine."""

from __future__ import annotations

import math
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed

from qat.layers.linear import decay_exempt, distinct_quant_layers
from qat.text.corpus import Blocks
from qat.training.checkpoints import CheckpointingTrainer, Checkpoints
from qat.training.config import TrainConfig
from qat.training.evaluate import evaluate
from qat.training.losses import StepLosses, look_every
from qat.training.progress import progress_bar
from qat.training.ranks import DAY, order_of_rank, rank, rank_count, seed_of_rank, sequences_at_once
from qat.training.step import (
    Loss,
    TrainingStep,
    checkpoint_activations,
    compiling,
    computing_in,
    next_token_loss,
    resolved,
)
from qat.training.telemetry import NARROW
from spectra.backend.errors import NonFiniteError
from spectra.runs.folder import Run


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
    loss: Loss = next_token_loss,
) -> TrainResult:
    """Train a language model in place.

    The same `config.seed` gives the same batches in the same order. Under torchrun every rank calls this, and trains on
    its part of each batch; the results are the same on all. Validation losses are computed uncompiled, in the run's
    dtype.
    A training that goes on from a checkpoint ends with the weights and lines of one that was never interrupted, bit for
    bit on a CPU; `run` then holds what was recorded up to the checkpoint.

    Args:
        model: A causal language model of transformers, quantized or not.
        train_blocks: Blocks to train on.
        validation_blocks: Blocks that the validation loss is the mean over.
        config: How to train.
        name: What the progress bar and error messages call the training.
        run: A run folder. It gets a line of telemetry every `config.telemetry_every` steps and at every evaluation.
            Under torchrun, give it on the first rank alone.
        callbacks: Further callbacks of the Trainer; at every training step they are called before that of this module.
        telemetry: Has `measure() -> dict`. It is called before the gradients are freed, and its numbers join the line.
            Where it has `before_update()`, that is called before the optimizer's step.
        device: "cpu", "cuda", or None for a GPU if there is one.
        checkpoints: Where and when the training is saved, and what it goes on from; None: not at all.
        loss: What is minimized, as in `TrainingStep`; the validation loss is the cross-entropy in any case.

    Returns:
        The validation curve.

    Raises:
        InputError: The batch cannot be divided into `config.accumulate` parts, torch.compile fails, or the checkpoint
            cannot be read.
        NonFiniteError: A loss is NaN or infinite; the message names the step. What was recorded is kept. On a GPU this
            may be seen some steps later.
    """
    arguments = _arguments(config, device, tempfile.gettempdir() if checkpoints is None else str(checkpoints.folder))
    config = resolved(config, model, arguments.device)
    optimizer = make_optimizer(model.to(arguments.device), config)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule_factor(step, config))
    watch = _Watch(validation_blocks, config, name=name, run=run, telemetry=telemetry, device=arguments.device)
    trainer = _Trainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        callbacks=[*callbacks, watch, *([] if checkpoints is None else [checkpoints])],
        optimizers=(optimizer, schedule),
    )
    trainer.watch, trainer.checkpoints = watch, checkpoints
    step = TrainingStep(model, dtype=config.dtype, compiled=bool(config.compile), loss=loss)
    trainer.step_module = _distributed(step, config)
    trainer.ordered = Subset(train_blocks, order_of_rank(data_order(len(train_blocks), config), config))
    trainer.remove_callback(PrinterCallback)
    _warn_of_16_bit_latents(model)
    if config.activation_checkpointing:
        checkpoint_activations(model, True)
    started = time.perf_counter()
    resumed = None if checkpoints is None else checkpoints.resumed
    try:
        if resumed is None:
            watch.validate(model, 0)
        else:
            watch.go_on(resumed.step)
        with compiling(bool(config.compile)):
            trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed.folder))
    finally:
        watch.close()
        step.close()
        if checkpoints is not None:
            checkpoints.close()
        model.zero_grad(set_to_none=True)
        if config.activation_checkpointing:
            checkpoint_activations(model, False)
    return TrainResult(config.steps, tuple(watch.curve), time.perf_counter() - started)


def _arguments(config: TrainConfig, device: str | None, folder: str) -> TrainingArguments:
    """The settings of the Trainer. They choose the device, and start torch.distributed where torchrun asks for it."""
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    arguments = TrainingArguments(
        output_dir=folder,  # it asks for one, and without checkpoints saves nothing there
        max_steps=config.steps,
        per_device_train_batch_size=sequences_at_once(config),
        gradient_accumulation_steps=config.accumulate,
        max_grad_norm=config.gradient_clip,
        seed=seed_of_rank(config),
        use_cpu=on_cpu,
        ddp_backend=("gloo" if on_cpu else "nccl") if rank_count() > 1 else None,
        ddp_timeout=60 * DAY,
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
    set_seed(arguments.seed)
    return arguments


def _distributed(step: TrainingStep, config: TrainConfig) -> nn.Module:
    """The step as it is, or with its gradients averaged over all ranks."""
    if rank_count() == 1:
        return step
    if config.activation_checkpointing and config.compile:
        torch._dynamo.config.optimize_ddp = False  # type: ignore[assignment]  # which cannot split checkpointed code
    # A mixture of experts may send no token to an expert, whose weights then have no gradient.
    return nn.parallel.DistributedDataParallel(step, find_unused_parameters=_has_experts(step.model))


def _has_experts(model: Any) -> bool:
    names = ("num_experts", "num_local_experts", "n_routed_experts")
    return any(getattr(getattr(model, "config", None), name, None) for name in names)


def _warn_of_16_bit_latents(model: nn.Module) -> None:
    """A warning if latent weights are bfloat16 or float16."""
    narrow = [name for name, layer in distinct_quant_layers(model) if layer.weight.dtype in NARROW]
    if narrow:
        warnings.warn(
            f"{len(narrow)} latent weights have 16 bits ({narrow[0]}, ...), and updates smaller than their rounding "
            "error are lost: the telemetry has the share (lost_updates); convert the model with model.float() first",
            stacklevel=3,
        )


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
    """AdamW, fused, with weight decay on matrices alone: none on biases, and none on the scales of quantizers.

    Args:
        model: The model, on the device it is trained on; parameters that are frozen are left out.
        config: How to train.

    Returns:
        The optimizer.
    """
    exempt = decay_exempt(model)
    decayed, others, scales = [], [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (scales if name in exempt else decayed if parameter.ndim >= 2 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
        {"params": scales, "weight_decay": 0.0, "lr": config.scale_learning_rate or config.learning_rate},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=config.learning_rate, fused=True)


class _Trainer(CheckpointingTrainer):
    """The Trainer with a fixed data order, our own forward pass, and nothing in a step that waits for the device."""

    watch: _Watch
    step_module: nn.Module
    ordered: Subset

    def _wrap_model(self, model: nn.Module, *arguments: Any, **options: Any) -> nn.Module:
        return self.step_module  # compiled, and distributed, by us

    def get_train_dataloader(self) -> DataLoader:
        pinned = self.args.device.type == "cuda"  # a copy from other memory waits for the device
        return DataLoader(self.ordered, batch_size=self.args.per_device_train_batch_size, pin_memory=pinned)

    def _prepare_inputs(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:  # type: ignore[override]
        return {name: tensor.to(self.args.device, non_blocking=True) for name, tensor in inputs.items()}

    def _get_num_items_in_batch(self, *arguments: Any, **options: Any) -> None:
        return None  # blocks are equally long: the mean over a batch is the mean of the means over its parts

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        return 0  # counting them walks through the model at every step, and nobody reads it

    def compute_loss(self, model: nn.Module, inputs: dict[str, torch.Tensor], *arguments: Any, **options: Any) -> Any:
        return model(**inputs)

    def training_step(self, *arguments: Any, **options: Any) -> torch.Tensor:
        loss = super().training_step(*arguments, **options)
        self.watch.losses.add(self.state.global_step + 1, loss)
        return loss

    def _save_checkpoint(self, *arguments: Any) -> None:
        self.watch.look()  # weights that a NaN has spoiled are not saved
        super()._save_checkpoint(*arguments)


class _Watch(TrainerCallback):
    """Validation losses, telemetry lines, and the progress bar."""

    def __init__(
        self,
        blocks: Blocks,
        config: TrainConfig,
        *,
        name: str,
        run: Run | None,
        telemetry: Any,
        device: torch.device,
    ) -> None:
        self.blocks, self.config, self.name, self.run, self.telemetry = blocks, config, name, run, telemetry
        self.evaluation_steps = frozenset(config.evaluation_steps())
        self.telemetry_interval = config.telemetry_interval()
        self.losses = StepLosses(look_every(device))
        self.loss = math.nan
        self.curve: list[tuple[int, float]] = []
        self.measured: dict[str, float] = {}
        self.bar = progress_bar(config.steps, name, "steps") if rank() == 0 else tqdm(disable=True)

    def look(self) -> None:
        """Bring the training losses up to date. Raises NonFiniteError for one that is NaN or infinite.

        It waits for the device. Call it before anything of a training step is kept.
        """
        for step, loss in self.losses.look():
            self.loss = self.finite(loss, "training loss", step)

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
        with computing_in(self.config.dtype, next(model.parameters()).device):
            loss = evaluate(model, self.blocks, batch_size=sequences_at_once(self.config)).loss
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

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.telemetry is not None and self._due(state.global_step + 1) and hasattr(self.telemetry, "before_update"):
            self.telemetry.before_update()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if self.telemetry is not None and self._due(state.global_step + 1):
            self.measured = self.telemetry.measure()  # after the update, while the gradients are still there

    def on_step_end(self, args, state, control, *, model: nn.Module, lr_scheduler: Any, **kwargs) -> None:
        step = state.global_step
        if self._due(step) or self.losses.due:
            self.look()
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
        if self.curve:
            self.bar.set_postfix_str(f"loss {self.loss:.3f}, validation {self.curve[-1][1]:.3f}", refresh=False)

    def _due(self, step: int) -> bool:
        return step % self.telemetry_interval == 0 or step in self.evaluation_steps

    def close(self) -> None:
        self.bar.close()
