"""The loss that a Trainer trains, as a function of model and batch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.loss.loss_utils import ForCausalLMLoss

from spectra.backend.errors import InputError
from spectra.backend.ranks import without_collectives
from spectra.operators.hessian.batches import moved
from spectra.operators.hessian.isolation import RandomStates, isolated, unwrap
from spectra.runs.object_state import Holder, kept

NOT_FOUND = (
    "the Trainer was not found, so the model's own loss is measured, whatever loss is trained, and its log "
    "gets no spectra: pass SpectrumCallback(trainer=trainer)"
)
OWN_LOSS = "the loss is that of the Trainer's compute_loss"
SMOOTHED = "the loss is the Trainer's, with label smoothing {}"
FROM_LOGITS = "TRL's fused loss has no second derivative: the same loss is computed from the logits"
LOSS_FUNCTION = "the loss is that of the Trainer's compute_loss_func"
ACCUMULATED = (
    "gradient accumulation: the loss does not depend on num_items_in_batch, so that a training step descends the {} of "
    "the losses of its {} batches; the loss of the measured batches together is measured"
)
BUDGET = 1 << 20  # entries of tensors and arrays that are put back after each call of compute_loss


def calling_trainer(callback: TrainerCallback) -> Trainer | None:
    """The Trainer that calls a callback: an event does not name it, but its method is among the callers.

    Args:
        callback: The callback.

    Returns:
        The Trainer, None if it is not among the callers.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer) and any(each is callback for each in owner.callback_handler.callbacks):
            return owner
        frame = frame.f_back
    return None


def loss_of(trainer: Trainer) -> tuple[Callable[[nn.Module, Any], torch.Tensor] | None, list[str]]:
    """The loss that a Trainer trains, and notes on it.

    Args:
        trainer: The Trainer.

    Returns:
        (model, batch) -> scalar, None where it is the model's own loss; and notes for the record.
    """
    notes = []
    for name in ("training_step", "_prepare_inputs"):
        if not _is_stock(trainer, name):
            notes.append(f"the Trainer has a {name} of its own: what that adds to compute_loss is not measured")
    if not _is_stock(trainer, "compute_loss"):
        notes += [OWN_LOSS, FROM_LOGITS] if _is_fused(trainer) else [OWN_LOSS]
    elif trainer.compute_loss_func is not None:
        notes.append(LOSS_FUNCTION)
    elif trainer.label_smoother is not None:
        notes.append(SMOOTHED.format(trainer.label_smoother.epsilon))
    elif isinstance(trainer.model, PreTrainedModel) or hasattr(trainer.model, "config"):
        return None, notes
    return _TrainersLoss(trainer), notes


def notes_of_precision(args: TrainingArguments) -> list[str]:
    """What to say where the training computes in another precision than the measurement.

    Args:
        args: The Trainer's arguments.

    Returns:
        Notes for the record.
    """
    trained = "bfloat16" if args.bf16 else "float16" if args.fp16 else ""
    return [f"trained with autocast to {trained}, measured in the precision of the weights"] if trained else []


def notes_of_accumulation(trainer: Trainer, loss: Callable[..., torch.Tensor] | None, batch: Any) -> list[str]:
    """What to say where the batches of a training step do not make up one batch, as they do in the measurement.

    Args:
        trainer: The Trainer.
        loss: What `loss_of` returned.
        batch: A batch of the training.

    Returns:
        Notes for the record. There are none without gradient accumulation, and where the loss divides by
        `num_items_in_batch`, which is tried.
    """
    steps = trainer.args.gradient_accumulation_steps
    if steps == 1:
        return []
    trained = loss if isinstance(loss, _TrainersLoss) else _TrainersLoss(trainer)
    try:  # many models accept the number of items, and do not divide by it
        divided = trained.depends_on_items(batch)
    except Exception:  # a batch on which the loss cannot be computed: the measurement will tell
        divided = trainer.compute_loss_func is not None or trainer.model_accepts_loss_kwargs
    if divided:
        return []
    scaled = getattr(trainer, "loss_is_scaled_for_ga", None)  # which older versions of transformers do not have
    has_items = isinstance(batch, Mapping) and "labels" in batch
    if scaled is None:
        scaled = trainer.compute_loss_func is not None or (trainer.model_accepts_loss_kwargs and has_items)
    return [ACCUMULATED.format("sum" if scaled else "mean", steps)]


