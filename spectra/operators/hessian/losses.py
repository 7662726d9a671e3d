"""From a model and a batch to one loss: which form a loss function has, and what the default loss is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from spectra.backend.errors import InputError, first_line

Loss = Callable[..., torch.Tensor]
FIRST_PARAMETER_IS_THE_MODEL = ("model", "module", "net", "network")
# What a model or a loss may raise when it is called in a form that it does not have. Memory errors pass.
CALL_ERRORS = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, AssertionError)


class BatchLoss:
    """The loss of one batch, as a scalar with its graph.

    A loss function can be called in several forms. The first one that returns a single number is kept:

    * (outputs, targets) for a pair, (outputs, batch) for a mapping;
    * (logits, targets): the logits of an output that is a tuple, a mapping or a Hugging Face output;
    * (model, batch), tried first where the function's first parameter is called `model`.

    Args:
        model: the model.
        loss: the loss function or module. By default a Hugging Face model's own loss for a mapping, and for a pair
            cross-entropy for integer and mean squared error for floating-point targets.
    """

    def __init__(self, model: nn.Module, loss: Loss | None):
        self.model, self.loss = model, loss
        self.notes: list[str] = []
        signature = inspect.signature(model.forward).parameters
        self._accepted = set(signature)
        self._accepts_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in signature.values())
        self._form: Callable[[Any], torch.Tensor] | None = None

    def __call__(self, batch: Any) -> torch.Tensor:
        """The loss of a batch.

        Args:
            batch: a mapping, or inputs and targets.

        Returns:
            The loss, a scalar with its graph.

        Raises:
            InputError: where the model or the loss cannot be called on the batch, or the result is not one number.
        """
        if self._form is not None:
            return self._form(batch)
        failures = []
        for name, form in self._forms(batch):
            try:
                value = form(batch)
            except torch.OutOfMemoryError:
                raise
            except InputError:
                raise
            except CALL_ERRORS as error:
                failures.append((name, error))
                continue
            if not isinstance(value, torch.Tensor):
                failures.append((name, TypeError(f"it returned {type(value).__name__}, a tensor is expected")))
                continue
            if value.numel() != 1:
                raise InputError(f"the loss must be one number, got shape {tuple(value.shape)}; reduce it to a mean")
            self._form = form
            return value
        tried = "; ".join(f"{name}: {first_line(error)}" for name, error in failures)
        raise InputError(f"the loss of a batch cannot be computed ({tried}): check the batch and loss=") from failures[
            0
        ][1]

    def _forms(self, batch: Any) -> list[tuple[str, Callable[[Any], torch.Tensor]]]:
        if self.loss is None:
            return [
                ("the model's own loss", self._own_loss)
                if isinstance(batch, Mapping)
                else ("model(inputs)", self._default)
            ]
        model_and_batch = ("loss(model, batch)", lambda batch: self._given(self.model, batch))
        if isinstance(batch, Mapping):
            forms = [("loss(outputs, batch)", lambda batch: self._given(self._outputs(batch), batch))]
            if "labels" in batch:
                forms.append(
                    (
                        "loss(logits, labels)",
                        lambda batch: self._given(logits_of(self._outputs(batch)), batch["labels"]),
                    )
                )
        elif isinstance(batch, tuple) and len(batch) == 2:
            forms = [
                ("loss(outputs, targets)", lambda batch: self._given(self._outputs(batch), batch[1])),
                ("loss(logits, targets)", lambda batch: self._given(logits_of(self._outputs(batch)), batch[1])),
            ]
        else:
            return [model_and_batch]
        first = _first_parameter(self.loss)
        return [model_and_batch, *forms] if first in FIRST_PARAMETER_IS_THE_MODEL else [*forms, model_and_batch]

    def _given(self, *arguments: Any) -> torch.Tensor:
        assert self.loss is not None
        return self.loss(*arguments)

    def _outputs(self, batch: Any) -> Any:
        if isinstance(batch, Mapping):
            return self.model(**self._arguments(batch))
        inputs = batch[0]
        if isinstance(inputs, Mapping):
            return self.model(**inputs)
        return self.model(*inputs) if isinstance(inputs, tuple | list) else self.model(inputs)

    def _arguments(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What of the batch the model takes. Other members are left out and noted, as the Hugging Face Trainer does."""
        taken = dict(batch)
        if not self._accepts_all:
            unknown = sorted(set(taken) - self._accepted)
            taken = {key: value for key, value in taken.items() if key in self._accepted}
            note = f"members of the batches that the model does not take were left out: {', '.join(unknown)}"
            if unknown and note not in self.notes:
                self.notes.append(note)
        if "use_cache" in self._accepted and "use_cache" not in taken:
            taken["use_cache"] = False
        return taken

    def _own_loss(self, batch: Mapping[str, Any]) -> torch.Tensor:
        output = self._outputs(batch)
        value = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
        if value is None:
            raise InputError(
                f"{type(self.model).__name__} returned no loss for a batch with {sorted(batch)}; "
                "add 'labels' to the batch or pass loss=..."
            )
        return value

    def _default(self, batch: tuple[Any, Any]) -> torch.Tensor:
        output = self._outputs(batch)
        return default_loss(
            logits_of(output), batch[1], classes_last=not isinstance(output, torch.Tensor | tuple | list)
        )


