"""Weight noise for all layers of a model, drawn at once before a forward pass.

A compiled kernel draws each normal number with ten rounds of a hash function, and keeps it for the backward pass. One
call of torch's own kernel draws the same quantity several times faster. So a compiled step reads noise that was drawn
before it, and neither draws nor keeps any.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qat.layers.linear import QuantLayer, quant_layers

ALIGNED = 64  # numbers; compiled code copies inputs that begin at an odd place


class DrawnNoise:
    """Standard normal numbers for every layer that trains with noise, in one piece of memory.

    Args:
        model: A model; without quantized layers, or without noise, nothing is drawn and no memory is used.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [layer for _, layer in quant_layers(model)]
        self._drawn: list[QuantLayer] = []
        self._memory: list[Tensor] = []

    @torch.no_grad()
    def draw(self) -> None:
        """Draw anew, for the layers in train mode whose `noise_sigma` is above 0."""
        noisy = [layer for layer in self._layers if layer.training and layer.noise_sigma > 0]
        if [id(layer) for layer in noisy] != [id(layer) for layer in self._drawn]:
            self.clear()
            self._allocate(noisy)
        for memory in self._memory:
            memory.normal_()

    def _allocate(self, layers: list[QuantLayer]) -> None:
        """One piece of memory for each device and dtype, and each layer's part of it."""
        kinds = {(layer.weight.device, layer.weight.dtype) for layer in layers}
        for device, dtype in sorted(kinds, key=str):
            alike = [layer for layer in layers if (layer.weight.device, layer.weight.dtype) == (device, dtype)]
            sizes = [-(-layer.weight.numel() // ALIGNED) * ALIGNED for layer in alike]
            memory = torch.empty(sum(sizes), device=device, dtype=dtype)
            for layer, part in zip(alike, memory.split(sizes), strict=True):
                shape = layer.rows().shape
                layer.drawn_noise = part[: shape.numel()].view(shape)
            self._memory.append(memory)
        self._drawn = layers

    def clear(self) -> None:
        """Free the memory; layers draw their own noise again."""
        for layer in self._drawn:
            layer.drawn_noise = None
        self._drawn, self._memory = [], []
