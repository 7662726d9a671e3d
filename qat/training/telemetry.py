"""What quantized weights do during training, in four numbers."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.layers.linear import distinct_quant_layers
from spectra.backend.errors import InputError


class Telemetry:
    """Numbers over all quantized weights of a model, tied ones once. Keeps an int8 copy of their codes.

    Raises InputError where the model has no quantized layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for _, layer in distinct_quant_layers(model)]
        if not self._layers:
            raise InputError("the model has no quantized layers: call qat.quantize_model(model, config) first")
        with torch.no_grad():
            self._codes = [layer.codes() for layer in self._layers]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """The numbers now; a call changes nothing but the codes that the next one compares with.

        flip_rate: share of weights whose code changed since the previous call (since construction, at the first).
        distance_to_grid: ||W - Q(W)|| / ||W||. clipped_share: share of weights outside the clip bounds.
        relative_gradient_norm: ||grad|| / ||W|| over the weights, left out unless all have a gradient: read it
        between the backward pass and `zero_grad`.
        """
        flipped, clipped, distance, size, gradient = [], [], [], [], []
        for index, layer in enumerate(self._layers):
            codes = layer.codes()
            flipped.append((codes != self._codes[index]).sum())
            self._codes[index] = codes
            clipped.append((~layer.mask()).sum())
            distance.append(_squares(layer.weight - layer.quantized_weight()))
            size.append(_squares(layer.weight))
            if layer.weight.grad is not None:
                gradient.append(_squares(layer.weight.grad))

        count = sum(layer.weight.numel() for layer in self._layers)
        norm = _total(size) ** 0.5
        numbers = {
            "flip_rate": _total(flipped) / count,
            "distance_to_grid": _ratio(_total(distance) ** 0.5, norm),
            "clipped_share": _total(clipped) / count,
        }
        if len(gradient) == len(self._layers):
            numbers["relative_gradient_norm"] = _ratio(_total(gradient) ** 0.5, norm)
        return numbers


def _squares(tensor: Tensor) -> Tensor:
    """The sum of squares in float64: a float32 norm of ten million entries is off in the fourth digit."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _total(terms: list[Tensor]) -> float:
    """One transfer from the device for each device there is, not one a layer."""
    return float(sum(term.item() for term in terms)) if len({t.device for t in terms}) > 1 else float(sum(terms))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else 0.0
