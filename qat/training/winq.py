"""WinQ: train with noise on the weights, and at intervals reset them toward the quantization grid.

Source of the method: WinQ, arXiv 2605.17471. `WinQ` is for any training loop; `qat.WinQCallback` is for the Hugging
Face Trainer.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers.config import is_real
from qat.layers.linear import QuantLayer, distinct_quant_layers, quant_layers
from spectra.backend.errors import InputError


@dataclass(frozen=True)
class WinQConfig:
    """When WinQ resets the weights, how far, and with how much noise it trains (arXiv 2605.17471).

    Args:
        every: A whole number of training steps: resets at each multiple. Or a fraction of the run strictly between 0
            and 1: 0.25 resets at 1/4, 1/2 and 3/4.
        alpha: How far a reset moves the weights toward Q(W): 0 not at all, 1 onto the grid.
        sigma: Standard deviation of the weight noise, in the unit of the weights.
        noise_scales: Whether learned scales get the same noise.

    Raises:
        InputError: A value is out of range.
    """

    every: float = 0.25
    alpha: float = 0.4
    sigma: float = 1e-3
    noise_scales: bool = False

    def __post_init__(self) -> None:
        check_every(self.every)
        if not is_real(self.alpha) or not 0 <= self.alpha <= 1:
            raise InputError(f"alpha must lie between 0 (no reset) and 1 (onto the grid); got {self.alpha!r}")
        if not is_real(self.sigma) or not 0 <= self.sigma < math.inf:
            raise InputError(f"sigma must be 0 (no noise) or a finite positive number; got {self.sigma!r}")
        if not isinstance(self.noise_scales, bool):
            raise InputError(f"noise_scales must be True or False; got {self.noise_scales!r}")


def check_every(every: Any) -> None:
    """Check the interval between resets.

    Args:
        every: What a user gave.

    Raises:
        InputError: It is neither a whole number from 1 nor a fraction strictly between 0 and 1.
    """
    whole = isinstance(every, Integral) and not isinstance(every, bool) and int(every) >= 1
    fraction = is_real(every) and not isinstance(every, Integral) and 0 < every < 1
    if not (whole or fraction):
        raise InputError(
            "every must be a whole number of steps, 1 or more, or a fraction of the run between 0 and 1; "
            f"got {every!r}: use every=1000 for steps or every=0.25 for quarters"
        )


# "paper" is the setting in the paper's text. "released" is what the released code computes: it writes the reset as
# a W + (1 - a) Q(W) with a = 0.2, so alpha, the factor of Q(W), is 0.8. It also adds the noise to the scales.
PRESETS = {
    "paper": WinQConfig(every=0.25, alpha=0.4, sigma=1e-3),
    "released": WinQConfig(every=0.25, alpha=0.8, sigma=1e-3, noise_scales=True),
}

AroundReset = Callable[[str, int], None]


@torch.no_grad()
def interpolate_(model: nn.Module, *, alpha: float) -> None:
    """Move the latent weights toward the grid, in place: W <- (1 - alpha) W + alpha Q(W) (WinQ, arXiv 2605.17471).

    With learned scales no code changes, and the loss stays the same, bit for bit. Gradients and optimizer state are not
    changed. Tied weights move once.

    Args:
        model: A quantized model.
        alpha: How far to move: 0 not at all, 1 to Q(W) exactly.

    Raises:
        InputError: Alpha lies outside [0, 1], or the model has no quantized layers.
    """
    WinQConfig(alpha=alpha)
    for layer in _layers(model, distinct=True):
        layer.weight.copy_(_between(layer.weight, layer.quantized_weight(), alpha))


def _between(start: Tensor, end: Tensor, share: float) -> Tensor:
    """The point start + share (end - start), which rounding error never moves outside [start, end]; `end` at share 1.

    A point outside, even by one unit in the last place, could cross a threshold and change a code.
    """
    if share < 0.5:
        return start + share * (end - start)
    return end - (1 - share) * (end - start)


def reset_steps(every: float, total_steps: int) -> tuple[int, ...]:
    """The training steps after which WinQ resets the weights.

    Args:
        every: A whole number: each multiple of it, the last step included if it is one. A fraction: at every, 2 every,
            ... of the run, rounded to a step, but not at the end, where no training follows.
        total_steps: Training steps of the run.

    Returns:
        Ascending steps; 1 is the first training step.

    Raises:
        InputError: `every` is out of range.

    Example:
        >>> reset_steps(0.25, 100)
        (25, 50, 75)
    """
    check_every(every)
    if isinstance(every, Integral):
        return tuple(range(int(every), total_steps + 1, int(every)))
    if every * total_steps <= 1:
        return tuple(range(1, total_steps))
    count = int((1 - 1e-9) / every)
    steps = {int(index * every * total_steps + 0.5) for index in range(1, count + 1)}
    return tuple(sorted(step for step in steps if 0 < step < total_steps))


class WinQ:
    """Weight noise and resets for any training loop.

    In a loop of your own::

        winq = WinQ(PRESETS["paper"])
        winq.start(model, total_steps)
        try:
            for step in range(1, total_steps + 1):
                ...  # forward, backward, optimizer step
                winq.step(step)
        finally:
            winq.stop()

    Args:
        config: The settings; None for the defaults.
        around_reset: Called as around_reset("before-reset", step) and around_reset("after-reset", step).
    """

    def __init__(self, config: WinQConfig | None = None, *, around_reset: AroundReset | None = None) -> None:
        self.config = config or WinQConfig()
        self.around_reset = around_reset
        self.resets: list[int] = []
        self._model: nn.Module | None = None
        self._due: frozenset[int] = frozenset()
        self._before: list[tuple[QuantLayer, float, bool]] = []

    def start(self, model: nn.Module, total_steps: int) -> None:
        """Add the weight noise and plan the resets.

        Args:
            model: A quantized model.
            total_steps: Training steps of the run.

        Raises:
            InputError: The model has no quantized layers.
        """
        self.stop()
        layers = _layers(model)
        self._due = frozenset(reset_steps(self.config.every, total_steps))
        self._model, self.resets = model, []
        self._before = [(layer, layer.noise_sigma, layer.noise_scales) for layer in layers]
        for layer in layers:
            layer.noise_sigma, layer.noise_scales = self.config.sigma, self.config.noise_scales

    def step(self, step: int) -> bool:
        """Reset the weights if a reset is due. Call it after every optimizer step.

        Args:
            step: The number of the training step; 1 is the first.

        Returns:
            Whether the weights were reset.

        Raises:
            InputError: `start` was not called.
        """
        if self._model is None:
            raise InputError("WinQ.step was called before WinQ.start(model, total_steps): start it first")
        if step not in self._due:
            return False
        self._announce("before-reset", step)
        interpolate_(self._model, alpha=self.config.alpha)
        self.resets.append(step)
        self._announce("after-reset", step)
        return True

    def stop(self) -> None:
        """Remove the weight noise. A second call does nothing."""
        for layer, sigma, noise_scales in self._before:
            layer.noise_sigma, layer.noise_scales = sigma, noise_scales
        self._before, self._model = [], None

    def _announce(self, event: str, step: int) -> None:
        if self.around_reset is not None:
            self.around_reset(event, step)


def _layers(model: nn.Module, *, distinct: bool = False) -> list[QuantLayer]:
    layers = [layer for _, layer in (distinct_quant_layers(model) if distinct else quant_layers(model))]
    if not layers:
        raise InputError("the model has no quantized layers: call qat.quantize_model(model, config) first")
    return layers
