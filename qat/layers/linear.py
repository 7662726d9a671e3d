"""Layers that train latent weights and compute with their quantized values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.quantizers.base import Quantizer


class QuantLayer(nn.Module):
    """What quantized layers share: a latent weight, one scale a row, a quantizer.

    weight: the latent Parameter, in the layout of the module it came from, (rows, columns), or (columns, rows) where
    `transposed`. scale: (rows, 1), a Parameter where it is learned, else computed from the weight at each use.
    noise_sigma: the standard deviation of the noise added to the weight before it is quantized, in train mode only
    and drawn afresh at every forward pass; noise_scales adds the same to a learned scale.
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
        # While set, stands in for `training_weight` in the forward pass. qat.modes puts its definitions here.
        self.weight_override: Callable[[QuantLayer], Tensor] | None = None
        self.weight = weight
        if quantizer.learned_scale:
            if scale is None:
                start = quantizer.initial_scale(self.rows())
                scale = nn.Parameter(start.clone(), requires_grad=weight.requires_grad)
            # Straight into the table: register_parameter refuses a name that the class has as a property.
            self._parameters["scale"] = scale

    @property
    def scale(self) -> Tensor:
        """One scale a row, (rows, 1)."""
        if self.quantizer.learned_scale:
            scale = self._parameters["scale"]
            assert scale is not None
            return scale
        return self.quantizer.initial_scale(self.rows())

    def rows(self) -> Tensor:
        """The latent weight as (rows, columns), one row a scale."""
        return self._flip(self.weight)

    def quantized_weight(self) -> Tensor:
        """Q(W) in the layout of the weight, without noise, with the straight-through derivatives."""
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
            return self.quantizer(weight, self.scale)
        weight = weight + self.noise_sigma * torch.randn_like(weight)
        if not self.quantizer.learned_scale:
            return self.quantizer(weight, self.quantizer.initial_scale(weight))
        scale = self.scale
        if self.noise_scales:
            scale = scale + self.noise_sigma * torch.randn_like(scale)
        return self.quantizer(weight, scale)

    def forward_weight(self) -> Tensor:
        """The weight that the forward pass computes with, (rows, columns)."""
        return self.training_weight() if self.weight_override is None else self.weight_override(self)

    def _flip(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self.transposed else matrix

    def extra_repr(self) -> str:
        rows, columns = self.rows().shape
        return f"rows={rows}, columns={columns}, quantizer={self.quantizer!r}"


class QuantLinear(QuantLayer):
    """y = x Q(W)^T + bias, in place of nn.Linear (weight (out, in)) or transformers' Conv1D (weight (in, out)).

    The product is computed in the dtype of x, so that a bfloat16 model keeps computing in bfloat16 around float32
    latent weights.
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
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.forward_weight().to(x.dtype), bias)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quantizer={self.quantizer!r}"
        )


class QuantEmbedding(QuantLayer):
    """Rows of Q(W), one scale a token, in place of nn.Embedding. `dtype` is that of the rows it returns."""

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
        return F.embedding(tokens, self.forward_weight(), padding_idx=self.padding_idx).to(self.dtype)


def quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """Every quantized layer of the model with its name, in the order of `named_modules`, each once."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLayer)]


def distinct_quant_layers(model: nn.Module) -> list[tuple[str, QuantLayer]]:
    """`quant_layers` with one layer for each latent weight: a head tied to its embeddings counts once."""
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
    """The names of the learned scales among `model.named_parameters()`: give these no weight decay.

    Decay would pull a scale, and with it every weight of its row, toward zero whatever the loss says.
    """
    scales = {id(layer.scale) for _, layer in quant_layers(model) if layer.quantizer.learned_scale}
    return frozenset(name for name, parameter in model.named_parameters() if id(parameter) in scales)
