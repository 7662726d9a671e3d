"""Layers that train latent weights and compute with their quantized values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.fast_path import quantize
from qat.layers.quantizers.base import Quantizer
from qat.layers.quantizers.linearization import Linearization


class QuantLayer(nn.Module):
    """The base class of quantized layers: a latent weight W, one scale s for each row, and a quantizer Q.

    In train mode, weight noise with the standard deviation `noise_sigma` (0 at first) is added to the weight before it
    is quantized, drawn anew at every forward pass. With `noise_scales` a learned scale gets the same noise.

    Args:
        weight: The latent weight, in the layout of the module it came from: (rows, columns), or (columns, rows) where
            `transposed`.
        quantizer: The scheme.
        scale: (rows, 1), where a learned scale is shared with another layer; None starts from the weight.
        transposed: Whether the weight has its output features in columns.
    """

    weight: nn.Parameter

    def __init__(
        self,
        weight: nn.Parameter,
        quantizer: Quantizer,
        *,
        scale: nn.Parameter | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.quantizer = quantizer
        self.transposed = transposed
        self.noise_sigma = 0.0
        self.noise_scales = False
        # While set, replaces `training_weight` in the forward pass. qat.hessian puts its definitions here.
        self.weight_override: Callable[[QuantLayer], Tensor] | None = None
        self.weight = weight
        if quantizer.learned_scale:
            if scale is None:
                start = quantizer.initial_scale(self.rows())
                scale = nn.Parameter(start.clone(), requires_grad=weight.requires_grad)
            # register_parameter refuses a name that the class has as a property.
            self._parameters["scale"] = scale

    @property
    def scale(self) -> Tensor:
        """One scale a row, (rows, 1): a Parameter where it is learned, else computed from the weight at each use."""
        if self.quantizer.learned_scale:
            scale = self._parameters["scale"]
            assert scale is not None
            return scale
        return self.quantizer.initial_scale(self.rows())

    def rows(self) -> Tensor:
        """The latent weight as (rows, columns), one output feature or token a row."""
        return self._flip(self.weight)

    def quantized_weight(self) -> Tensor:
        """Q(W) in the layout of the weight, without noise, with straight-through derivatives."""
        return self._flip(self.quantizer(self.rows(), self.scale))

    def codes(self) -> Tensor:
        """The integer code of each weight, int8, in the layout of the weight."""
        return self._flip(self.quantizer.codes(self.rows(), self.scale))

    def mask(self) -> Tensor:
        """True where a weight is not clipped and gets a gradient, bool, in the layout of the weight."""
        return self._flip(self.quantizer.mask(self.rows(), self.scale))

    def training_weight(self) -> Tensor:
        """Q(W + U) as (rows, columns), U ~ N(0, noise_sigma^2) in train mode and 0 in evaluation mode."""
        weight = self.rows()
        if not (self.training and self.noise_sigma > 0):
            return quantize(self.quantizer, weight, self.scale)
        weight = weight + torch.randn_like(weight).mul_(self.noise_sigma)
        if not self.quantizer.learned_scale:
            return quantize(self.quantizer, weight, self.quantizer.initial_scale(weight))
        scale = self.scale
        if self.noise_scales:
            scale = scale + self.noise_sigma * torch.randn_like(scale)
        return quantize(self.quantizer, weight, scale)

    def linearization(self) -> Linearization:
        """The smooth function that the straight-through derivative belongs to, for checks by finite differences."""
        return Linearization()

    def forward_weight(self) -> Tensor:
        """The weight that the forward pass computes with, (rows, columns)."""
        return self.training_weight() if self.weight_override is None else self.weight_override(self)

    def _flip(self, matrix: Tensor) -> Tensor:
        """Change between the layout of the weight and (rows, columns): transpose where `transposed`."""
        return matrix.t() if self.transposed else matrix

    def extra_repr(self) -> str:
        """What printing the model shows of this layer."""
        rows, columns = self.rows().shape
        return f"rows={rows}, columns={columns}, quantizer={self.quantizer!r}"


class QuantLinear(QuantLayer):
    """y = x Q(W)^T + bias, in place of nn.Linear or transformers' Conv1D.

    The matrix product is computed in the dtype of x: a bfloat16 model goes on computing in bfloat16 with float32
    latent weights.

    Args:
        weight: The latent weight, (out, in), or (in, out) where `transposed`, as in Conv1D.
        bias: (out,), or None.
        quantizer: The scheme.
        scale: (out, 1), as in `QuantLayer`.
        transposed: Whether the weight is (in, out).
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        quantizer: Quantizer,
        *,
        scale: nn.Parameter | None = None,
        transposed: bool = False,
    ) -> None:
        super().__init__(weight, quantizer, scale=scale, transposed=transposed)
        self.bias = bias
        self.out_features, self.in_features = self.rows().shape

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (..., out) for an input (..., in), in the dtype of the input."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.forward_weight().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What printing the model shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quantizer={self.quantizer!r}"
        )


class QuantEmbedding(QuantLayer):
    """Rows of Q(W), one scale a token, in place of nn.Embedding.

    Args:
        weight: The latent weight, (tokens, features).
        quantizer: The scheme.
        scale: (tokens, 1), as in `QuantLayer`.
        padding_idx: The token that gets no gradient, or None.
        dtype: The dtype of the rows that are returned; None is that of the weight.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        quantizer: Quantizer,
        *,
        scale: nn.Parameter | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(weight, quantizer, scale=scale)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.dtype = dtype or weight.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """The quantized rows (..., features) of token ids (...)."""
        return F.embedding(tokens, self.forward_weight(), padding_idx=self.padding_idx).to(self.dtype)


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """Every quantized layer of a model.

    Args:
        model: Any module.

    Returns:
        Pairs (name, layer) in the order of `named_modules`, each layer once.
    """
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]


def distinct_quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """`quant_layers` with one layer for each latent weight: a head tied to its embeddings counts once.

    Args:
        model: Any module.

    Returns:
        Pairs (name, layer).
    """
    seen: set[int] = set()
    layers = []
    for name, layer in quant_layers(model):
        if id(layer.weight) not in seen:
            seen.add(id(layer.weight))
            layers.append((name, layer))
    return layers


def weight_names(model: nn.Module) -> tuple[str, ...]:
    """The names of the latent weights among `model.named_parameters()`, tied ones once."""
    latent = {id(layer.weight) for _, layer in quant_layers(model)}
    return tuple(name for name, parameter in model.named_parameters() if id(parameter) in latent)


def decay_exempt(model: nn.Module) -> frozenset[str]:
    """The parameters that should get no weight decay: the learned scales.

    Decay would pull a scale toward zero whatever the loss says, and with it every weight of its row.

    Args:
        model: A quantized model.

    Returns:
        Names among `model.named_parameters()`.
    """
    scales = {id(layer.scale) for _, layer in quant_layers(model) if layer.quantizer.learned_scale}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in scales)
