"""The loss that a LightningModule trains, as a function of module and batch."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from spectra.backend.errors import InputError
from spectra.backend.ranks import without_collectives
from spectra.runs.kept import randomness_kept
from spectra.runs.object_state import Holder, kept

SILENCED = ("log", "log_dict", "print")  # methods of a module that write to logs


def loss_of(module: Any) -> _StepsLoss:
    """The loss that `training_step` returns.

    Args:
        module: The LightningModule.

    Returns:
        (model, batch) -> scalar.

    Raises:
        InputError: If the module optimizes manually, or its `training_step` draws batches itself.
    """
    name = type(module).__name__
    if not module.automatic_optimization:
        raise InputError(
            f"{name} optimizes manually (automatic_optimization=False), so that its training_step returns no loss to "
            "measure: pass loss="
        )
    if "dataloader_iter" in inspect.signature(module.training_step).parameters:
        raise InputError(f"the training_step of {name} draws its batches itself (dataloader_iter): pass loss=")
    return _StepsLoss()


def notes_of_training(trainer: Any) -> list[str]:
    """What to say where a Lightning Trainer trains otherwise than the measurement computes.

    Args:
        trainer: The Lightning Trainer.

    Returns:
        Notes for the record.
    """
    notes, precision = [], str(trainer.precision)
    if not precision.startswith(("32", "64")):
        notes.append(f"trained in the precision {precision}, measured in that of the weights")
    if trainer.accumulate_grad_batches > 1:
        notes.append(
            f"gradient accumulation: a training step descends the mean of the losses of its "
            f"{trainer.accumulate_grad_batches} batches; the loss of the measured batches together is measured"
        )
    return notes


def batches_as_trained(trainer: Any, module: Any, batches: list[Any], *, seed: int) -> list[Any]:
    """Batches after the module's own transfer hooks, `on_before_batch_transfer` and `on_after_batch_transfer`.

    Random numbers come from the seed. What the hooks change in the module is put back.

    Args:
        trainer: The Lightning Trainer.
        module: The LightningModule.
        batches: Batches as the loader yields them.
        seed: Of the random numbers.

    Returns:
        Batches as `training_step` gets them.
    """
    with randomness_kept(), kept(*_plain_attributes(module)), torch.no_grad():
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002, what augmentations draw from
        return [_transferred(trainer, module, batch) for batch in batches]


def _transferred(trainer: Any, module: Any, batch: Any) -> Any:
    batch = trainer.precision_plugin.convert_input(batch)
    batch = module.on_before_batch_transfer(batch, 0)
    batch = module.transfer_batch_to_device(batch, module.device, 0)
    return module.on_after_batch_transfer(batch, 0)


class _StepsLoss(Holder):
    """`training_step` of a LightningModule, on one batch. Nothing that it logs is logged."""

    def holds(self) -> list[Any]:
        """Nothing of its own."""
        return []

    def __call__(self, model: nn.Module, batch: Any) -> torch.Tensor:
        if not isinstance(model, nn.Module):  # called with outputs, when the form of the loss is looked for
            raise TypeError("expected a module")
        module: Any = model
        arguments = [batch, 0][: len(inspect.signature(module.training_step).parameters)]
        with without_collectives("training_step"), _logging_nothing(module):
            value = module.training_step(*arguments)
        value = value.get("loss") if isinstance(value, Mapping) else value
        if not isinstance(value, torch.Tensor):
            raise InputError(
                f"training_step of {type(module).__name__} must return a loss on the measured batches, got "
                f"{type(value).__name__}: pass batches=, or loss="
            )
        return value


@contextlib.contextmanager
def _logging_nothing(module: Any) -> Iterator[None]:
    """Put stand-ins in the place of the module's log methods and of its Trainer's loggers."""
    attributes, trainer = vars(module), module._trainer
    before = {name: attributes[name] for name in SILENCED if name in attributes}
    loggers = trainer.loggers if trainer is not None else []
    try:
        attributes.update(dict.fromkeys(SILENCED, _log_nothing))
        if trainer is not None and loggers:
            package = type(trainer).__module__.partition(".trainer")[0]
            stand_in = importlib.import_module(f"{package}.loggers.logger").DummyLogger
            trainer.loggers = [stand_in() for _ in loggers]
        yield
    finally:
        for name in SILENCED:
            attributes.pop(name, None)
        attributes.update(before)
        if trainer is not None and loggers:
            trainer.loggers = loggers


def _log_nothing(*_: Any, **__: Any) -> None:
    """In the place of a method that logs."""


def _plain_attributes(module: nn.Module) -> list[Any]:
    """What the module holds beside its tensors and modules, but for its Trainer."""
    return [value for name, value in vars(module).items() if not name.startswith("_")]
