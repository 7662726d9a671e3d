"""Telemetry of quantized weights in training: flip rate, distance to the grid, clipped share, gradient norm."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.layers.linear import distinct_quant_layers
from spectra.backend.errors import InputError, first_line


class Telemetry:
    """Measures all quantized weights of a model, tied ones once. It keeps an int8 copy of their codes.

    Args:
        model: A quantized model.

    Raises:
        InputError: The model has no quantized layers.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for _, layer in distinct_quant_layers(model)]
        if not self._layers:
            raise InputError("the model has no quantized layers: call qat.quantize_model(model, config) first")
        with torch.no_grad():
            self._codes = [layer.codes() for layer in self._layers]

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure the current weights. The codes are kept, for the flip rate of the next call.

        Returns:
            `flip_rate`: the share of weights whose code changed since the last call, or since construction.
            `distance_to_grid`: ||W - Q(W)|| / ||W||.
            `clipped_share`: the share of weights outside the clip bounds.
            `relative_gradient_norm`: ||gradient|| / ||W||. It is there only if all weights have a gradient, that is
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

    def save_state(self, path: Path) -> None:
        """Write the codes that the next flip rate is counted from, for a checkpoint.

        Args:
            path: A safetensors file to write.
        """
        save_file({str(index): codes.contiguous() for index, codes in enumerate(self._codes)}, path)

    def load_state(self, path: Path) -> None:
        """Take over the codes of a checkpoint.

        Args:
            path: A file of `save_state`.

        Raises:
            InputError: It cannot be read, or belongs to other layers.
        """
        try:
            codes = load_file(path)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({first_line(error)}): delete its folder") from None
        saved = [codes.get(str(index)) for index in range(len(self._codes))]
        if len(codes) != len(saved) or any(s is None or s.shape != c.shape for s, c in zip(saved, self._codes, strict=True)):
            raise InputError(f"{path} holds the codes of other layers: delete its folder")
        self._codes = [s.to(c.device, c.dtype) for s, c in zip(saved, self._codes, strict=True) if s is not None]


def _squares(tensor: Tensor) -> Tensor:
    """The sum of squares, in float64: a float32 norm of ten million entries has an error in the fourth digit."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _total(terms: list[Tensor]) -> float:
    """The sum as a number. Where all terms are on one device, they are added there and copied to the host once."""
    return float(sum(term.item() for term in terms)) if len({t.device for t in terms}) > 1 else float(sum(terms))


def _ratio(part: float, whole: float) -> float:
    """The quotient part / whole, 0 where the whole is 0."""
    return part / whole if whole > 0 else 0.0
