"""Quantized keys and values: a key-value cache in few bits, by quantizing what its projections put out.

The cache holds the outputs of the key and value projections, one grid a token and head. What a model does with keys
afterwards (normalisation, rotary positions) it does with the quantized ones, as when they are read from such a cache.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers.activations import quantize_activations
from spectra.backend.errors import InputError

HEAD_DIMENSION = ("head_dim", "head_size")  # what attention modules call it
PROJECTIONS = ("k_proj", "v_proj")


@dataclass(frozen=True)
class Heads:
    """Where keys and values lie in the output of a projection.

    The output is (groups, per group, head dimension), and in each group the first `queries` heads are not quantized.

    Attributes:
        groups: How often the order of queries, keys and values repeats.
        queries: Heads at the start of each group that are not quantized.
        dimension: Features of a head.
    """

    groups: int
    queries: int
    dimension: int


@dataclass(frozen=True)
class CacheQuantizer:
    """A forward hook that quantizes keys and values in the output of their projection, per token and head.

    Args:
        heads: Where they lie.
        bits: The bit-width.
        symmetric: As in `quantize_activations`.
    """

    heads: Heads
    bits: int
    symmetric: bool = True

    def __call__(self, module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        """The output of the projection with quantized keys and values."""
        split = output.unflatten(-1, (self.heads.groups, -1, self.heads.dimension))
        queries, cached = split[..., : self.heads.queries, :], split[..., self.heads.queries :, :]
        cached = quantize_activations(cached, self.bits, symmetric=self.symmetric)
        return torch.cat([queries, cached], dim=-2).flatten(-3) if self.heads.queries else cached.flatten(-3)


def cache_projections(model: nn.Module) -> dict[str, tuple[nn.Module, Heads]]:
    """The projections whose outputs a model keeps in its key-value cache.

    Known are the separate `k_proj` and `v_proj` of most models, and the fused projections of GPT-2, GPT-NeoX, BLOOM,
    Falcon, Phi-3 and MPT.

    Args:
        model: A model of transformers.

    Returns:
        {name of the projection: (module, where keys and values lie)}.

    Raises:
        InputError: The model has no such projection, or an attention whose layout is not known.
    """
    found: dict[str, tuple[nn.Module, Heads]] = {}
    for name, module in model.named_modules():
        if not _is_attention(module):
            continue
        heads = _heads_of(module)
        if heads is None:
            raise InputError(
                f"cache_bits cannot be used with {type(module).__name__} ({name or 'the model'}): it has neither "
                "k_proj and v_proj nor a fused projection whose layout is known; leave cache_bits=16"
            )
        found |= {
            f"{name}.{child}" if name else child: (getattr(module, child), where) for child, where in heads.items()
        }
    if not found:
        raise InputError(
            f"cache_bits needs a model with attention, and {type(model).__name__} has none: leave cache_bits=16"
        )
    return found


def _is_attention(module: nn.Module) -> bool:
    """Whether a module projects to keys and values: an attention by its name that has projections of its own."""
    named = "attention" in type(module).__name__.lower()
    return named and any(_output_features(child) for child in module.children())


def _heads_of(attention: nn.Module) -> dict[str, Heads] | None:
    """Where an attention module has its keys and values, by the names of its projections; None if that is not known."""
    sizes = [getattr(attention, name, None) for name in HEAD_DIMENSION]
    dimension = next((size for size in sizes if isinstance(size, int) and size > 0), 0)
    if not dimension:
        return None
    for original in type(attention).__mro__:
        if original.__name__ in FUSED:
            name, layout = FUSED[original.__name__]
            width = _output_features(getattr(attention, name, None))
            heads = layout(attention, width // dimension, dimension) if width else None
            return None if heads is None else {name: heads}
    found = {}
    for name, size in zip(PROJECTIONS, (dimension, getattr(attention, "v_head_dim", None) or dimension), strict=True):
        width = _output_features(getattr(attention, name, None))
        if not width or width % size:
            return None
        found[name] = Heads(1, 0, size)
    return found


def _thirds(attention: nn.Module, count: int, dimension: int) -> Heads | None:
    """All queries, then all keys, then all values."""
    heads = getattr(attention, "num_heads", getattr(attention, "n_heads", 0))
    return Heads(1, heads, dimension) if count == 3 * heads else None


def _queries_first(attention: nn.Module, count: int, dimension: int) -> Heads | None:
    """All queries, then the keys and values of fewer heads."""
    config: Any = attention.config
    queries, cached = config.num_attention_heads, config.num_key_value_heads
    return Heads(1, queries, dimension) if count == queries + 2 * cached else None


def _by_head(attention: nn.Module, count: int, dimension: int) -> Heads | None:
    """Query, key and value of a head together; in Falcon also those of a group of heads."""
    settings: Any = attention
    if getattr(attention, "new_decoder_architecture", False):
        return Heads(settings.num_kv_heads, count // settings.num_kv_heads - 2, dimension)
    if getattr(attention, "multi_query", False):
        return Heads(1, count - 2, dimension)
    return Heads(count // 3, 1, dimension) if count % 3 == 0 else None


# The name and the layout of fused projections, by the class of the attention in transformers.
FUSED = {
    "GPT2Attention": ("c_attn", _thirds),
    "MptAttention": ("Wqkv", _thirds),
    "Phi3Attention": ("qkv_proj", _queries_first),
    "GPTNeoXAttention": ("query_key_value", _by_head),
    "BloomAttention": ("query_key_value", _by_head),
    "FalconAttention": ("query_key_value", _by_head),
}


def _output_features(module: nn.Module | None) -> int:
    """How many features a projection puts out, 0 for what is no projection."""
    base = getattr(module, "base_layer", module)  # a LoRA layer has that of the layer it wraps
    width = getattr(base, "out_features", getattr(base, "nf", 0))  # transformers' Conv1D calls it nf
    return width if isinstance(width, int) else 0
