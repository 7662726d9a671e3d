"""Which parameters, batches and Hessian an operator is about, and whether its numbers can be relied on."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from spectra.estimates.origin import Origin
from spectra.operators.base import LinearOperator
from spectra.operators.blocks import BlockOperator
from spectra.operators.derived import DeflatedOperator, DifferenceOperator, MeanOperator
from spectra.operators.hessian.batches import contents_of

SAMPLED = 1 << 16  # entries of each tensor of a batch that are looked at


def origin_of(op: LinearOperator) -> Origin:
    """What is known of an operator. It is verified by its first product, so ask after that.

    Args:
        op: The operator; others inside of it are looked at too.

    Returns:
        The origin, with empty texts for what an operator such as a matrix does not know.
    """
    member = _members(op)[0]
    space, objective = getattr(op, "space", None) or getattr(member, "space", None), getattr(member, "objective", None)
    training = getattr(member, "training", None)
    return Origin(
        parameters=_digits(zip(space.names, map(tuple, space.shapes), strict=True)) if space is not None else "",
        batches=_digits(map(_sampled, contents_of(objective.batches))) if objective is not None else "",
        mode=_mode(op, member),
        training="" if training is None else "training" if training else "evaluation",
        unverified=unverified(op),
    )


def _mode(op: LinearOperator, member: LinearOperator) -> str:
    """Which Hessian it is; of a difference both."""
    inner = op.inner if isinstance(op, BlockOperator) else op
    if isinstance(inner, DifferenceOperator):
        return " - ".join(str(getattr(each, "mode", "")) for each in inner.operators)
    return getattr(member, "mode", "")


def unverified(op: LinearOperator) -> str:
    """Why the operator's numbers cannot be relied on, or those of an operator inside of it; "" if nothing is known."""
    return next((member.unverified for member in _members(op) if member.unverified), "")


def _members(op: LinearOperator) -> list[LinearOperator]:
    """The operators that an operator is made of; itself where it is made of none."""
    if op.unverified:
        return [op]
    if isinstance(op, DeflatedOperator | BlockOperator):
        return _members(op.inner)
    if isinstance(op, MeanOperator | DifferenceOperator):
        return [member for each in op.operators for member in _members(each)]
    return [op]


def _digits(parts: Iterable[Any]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(repr(part).encode())
    return digest.hexdigest()[:16]


def _sampled(content: torch.Tensor | bytes) -> Any:
    """Shape and some of the entries of a tensor, the same in every precision of at least float32."""
    if isinstance(content, bytes):
        return content
    dense = content.detach()
    dense = dense if dense.layout == torch.strided else dense.to_dense()
    flat = dense.reshape(-1)[:: max(dense.numel() // SAMPLED, 1)].cpu()
    values = flat.float() if flat.is_floating_point() else flat
    return tuple(content.shape), np.ascontiguousarray(values.numpy()).tobytes()
