"""The grid of a quantized layer as small integers times scales, as other programs store it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from qat.layers.linear import QuantLayer
from qat.layers.quantizers.rounding import floor_scale
from spectra.backend.errors import InputError

OFF_GRID = 1e-5  # in units of the grid; rounding errors are below 1e-6


@dataclass(frozen=True)
class Grid:
    """A quantized matrix as integers times scales.

    Attributes:
        integers: (rows, columns), int8.
        scale: (rows, groups): Q(W) = scale * integers in each group of columns.
        levels: Every integer that a weight may be.
    """

    integers: Tensor
    scale: Tensor
    levels: frozenset[int]

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.integers.shape[1] // self.scale.shape[1]

    def scales(self) -> Tensor:
        """The scale of each weight, (rows, columns)."""
        return self.scale.repeat_interleave(self.group, dim=1)


def grid_of(name: str, layer: QuantLayer) -> Grid:
    """The integers and scales of a layer.

    Args:
        name: The layer's name, for messages.
        layer: The layer.

    Returns:
        Its grid.

    Raises:
        InputError: The quantized weights are no integers times a scale, as after a Hadamard transform.
    """
    unit, levels = _lattice(layer.quantizer.levels)
    with torch.no_grad():
        values = layer._flip(layer.quantized_weight()).detach().float().cpu()
        scale = floor_scale(layer.scale).detach().float().cpu().reshape(len(values), -1) * unit
    if values.shape[1] % scale.shape[1]:
        raise InputError(f"{name} has {values.shape[1]} columns in {scale.shape[1]} groups of different sizes")
    position = values / scale.repeat_interleave(values.shape[1] // scale.shape[1], dim=1)
    integers = position.round()
    outside = set(integers.unique().tolist()) - levels
    if outside or (position - integers).abs().max() > OFF_GRID * max(map(abs, levels)):
        raise InputError(
            f"the quantized weights of {name} are no integers times a scale ({layer.quantizer.name}), which this "
            "format needs: use --format packed"
        )
    return Grid(integers.to(torch.int8), scale, levels)


def check_weights_alone(model: nn.Module, format: str) -> None:
    """Check that nothing but weights is quantized.

    Args:
        model: A quantized model.
        format: What messages call the format.

    Raises:
        InputError: The model was trained with quantized activations, or a quantized cache of keys and values.
    """
    config = model.qat_config
    if min(getattr(config, name, 16) for name in ("activation_bits", "cache_bits")) < 16:  # type: ignore[type-var]
        raise InputError(
            f"the model was trained with quantized activations or a quantized cache, which {format} cannot describe: "
            "use --format packed"
        )


def _lattice(levels: tuple[float, ...]) -> tuple[float, frozenset[int]]:
    """The largest unit that every level is a whole multiple of, and the multiples."""
    step = min(high - low for low, high in pairwise(levels))
    for part in (1, 2, 3, 4):
        multiples = [level / step * part for level in levels]
        if all(abs(multiple - round(multiple)) < OFF_GRID for multiple in multiples):
            return step / part, frozenset(round(multiple) for multiple in multiples)
    raise InputError(f"the levels {levels} are no multiples of one unit: use --format packed")
