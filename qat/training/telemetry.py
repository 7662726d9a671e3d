"""Telemetry of quantized weights in training: flip rate, distance to the grid, clipped share, lost updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qat.layers.fast_path import SCHEMES
from qat.layers.linear import QuantLayer, distinct_quant_layers
from spectra.backend.errors import InputError, first_line

NARROW = (torch.bfloat16, torch.float16)
MEASURED_TOGETHER = 2**24  # weights at most, so that the copies stay small beside a model


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
        self._before: dict[int, Tensor] = {}
        with torch.no_grad():
            self._codes = [layer.codes() for layer in self._layers]
        self._groups = _alike(self._layers)

    @torch.no_grad()
    def before_update(self) -> None:
        """Keep the latent weights that have 16 bits, so that `measure` can say how many updates were lost."""
        self._before = {
            index: layer.weight.clone() for index, layer in enumerate(self._layers) if layer.weight.dtype in NARROW
        }

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Measure the current weights. The codes are kept, for the flip rate of the next call.

        It waits for the device once, for one small tensor.

        Returns:
            `flip_rate`: the share of weights whose code changed since the last call, or since construction.
            `distance_to_grid`: ||W - Q(W)|| / ||W||.
            `clipped_share`: the share of weights outside the clip bounds.
            `relative_gradient_norm`: ||gradient|| / ||W||. It is there only if all weights have a gradient, that is
            between the backward pass and `zero_grad`.
            `lost_updates`: after `before_update`, where latent weights have 16 bits: the share of those with a gradient
            that the update did not change.
        """
        sums: dict[str, list[Tensor]] = {}
        for group in self._groups:
            for name, term in (self._measure_alike(group) if len(group) > 1 else self._measure_one(group[0])).items():
                sums.setdefault(name, []).append(term)
        self._before = {}

        total = _totals(sums)
        count = sum(layer.weight.numel() for layer in self._layers)
        norm = total["size"] ** 0.5
        numbers = {
            "flip_rate": total["flipped"] / count,
            "distance_to_grid": _ratio(total["distance"] ** 0.5, norm),
            "clipped_share": total["clipped"] / count,
        }
        if len(sums.get("gradient", [])) == len(self._groups):
            numbers["relative_gradient_norm"] = _ratio(total["gradient"] ** 0.5, norm)
        if "updates" in total:
            numbers["lost_updates"] = _ratio(total["lost"], total["updates"])
        return numbers

    def _measure_one(self, index: int) -> dict[str, Tensor]:
        """The sums over the weights of one layer."""
        layer = self._layers[index]
        codes, weight, grad = layer.codes(), layer.weight, layer.weight.grad
        terms = _sums(codes, self._codes[index], layer.mask(), weight, layer.quantized_weight())
        self._codes[index] = codes
        if grad is not None:
            terms["gradient"] = _squares(grad)
            if index in self._before:
                moved = grad != 0
                terms["updates"] = moved.sum()
                terms["lost"] = (moved & (weight == self._before[index])).sum()
        return terms

    def _measure_alike(self, group: list[int]) -> dict[str, Tensor]:
        """The sums over the weights of several layers, whose rows are quantized as one matrix."""
        layers = [self._layers[index] for index in group]
        weight, scale = torch.cat([layer.weight for layer in layers]), torch.cat([layer.scale for layer in layers])
        quantizer = layers[0].quantizer
        codes = quantizer.codes(weight, scale)
        before = torch.cat([self._codes[index] for index in group])
        terms = _sums(codes, before, quantizer.mask(weight, scale), weight, quantizer.dequantize(codes, scale))
        for index, part in zip(group, codes.split([len(layer.weight) for layer in layers]), strict=True):
            self._codes[index] = part
        grads = [layer.weight.grad for layer in layers if layer.weight.grad is not None]
        if len(grads) == len(layers):
            terms["gradient"] = _squares(torch.cat(grads))
        return terms

    def save_state(self, path: Path) -> None:
        """Write the codes that the next flip rate is counted from, for a checkpoint.

        Args:
            path: A safetensors file to write.
        """
        save_file(
            {str(index): codes.clone(memory_format=torch.contiguous_format) for index, codes in enumerate(self._codes)},
            path,
        )

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
        pairs = [(codes.pop(str(index), None), own) for index, own in enumerate(self._codes)]
        if codes or any(saved is None or saved.shape != own.shape for saved, own in pairs):
            raise InputError(f"{path} holds the codes of other layers: delete its folder")
        self._codes = [saved.to(own.device, own.dtype) for saved, own in pairs if saved is not None]


def _alike(layers: list[QuantLayer]) -> list[list[int]]:
    """Layers whose rows can be measured as those of one matrix, by index; each other layer alone.

    The rows of a matrix are quantized independently of each other by the schemes that `fast_path` knows. On a GPU,
    hundreds of small layers take ten times as long one by one.
    """
    groups: list[list[int]] = []
    open_groups: dict[Any, tuple[list[int], int]] = {}
    for index, layer in enumerate(layers):
        weight, quantizer = layer.weight, layer.quantizer
        alone = layer.transposed or type(quantizer) not in SCHEMES or layer.scale.shape != (len(weight), 1)
        if alone or weight.dtype in NARROW:
            groups.append([index])
            continue
        kind = (type(quantizer), quantizer.bits, weight.shape[1], weight.device, weight.dtype)
        group, size = open_groups.get(kind, ([], 0))
        if not group or size + weight.numel() > MEASURED_TOGETHER:
            group, size = [], 0
            groups.append(group)
        group.append(index)
        open_groups[kind] = group, size + weight.numel()
    return groups


def _sums(codes: Tensor, before: Tensor, mask: Tensor, weight: Tensor, quantized: Tensor) -> dict[str, Tensor]:
    return {
        "flipped": (codes != before).sum(),
        "clipped": mask.logical_not().sum(),
        "distance": _squares(weight - quantized),
        "size": _squares(weight),
    }


def _squares(tensor: Tensor) -> Tensor:
    """The sum of squares, in float64: a float32 norm of ten million entries has an error in the fourth digit."""
    return torch.linalg.vector_norm(tensor, dtype=torch.float64).square()


def _totals(sums: dict[str, list[Tensor]]) -> dict[str, float]:
    """The sum of each list. Terms of one device are added there; each device's sums are copied to the host at once."""
    total = dict.fromkeys(sums, 0.0)
    for device in {term.device for terms in sums.values() for term in terms}:
        here = {name: [term for term in terms if term.device == device] for name, terms in sums.items()}
        added = [torch.stack(terms).double().sum() for terms in here.values() if terms]
        for name, value in zip((n for n, terms in here.items() if terms), torch.stack(added).tolist(), strict=True):
            total[name] += value
    return total


def _ratio(part: float, whole: float) -> float:
    """The quotient part / whole, 0 where the whole is 0."""
    return part / whole if whole > 0 else 0.0
