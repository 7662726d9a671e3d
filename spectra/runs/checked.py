"""The checks of an operator, as a record keeps them, and how a later operator of the same run takes them over."""

from __future__ import annotations

import dataclasses
import math
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spectra.operators.base import HasLoss
from spectra.operators.derived import MeanOperator
from spectra.operators.hessian.operator import HessianOperator
from spectra.operators.hessian.pieces import SUM_TOLERANCE


@dataclass(frozen=True)
class Checked:
    """What was found when the operator of a mode was checked.

    Attributes:
        figures: By name.
        notes: What the checks had to say.
        parts: The model's modules and parameters then. A weight that was replaced is another object.
        states: The dtype of each parameter, and whether it was trained.
    """

    figures: dict[str, float]
    notes: list[str]
    parts: tuple[weakref.ref[Any], ...]
    states: tuple[tuple[torch.dtype, bool], ...]

    @classmethod
    def taken_from(cls, model: nn.Module, figures: dict[str, float], notes: list[str]) -> Checked:
        """What was found, for the parameters and modules that a model has now."""
        return cls(figures, notes, tuple(map(weakref.ref, _parts(model))), _states(model))

    def holds_for(self, model: nn.Module) -> bool:
        """Whether the model still has the parameters and modules that were checked."""
        now = _parts(model)
        same = len(now) == len(self.parts) and all(ref() is part for ref, part in zip(self.parts, now, strict=True))
        return same and self.states == _states(model)


def check(op: HasLoss, model: nn.Module) -> Checked:
    """Check an operator.

    Args:
        op: The operator.
        model: Whose loss it belongs to.

    Returns:
        The figures, for a mean of operators the worst of any member.

    Raises:
        InputError: Where a check fails.
    """
    before = set(op.notes)
    op.loss()  # a HessianOperator checks itself before its first number; what it notes later belongs to one checkpoint
    notes = [note for note in op.notes if note not in before]
    preflight = op.preflight()
    members = _members(op)
    if members:
        figures = {name: _worst([op.checks[name] for op in members if name in op.checks]) for name in _names(members)}
        figures["precision_error"] = preflight.precision_error
    else:
        figures = dataclasses.asdict(preflight)
    return Checked.taken_from(model, figures, notes)


def take_over(op: HasLoss, checked: Checked) -> bool:
    """Let an operator take over the figures of an earlier one of the same run, so that it is not checked again.

    Args:
        op: The operator.
        checked: What was found earlier.

    Returns:
        Whether that is possible: not where the checks also settled what the batches weigh.
    """
    if checked.figures.get("pieces_error", 0.0) > SUM_TOLERANCE:
        return False
    for member in _members(op):
        member.trust({name: value for name, value in checked.figures.items() if name != "precision_error"})
    return True


def _parts(model: nn.Module) -> list[Any]:
    """The modules and parameters of a model."""
    return [*model.modules(), *model.parameters()]


def _states(model: nn.Module) -> tuple[tuple[torch.dtype, bool], ...]:
    """The dtype of each parameter, and whether it is trained."""
    return tuple((p.dtype, p.requires_grad) for p in model.parameters())


def _members(op: Any) -> list[HessianOperator]:
    """The Hessian operators that an operator consists of; none for an operator of another kind."""
    operators = op.operators if isinstance(op, MeanOperator) else [op]
    return list(operators) if all(isinstance(each, HessianOperator) for each in operators) else []


def _names(members: list[HessianOperator]) -> list[str]:
    return list(dict.fromkeys(name for op in members for name in op.checks))


def _worst(figures: list[float]) -> float:
    """The largest; NaN, a check that could not be made, only where none could."""
    return max((figure for figure in figures if not math.isnan(figure)), default=math.nan)
