"""PARQ: train in full precision first, and anneal the weights to the quantization grid along the way.

Source of the method: PARQ, arXiv 2503.15748. `PARQ` is for any training loop; `qat.PARQCallback` is for the Hugging
Face Trainer. The annealed weights themselves are in `qat.layers.quantizers.parq`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from qat.layers.bits import is_real
from qat.layers.linear import QuantLayer, quant_layers
from qat.layers.quantizers.parq import PiecewiseAffine
from spectra.backend.errors import InputError


@dataclass(frozen=True)
class PARQConfig:
    """When the annealing begins and ends, and how steep it is in the middle (arXiv 2503.15748).

    Args:
        start: The part of the run that trains in full precision, 0 to 1.
        end: The part of the run after which the weights are on the grid, above `start`, at most 1.
        steepness: Of the sigmoid by which the inverse slope falls, above 0; near 0 it is a straight line.

    Raises:
        InputError: A value is out of range.
    """

    start: float = 0.0
    end: float = 0.9
    steepness: float = 10.0

    def __post_init__(self) -> None:
        if not (is_real(self.start) and is_real(self.end) and 0 <= self.start < self.end <= 1):
            raise InputError(
                "start and end are parts of the run with 0 <= start < end <= 1; "
                f"got start={self.start!r}, end={self.end!r}"
            )
        if not is_real(self.steepness) or not 0 < self.steepness <= 100:
            raise InputError(f"steepness must be above 0, and 100 at most; got {self.steepness!r}")


def inverse_slope(progress: float, config: PARQConfig) -> float:
    """The inverse slope r of the annealed weights at some point of a run.

    r = (f(t) - f(1)) / (f(0) - f(1)), f(t) = 1 / (1 + exp(steepness (t - 1/2))), with t the part of the annealing that
    is done: 1 before the annealing, 0 after it.

    Args:
        progress: The part of the run that is done, 0 to 1.
        config: When to anneal.

    Returns:
        r, 1 to 0.

    Example:
        >>> round(inverse_slope(0.5, PARQConfig(start=0.0, end=1.0)), 6)
        0.5
    """
    done = (progress - config.start) / (config.end - config.start)
    if done <= 0 or done >= 1:
        return 1.0 if done <= 0 else 0.0

    def falling(part: float) -> float:
        return 1 / (1 + math.exp(config.steepness * (part - 0.5)))

    return (falling(done) - falling(1)) / (falling(0) - falling(1))


class PARQ:
    """Anneals the weights of a model that is quantized by "parq", for any training loop.

    In a loop of your own::

        qat.quantize_model(model, qat.QuantConfig(bits=2, quantizer="parq"))
        parq = PARQ()
        parq.start(model, total_steps)
        try:
            for step in range(1, total_steps + 1):
                ...  # forward, backward, optimizer step
                parq.step(step)
        finally:
            parq.stop()

    In train mode the forward pass computes with the annealed weights, in evaluation mode with the grid: a validation
    loss is that of the quantized model. Codes, telemetry, spectra and exports see the grid, too.

    Args:
        config: The settings; None for the defaults.
    """

    def __init__(self, config: PARQConfig | None = None) -> None:
        self.config = config or PARQConfig()
        self._layers: list[QuantLayer] = []
        self._total_steps = 0

    def start(self, model: nn.Module, total_steps: int, *, done: int = 0) -> None:
        """Anneal as far as the first training step asks for.

        Args:
            model: A model that is quantized by "parq".
            total_steps: Training steps of the run.
            done: Training steps that an earlier part of this run has done.

        Raises:
            InputError: No layer of the model is quantized by "parq".
        """
        self.stop()
        layers = [layer for _, layer in quant_layers(model) if isinstance(layer.scheme, PiecewiseAffine)]
        if not layers:
            raise InputError(
                "no layer of the model is quantized by parq: call "
                "qat.quantize_model(model, qat.QuantConfig(quantizer='parq')) first"
            )
        self._layers, self._total_steps = layers, total_steps
        self._set(done)

    def step(self, step: int) -> None:
        """Anneal as far as the next training step asks for. Call it after every optimizer step.

        Args:
            step: The number of the training step that is done; 1 is the first.

        Raises:
            InputError: `start` was not called.
        """
        if not self._layers:
            raise InputError("PARQ.step was called before PARQ.start(model, total_steps): start it first")
        self._set(step)

    def stop(self) -> None:
        """Put the weights on the grid. A second call does nothing."""
        for layer in self._layers:
            _set_inverse_slope(layer, 0.0)
        self._layers = []

    def _set(self, done: int) -> None:
        value = inverse_slope(done / max(self._total_steps, 1), self.config)
        for layer in self._layers:
            _set_inverse_slope(layer, value)


def _set_inverse_slope(layer: QuantLayer, value: float) -> None:
    assert isinstance(layer.scheme, PiecewiseAffine)
    layer.scheme.set_inverse_slope(value, layer.weight.device)
