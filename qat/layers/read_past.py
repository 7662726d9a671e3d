"""Linear layers whose parents read the weight without calling them, found in the source of the parents.

A quantized layer gives Q(W) to who calls it, and the latent W to who reads its `weight`. transformers' Mamba reads
weights, for its kernels and in plain torch. If the reading is done in the forward pass itself, the parent is given a
view of itself, in which the weight is Q(W) (`qat.layers.readers.QuantParent`). Otherwise such layers are not quantized.
"""

from __future__ import annotations

import inspect
import re
import sys
from functools import cache
from typing import Any

from torch import nn

from qat.layers.adapters import BASE, is_adapted

# What a forward pass may ask of a weight without computing with it.
ASKED = "dtype|device|shape|size|ndim|dim|requires_grad|numel|is_meta"
WEIGHT_OF_CHILD = re.compile(rf"\bself\.(\w+)\.weight\b(?!\s*\.\s*(?:{ASKED})\b)")


def left_as_read(model: nn.Module, *, activations: bool) -> dict[int, str]:
    """The linear layers that are not quantized because of how their parents read them.

    Args:
        model: Any module.
        activations: Whether activations are quantized: what a weight that was read is multiplied by, is not.

    Returns:
        {id of the module: reason}.
    """
    left = {}
    for parent in model.modules():
        reads = read_layers(parent)
        if not reads or (in_forward_alone(type(parent)) and not activations and not _has_adapters(parent, reads)):
            continue
        for name in reads:
            left[id(_layer(parent, name))] = f"{type(parent).__name__} reads its weight without calling it"
    return left | _rescaled(model)


def _rescaled(model: nn.Module) -> dict[int, str]:
    """The layers of RWKV that it divides in place for inference, which leaves the scale of a quantized one behind."""
    left = {}
    for parent in model.modules():
        if hasattr(parent, "_rescale_layers"):
            for block in parent.blocks:  # type: ignore[union-attr]
                for layer in (block.attention.output, block.feed_forward.value):
                    left[id(layer)] = f"{type(parent).__name__} rescales its weight in place"
    return left


def read_layers(parent: nn.Module) -> tuple[str, ...]:
    """The names of linear children whose weight the parent reads.

    Args:
        parent: Any module.

    Returns:
        None of them for modules whose other ways to read weights are known: torch's encoder layers, whose fused path is
        switched off, and BLOOM, which does it only to repeat the rounding of tensor parallelism.
    """
    known = isinstance(parent, (nn.MultiheadAttention, nn.TransformerEncoderLayer))
    if known or getattr(parent, "slow_but_exact", None) is False:
        return ()
    names = [name for methods in _weights_in_source(type(parent)).values() for name in methods]
    return tuple(name for name in dict.fromkeys(names) if _is_linear(_layer(parent, name)))


@cache
def in_forward_alone(kind: type[nn.Module]) -> bool:
    """Whether weights are read in the forward pass of a class and nowhere else, so that a view of `self` serves it."""
    forward = inspect.unwrap(kind.forward)
    return set(_weights_in_source(kind)) == {"forward"} and "super" not in forward.__code__.co_names


def is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D. If transformers is not imported, the model cannot have one."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def _layer(parent: nn.Module, name: str) -> Any:
    """A child, or the layer in it where it is an adapted one."""
    child = parent._modules.get(name)
    return getattr(child, BASE) if child is not None and is_adapted(child) else child


def _has_adapters(parent: nn.Module, names: tuple[str, ...]) -> bool:
    return any(_layer(parent, name) is not parent._modules[name] for name in names)


def _is_linear(module: Any) -> bool:
    # Both before and after the conversion: a quantized layer says so by its quantizer.
    return type(module) is nn.Linear or is_conv1d(module) or hasattr(module, "quantized_weight")


@cache
def _weights_in_source(kind: type[nn.Module]) -> dict[str, tuple[str, ...]]:
    """The names of children whose weight is read, by the method that reads it; initialisation is left out."""
    found: dict[str, tuple[str, ...]] = {}
    for base in kind.__mro__:
        if base is nn.Module:
            break
        for name, method in vars(base).items():
            if name in found or not inspect.isfunction(method) or "init" in name or "tie" in name:
                continue
            try:
                source = inspect.getsource(method)
            except (OSError, TypeError):  # a class without source, as one typed in
                continue
            names = tuple(WEIGHT_OF_CHILD.findall(source))
            if names:
                found[name] = names
    return found
