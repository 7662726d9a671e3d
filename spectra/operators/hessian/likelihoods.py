"""Losses that are negative logarithms of a probability, recognized by their gradient in the outputs.

A loss L = s sum_t l_t over terms t of weight s is known by dL/dz, whoever computes it: s (p - y) with p the softmax or
the sigmoid of the outputs and y the labels, or s c (z - y) for squares. Labels drawn from the model's own distribution
then give further gradients without another call of the loss.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from typing import Protocol

import torch

from spectra.backend.errors import InputError

ONE_HOT = 1e-3  # how far entries of labels may be from 0 and 1, relative to the gradient of one term
CONSTANT = 1e-4  # relative spread up to which the second derivative of a sum of squares is constant


class Likelihood(Protocol):
    """A distribution of labels given the outputs."""

    @property
    def axis(self) -> int:
        """The axis along which the entries of the outputs share a term, counted from the end."""
        ...

    def sample(self, outputs: torch.Tensor, uniform: torch.Generator) -> torch.Tensor:
        """Gradients of the terms l_t in the outputs, for labels drawn from the distribution."""
        ...


@dataclass(frozen=True)
class Categorical:
    """Classes with softmax probabilities along an axis, as in a cross-entropy.

    Attributes:
        axis: The axis of the classes, counted from the end.
        counted: Which terms count, with length 1 along the axis.
    """

    axis: int
    counted: torch.Tensor

    def sample(self, outputs: torch.Tensor, uniform: torch.Generator) -> torch.Tensor:
        """p - y for drawn labels y; zero for terms that do not count."""
        p = outputs.softmax(self.axis).movedim(self.axis, -1)
        drawn = torch.rand(p.shape[:-1], generator=uniform, dtype=torch.float64).to(p)
        labels = (p.cumsum(-1) < drawn[..., None]).sum(-1).clamp(max=p.shape[-1] - 1)
        one_hot = torch.nn.functional.one_hot(labels, p.shape[-1]).to(p)
        return (p - one_hot).movedim(-1, self.axis) * self.counted


@dataclass(frozen=True)
class Bernoulli:
    """Independent bits with sigmoid probabilities, as in a binary cross-entropy.

    Attributes:
        axis: The last axis: its entries share a term.
    """

    axis: int = -1

    def sample(self, outputs: torch.Tensor, uniform: torch.Generator) -> torch.Tensor:
        """p - y for drawn labels y."""
        p = outputs.sigmoid()
        return p - (torch.rand(p.shape, generator=uniform, dtype=torch.float64).to(p) < p).to(p)


@dataclass(frozen=True)
class Gaussian:
    """Normal numbers around the outputs, as in a mean squared error.

    Attributes:
        precision: The second derivative c of a term, one over the variance.
        axis: The last axis: its entries share a term.
    """

    precision: float
    axis: int = -1

    def sample(self, outputs: torch.Tensor, uniform: torch.Generator) -> torch.Tensor:
        """c (z - y) for drawn y: normal numbers of variance c."""
        drawn = torch.randn(outputs.shape, generator=uniform, dtype=torch.float64).to(outputs)
        return math.sqrt(self.precision) * drawn


def recognized(outputs: torch.Tensor, gradient: torch.Tensor, share: float) -> Likelihood | None:
    """The distribution whose negative log-probability a loss is, up to a constant.

    Args:
        outputs: z, with the graph of the gradient.
        gradient: dL/dz, with its graph.
        share: s, the weight of a term in L.

    Returns:
        The distribution, or None for another loss, such as one with class weights or smoothed labels.
    """
    with torch.no_grad():
        z, terms = outputs.detach(), gradient.detach() / share
        for axis in dict.fromkeys((-1, 1 - z.ndim)) if z.ndim > 1 else ():
            labels = z.softmax(axis) - terms
            counted = (terms != 0).any(axis, keepdim=True)
            one_hot = (labels - labels.round()).abs() <= ONE_HOT
            single = labels.round().clamp(0, 1).sum(axis, keepdim=True) == 1
            if z.size(axis) > 1 and counted.any() and bool(((one_hot & single) | ~counted).all()):
                return Categorical(axis, counted.to(z))
        labels = z.sigmoid() - terms
        if bool((torch.minimum(labels.abs(), (labels - 1).abs()) <= ONE_HOT).all()):
            return Bernoulli()
    if not gradient.requires_grad:
        return None
    signs = torch.where(torch.arange(z.numel(), device=z.device).view(z.shape) % 3 > 0, 1.0, -1.0).to(z)
    second = torch.autograd.grad(gradient, outputs, signs, retain_graph=True)[0] * signs / share
    mean = float(second.double().mean())
    constant = mean > 0 and float((second - mean).abs().max()) <= CONSTANT * mean
    return Gaussian(mean) if constant else None


def generator(seed: int, piece: str, draw: int) -> torch.Generator:
    """A generator of random numbers on the CPU, so that every device draws the same labels."""
    digest = hashlib.blake2b(f"{seed}/{piece}/{draw}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def refused(piece: str, kind: str) -> InputError:
    """The error for a loss that is no negative log-probability of a known distribution."""
    return InputError(
        f"the loss of {piece} is not the mean of a cross-entropy, a binary cross-entropy or a squared error over its "
        f"counted terms, so the distribution of labels that kind={kind!r} needs is not known (class weights and "
        "smoothed labels have none): use kind='empirical' or GaussNewtonOperator"
    )