class _TrainersLoss(Holder):
    """`compute_loss` of a Trainer, on one batch as if it were the whole of an optimizer step.

    The Trainer divides sums over tokens by the tokens of all batches of a step. Here that number is the batch's own, so
    that the loss is a mean over the batch. Whatever compute_loss changes in the Trainer, and in what the Trainer holds,
    is put back after each call, so that all calls see the same, and nothing is logged. Other modules that the Trainer
    holds, such as a teacher, run in the mode of the model.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer

    def holds(self) -> list[Any]:
        """What compute_loss may change."""
        trainer = self.trainer
        return [*(vars(part) for part in (trainer, trainer.args, trainer.state, trainer.control)), type(trainer)]

    def depends_on_items(self, batch: Any) -> bool:
        """Whether the loss of a batch changes with the number of items that the Trainer says it has."""
        model = unwrap(cast(nn.Module, self.trainer.model))
        device = next(model.parameters()).device
        with isolated(model), torch.no_grad():
            states = RandomStates(device)
            values = []
            for factor in (1, 2):
                states.restore()
                values.append(float(self(model, moved(batch, device, None), times_items=factor)))
        return values[0] != values[1]

    def __call__(self, model: nn.Module, batch: Any, *, times_items: int = 1) -> torch.Tensor:
        trainer = self.trainer
        inputs = dict(batch) if isinstance(batch, Mapping) else batch
        with (
            without_collectives("the Trainer's compute_loss"),
            kept(self, budget=BUDGET),
            _in_mode(_other_modules(trainer, model), model.training),
        ):
            _be_one_process(trainer, model)
            items = None
            if isinstance(inputs, dict):
                device = next(model.parameters()).device
                _, items = trainer.get_batch_samples(iter([inputs]), 1, device)
                items = None if items is None else times_items * items
            value = trainer.compute_loss(model, inputs, num_items_in_batch=items)
        value = value[0] if isinstance(value, tuple) else value
        if not isinstance(value, torch.Tensor):
            raise InputError(f"the Trainer's compute_loss must return a tensor, got {type(value).__name__}")
        return value


def _be_one_process(trainer: Trainer, model: nn.Module) -> None:
    """Let the Trainer be one process on one device that logs nothing, until the caller puts it back."""
    args, attributes = trainer.args, vars(trainer)
    for name, value in dict(attributes).items():  # what is updated in place must not belong to a graph that is kept
        if isinstance(value, torch.Tensor) and value.grad_fn is None and not value.requires_grad:
            attributes[name] = value.clone()
    if _is_fused(trainer):
        attributes["compute_loss_func"] = _next_token_loss
    attributes["log"], attributes["model_wrapped"] = _log_nothing, model
    vars(args)["average_tokens_across_devices"] = False  # asking the other ranks would wait for them
    if args.n_gpu > 1:
        vars(args)["_n_gpu"] = 1


def _is_fused(trainer: Trainer) -> bool:
    """Whether TRL's SFTTrainer computes the next-token loss without the logits, in a function differentiable once."""
    own = any(kind.__name__ == "SFTTrainer" and kind.__module__.startswith("trl.") for kind in type(trainer).__mro__)
    plain = trainer.compute_loss_func is None and trainer.label_smoother is None
    plain = (
        plain and getattr(trainer.args, "loss_type", "") == "nll" and not getattr(trainer, "aux_loss_enabled", False)
    )
    return own and plain


def _next_token_loss(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """The loss of a causal language model, from its logits; SFTTrainer takes it as a `compute_loss_func`."""
    logits = outputs["logits"]
    return ForCausalLMLoss(logits, labels, logits.shape[-1], num_items_in_batch=num_items_in_batch)


def _log_nothing(*_: Any, **__: Any) -> None:
    """In the place of `Trainer.log`."""


def _other_modules(trainer: Trainer, model: nn.Module) -> list[nn.Module]:
    """The modules that a Trainer holds beside its model, which the operator looks after."""
    watched = set(model.modules())
    found = [value for value in vars(trainer).values() if isinstance(value, nn.Module)]
    return [module for root in found for module in root.modules() if not watched & set(module.modules())]


@contextlib.contextmanager
def _in_mode(modules: list[nn.Module], training: bool) -> Iterator[None]:
    before = [(module, module.training) for module in modules]
    try:
        for module in modules:
            module.training = training and module.training
        yield
    finally:
        for module, mode in before:
            module.training = mode


def _is_stock(trainer: Trainer, name: str) -> bool:
    """Whether a method is transformers' own, neither overridden nor replaced."""
    return getattr(getattr(trainer, name), "__module__", "") == Trainer.__module__