def logits_of(output: Any) -> torch.Tensor:
    """The logits of what a model returned: the tensor itself, the member `logits`, or the first tensor of a tuple.

    Args:
        output: what the model returned.

    Returns:
        The logits.

    Raises:
        InputError: where there is none.
    """
    if isinstance(output, torch.Tensor):
        return output
    if hasattr(output, "logits"):
        return output.logits
    if isinstance(output, Mapping):
        for key in ("logits", "output", "outputs", "out", "prediction", "predictions"):
            if isinstance(output.get(key), torch.Tensor):
                return output[key]
        tensors = [value for value in output.values() if isinstance(value, torch.Tensor)]
        if len(tensors) == 1:
            return tensors[0]
    if isinstance(output, tuple | list) and output and isinstance(output[0], torch.Tensor):
        return output[0]
    named = f" with {sorted(map(str, output))}" if isinstance(output, Mapping) else ""
    raise InputError(
        f"a tensor of outputs is expected from the model, got {type(output).__name__}{named}; pass loss=lambda model, "
        "batch: ... that computes the loss"
    )


def default_loss(logits: torch.Tensor, targets: Any, *, classes_last: bool = False) -> torch.Tensor:
    """Cross-entropy for integer targets, mean squared error for floating-point targets of the same shape.

    Args:
        logits: (rows, ..., classes) or (rows, classes, ...).
        targets: the shape of the logits without the classes, or for floating-point targets the shape of the logits.
        classes_last: whether the last axis is known to hold the classes, as in language models.

    Returns:
        The mean loss, a scalar.

    Raises:
        InputError: for shapes that do not fit, or fit in both layouts.
    """
    if not isinstance(targets, torch.Tensor):
        raise InputError(f"targets must be a tensor, got {type(targets).__name__}; pass loss=... for others")
    shape, wanted = tuple(logits.shape), tuple(targets.shape)
    if targets.is_floating_point():
        if shape != wanted:
            raise InputError(
                f"outputs {shape} and floating-point targets {wanted} differ in shape, and a mean squared error would "
                "broadcast them: reshape one, or pass loss=..."
            )
        return functional.mse_loss(logits, targets)
    last = wanted == shape[:-1]
    second = len(shape) > 1 and wanted == shape[:1] + shape[2:]
    if last and second and len(shape) > 2 and not classes_last:
        raise InputError(
            f"outputs {shape} and targets {wanted} fit with the classes on the second axis and on the last: which is "
            "meant cannot be told, so pass loss=..., such as torch.nn.CrossEntropyLoss() for the second"
        )
    if last and shape:
        return functional.cross_entropy(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1))
    if second:
        return functional.cross_entropy(logits, targets)
    raise InputError(
        f"outputs {shape} and integer targets {wanted} do not fit a cross-entropy, which expects targets of the "
        "shape of the outputs without the classes; pass loss=..."
    )


def counted(loss: Loss | None, targets: Any, *, rows: int) -> float:
    """How many terms a mean loss averages over a batch, with their weights.

    Integer targets other than the loss's ignore_index count one each, or their class weight; floating-point targets
    count each entry, and class probabilities each row of them.

    Args:
        loss: the loss module, whose ignore_index and class weights are read.
        targets: the targets.
        rows: of the batch, which count where the targets are no tensor.

    Returns:
        The number of terms, or the sum of their weights.
    """
    if not isinstance(targets, torch.Tensor):
        return float(rows)
    if targets.is_floating_point():
        if isinstance(loss, nn.CrossEntropyLoss) and targets.ndim > 1:
            return targets.numel() / targets.shape[1]
        return float(targets.numel()) if targets.ndim else 1.0
    kept = targets[targets != getattr(loss, "ignore_index", -100)]
    weight = loss.weight if isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss) else None
    if weight is not None and kept.numel():
        return float(weight.detach().double().cpu()[kept.cpu()].sum())
    return float(kept.numel())


def _first_parameter(function: Any) -> str:
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return ""
    return names[0] if names else ""
