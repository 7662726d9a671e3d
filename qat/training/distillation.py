"""Distillation: the quantized model also follows the predictions of the full-precision model that it was made of."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from spectra.backend.errors import InputError

IGNORED = -100  # a label that no loss counts, as in transformers


@dataclass(frozen=True)
class DistillationConfig:
    """How much of the training loss is distillation (Hinton, Vinyals and Dean, arXiv 1503.02531, section 2).

    loss = (1 - weight) cross-entropy + weight T^2 KL(teacher || student) + hidden H

    KL is the mean over the predicted tokens of the divergence between softmax(logits / T) of teacher and student. The
    factor T^2 keeps the gradients at one size for every temperature T. H is the mean over layers and tokens of
    ||h_student - h_teacher||^2 / width, h the output of a decoder layer.

    Args:
        weight: The share of the divergence, 0 to 1; the cross-entropy with the text has the rest.
        temperature: T, above 0.
        hidden: The factor of the squared error of hidden states; 0 leaves it out.

    Raises:
        InputError: A value is out of range.
    """

    weight: float = 0.5
    temperature: float = 1.0
    hidden: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.weight <= 1:
            raise InputError(f"the weight of distillation lies between 0 and 1, got {self.weight}: try 0.5")
        if not 0 < self.temperature < math.inf:
            raise InputError(f"the temperature of distillation is a number above 0, got {self.temperature}: try 1")
        if not 0 <= self.hidden < math.inf:
            raise InputError(f"the factor of hidden states is 0 or more, got {self.hidden}: 0 leaves them out")

    def in_words(self) -> str:
        """The training loss in words."""
        parts = [
            f"{1 - self.weight:g} x cross-entropy",
            f"{self.weight:g} x KL(teacher || student) at temperature {self.temperature:g}",
        ]
        return " + ".join(parts + [f"{self.hidden:g} x squared error of hidden states"] * (self.hidden > 0))


class Distillation:
    """The loss of a student on a batch, see `DistillationConfig`: a `loss` of `qat.training.step.TrainingStep`.

    The teacher is put in evaluation mode and computes without gradients.

    Args:
        teacher: A causal language model of transformers with the student's vocabulary and, for hidden states, its
            layers. It must share no parameter with the student.
        config: The settings.
    """

    def __init__(self, teacher: nn.Module, config: DistillationConfig | None = None) -> None:
        self.teacher = teacher.eval().requires_grad_(False)
        self.config = config or DistillationConfig()

    def __call__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor:
        """The mean loss of a batch.

        Args:
            model: The student.
            inputs: `input_ids` and `labels`, (sequences, length), as the student takes them.

        Returns:
            The loss, a scalar.

        Raises:
            InputError: The teacher knows other tokens or has other layers.
        """
        options: dict[str, Any] = {"use_cache": False, "output_hidden_states": self.config.hidden > 0}
        with torch.no_grad():
            wanted = self.teacher(**{name: value for name, value in inputs.items() if name != "labels"}, **options)
        found = model(**inputs, **options)
        if found.logits.shape != wanted.logits.shape:
            raise InputError(
                f"the teacher knows {wanted.logits.shape[-1]} tokens and the student {found.logits.shape[-1]}: "
                "distil from the model that the student was made of"
            )
        counted = inputs["labels"][:, 1:] != IGNORED
        weight, temperature = self.config.weight, self.config.temperature
        loss = (1 - weight) * found.loss if weight < 1 else torch.zeros_like(found.loss)
        if weight > 0:
            each = divergence(wanted.logits[:, :-1], found.logits[:, :-1], temperature=temperature)
            loss = loss + weight * temperature**2 * _mean(each, counted)
        if self.config.hidden > 0:
            error = _hidden_error(found.hidden_states, wanted.hidden_states, inputs["labels"])
            loss = loss + self.config.hidden * error
        return loss


def divergence(teacher: Tensor, student: Tensor, *, temperature: float = 1.0) -> Tensor:
    """KL(p || q) = sum_i p_i (log p_i - log q_i), with p = softmax(teacher / T) and q = softmax(student / T).

    Args:
        teacher: Logits, (..., tokens of the vocabulary).
        student: Logits of the same shape.
        temperature: T.

    Returns:
        (...), in nats, in float32 or wider.
    """
    wider = torch.promote_types(student.dtype, torch.float32)
    log_p, log_q = ((logits.to(wider) / temperature).log_softmax(-1) for logits in (teacher, student))
    return functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def _mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over the counted tokens."""
    return (values * counted).sum() / counted.sum()


def _hidden_error(student: tuple[Tensor, ...], teacher: tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """H of `DistillationConfig`, over the outputs of the layers; the first entry is that of the embeddings."""
    if len(student) != len(teacher) or student[-1].shape != teacher[-1].shape:
        raise InputError(
            f"the teacher has {len(teacher) - 1} layers and the student {len(student) - 1}, of a width of "
            f"{teacher[-1].shape[-1]} and {student[-1].shape[-1]}: set the factor of hidden states to 0"
        )
    pairs = list(zip(student, teacher, strict=True))[1:]
    counted = labels != IGNORED
    errors = [_mean((one.float() - other.float()).square().mean(-1), counted) for one, other in pairs]
    return torch.stack(errors).mean()
