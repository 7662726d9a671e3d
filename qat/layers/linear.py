"""Layers that train latent weights and compute with their quantized values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.activations import ActivationQuantizer
from qat.layers.fast_path import quantize
from qat.layers.quantizers.base import Quantizer
from qat.layers.quantizers.grouped import Grouped
from qat.layers.quantizers.linearization import Linearization
from qat.layers.quantizers.scale_search import INITIAL_SCALES, least_error_scale
from spectra.backend.errors import InputError


class QuantLayer(nn.Module):
    """The base class of quantized layers: a latent weight W, one scale s for each row or group, and a quantizer Q.

    In train mode, weight noise with the standard deviation `noise_sigma` (0 at first) is added to the weight before it
    is quantized, drawn anew at every forward pass. With `noise_scales` a learned scale gets the same noise.

    Args:
        weight: The latent weight, in the layout of the module it came from: (rows, columns), or (columns, rows) where
            `transposed`.
        quantizer: The scheme.
        scale: (rows, groups), where a learned scale is shared with another layer; None starts from the weight.
        transposed: Whether the weight has its output features in columns.
        group_size: How many neighbouring columns of a row share a scale; None is one scale a row, so one group.
        initial_scale: Where a learned scale starts, as in `qat.QuantConfig`: "max" or "mse".

    Raises:
        InputError: The group size does not divide the columns, or there is no such start.
    """

    weight: nn.Parameter
    # Whether the layer stands in the place of a module that had a `weight`, or else in that of a parameter.
    replaces_module: ClassVar[bool] = True

    def __init__(
        self,
        weight: nn.Parameter,
        quantizer: Quantizer,
        *,
        scale: nn.Parameter | None = None,
        transposed: bool = False,
        group_size: int | None = None,
        initial_scale: str = "max",
    ) -> None:
        super().__init__()
        self.scheme = quantizer
        self.quantizer = quantizer if group_size is None else Grouped(quantizer, group_size)
        self.transposed = transposed
        self.noise_sigma = 0.0
        self.noise_scales = False
        # While set, it is the noise of the weight in place of fresh random numbers; see qat.training.noise.
        self.drawn_noise: Tensor | None = None
        # While set, replaces `training_weight` in the forward pass. qat.hessian puts its definitions here.
        self.weight_override: Callable[[QuantLayer], Tensor] | None = None
        self.weight = weight
        if group_size is not None:
            check_group_size({"the weight": self.rows().shape[-1]}, group_size)
        if initial_scale not in INITIAL_SCALES:
            raise InputError(f"initial_scale must be one of {', '.join(INITIAL_SCALES)}; got {initial_scale!r}")
        if quantizer.learned_scale:
            if scale is None:
                scale = nn.Parameter(self._first_scale(initial_scale).clone(), requires_grad=weight.requires_grad)
            # register_parameter refuses a name that the class has as a property.
            self._parameters["scale"] = scale

    @property
    def scale(self) -> Tensor:
        """(rows, groups), one group without a group size: learned, or computed from the weight at each use."""
        if self.quantizer.learned_scale:
            scale = self._parameters["scale"]
            assert scale is not None
            return scale
        return self.quantizer.initial_scale(self.rows())

    def full_precision_name(self, name: str) -> str:
        """The name that the weight of the layer of this name had in the full-precision model."""
        return f"{name}.weight" if self.replaces_module else name

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
        """Q(W + U) as (rows, columns), U ~ N(0, noise_sigma^2) in train mode and 0 in evaluation mode.

        In train mode a scheme that is annealed to its grid has its annealed values in place of Q.
        """
        weight = self.rows()
        if not (self.training and self.noise_sigma > 0):
            return self._training(weight, self.scale)
        noise = torch.randn_like(weight) if self.drawn_noise is None else self.drawn_noise
        weight = weight + self.noise_sigma * noise
        if not self.quantizer.learned_scale:
            return self._training(weight, self.quantizer.initial_scale(weight))
        scale = self.scale
        if self.noise_scales:
            scale = scale + self.noise_sigma * torch.randn_like(scale)
        return self._training(weight, scale)

    def linearization(self) -> Linearization:
        """The smooth function that the straight-through derivative belongs to, for checks by finite differences."""
        return Linearization()

    def forward_weight(self) -> Tensor:
        """The weight that the forward pass computes with, (rows, columns)."""
        return self.training_weight() if self.weight_override is None else self.weight_override(self)

    def _training(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The quantizer of the mode: annealed in train mode, on the grid in evaluation mode."""
        if self.training and self.scheme.anneals:
            return self.quantizer.annealed(weight, scale)
        return quantize(self.quantizer, weight, scale)

    def _first_scale(self, initial_scale: str) -> Tensor:
        """The scales that training starts from, (rows, groups)."""
        rows = self.rows()
        if initial_scale == "max":
            return self.quantizer.initial_scale(rows)
        size = self.quantizer.size if isinstance(self.quantizer, Grouped) else rows.shape[-1]
        found = least_error_scale(self.scheme, rows.reshape(-1, size))
        return found.reshape(*rows.shape[:-1], -1)

    def _flip(self, matrix: Tensor) -> Tensor:
        """Change between the layout of the weight and (rows, columns): transpose where `transposed`."""
        return matrix.t() if self.transposed else matrix

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *arguments: Any) -> None:
        """As torch; where a weight comes without its learned scale, as from a plain model, the scale starts from it.

        With strict=True the missing scale is an error all the same.
        """
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        scale = self._parameters.get("scale")
        if scale is not None and f"{prefix}weight" in state_dict and f"{prefix}scale" not in state_dict:
            with torch.no_grad():
                scale.copy_(self._first_scale("max"))

    def extra_repr(self) -> str:
        """What printing the model shows of this layer."""
        rows, columns = self.rows().shape
        return f"rows={rows}, columns={columns}, quantizer={self.quantizer!r}"


class QuantLinear(QuantLayer):
    """y = A(x) Q(W)^T + bias, in place of nn.Linear or transformers' Conv1D. A quantizes activations, where asked for.

    The matrix product is computed in the dtype of x: a bfloat16 model goes on computing in bfloat16 with float32
    latent weights.

    Args:
        weight: The latent weight, (out, in), or (in, out) where `transposed`, as in Conv1D.
        bias: (out,), or None.
        quantizer: The scheme.
        scale: (out, groups), as in `QuantLayer`.
        transposed: Whether the weight is (in, out).
        group_size: As in `QuantLayer`.
        initial_scale: As in `QuantLayer`.
        activations: A; None leaves the input in full precision.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None,
        quantizer: Quantizer,
        *,
        scale: nn.Parameter | None = None,
        transposed: bool = False,
        group_size: int | None = None,
        initial_scale: str = "max",
        activations: ActivationQuantizer | None = None,
    ) -> None:
        super().__init__(
            weight,
            quantizer,
            scale=scale,
            transposed=transposed,
            group_size=group_size,
            initial_scale=initial_scale,
        )
        self.bias = bias
        self.activations = activations
        self.out_features, self.in_features = self.rows().shape

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output (..., out) for an input (..., in), in the dtype of the input."""
        if self.activations is not None:
            x = self.activations(x)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.forward_weight().to(x.dtype), bias)

    def extra_repr(self) -> str:
        """What printing the model shows of this layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, quantizer={self.quantizer!r}"
            + ("" if self.activations is None else f", activations={self.activations!r}")
        )


class QuantEmbedding(QuantLayer):
    """Rows of Q(W), one scale a token or group, in place of nn.Embedding.

    Args:
        weight: The latent weight, (tokens, features).
        quantizer: The scheme.
        scale: (tokens, groups), as in `QuantLayer`.
        padding_idx: The token that gets no gradient, or None.
        dtype: The dtype of the rows that are returned; None is that of the weight.
        group_size: As in `QuantLayer`.
        initial_scale: As in `QuantLayer`.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        quantizer: Quantizer,
        *,
        scale: nn.Parameter | None = None,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        group_size: int | None = None,
        initial_scale: str = "max",
    ) -> None:
        super().__init__(weight, quantizer, scale=scale, group_size=group_size, initial_scale=initial_scale)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx = padding_idx
        self.dtype = dtype or weight.dtype

    def forward(self, tokens: Tensor) -> Tensor:
        """The quantized rows (..., features) of token ids (...)."""
        return F.embedding(tokens, self.forward_weight(), padding_idx=self.padding_idx).to(self.dtype)


def check_group_size(widths: dict[str, int], group_size: int) -> None:
    """Check that groups fill the rows of every weight.

    Args:
        widths: The columns of each weight by its name.
        group_size: Columns of a group.

    Raises:
        InputError: A width is not a multiple of the group size.
    """
    for name, width in widths.items():
        if width % group_size:
            fitting = math.gcd(group_size, *widths.values())
            use = f"use group_size={fitting}" if fitting > 1 else "use one scale a row (group_size=None)"
            raise InputError(
                f"group_size={group_size} does not divide the {width} columns of {name}: {use}, or skip that layer"
            )


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


def full_precision_names(model: nn.Module) -> dict[str, QuantLayer]:
    """The quantized layers by the names that their weights had in the full-precision model.

    Args:
        model: A quantized model.

    Returns:
        {name among `named_parameters()` of the model before: layer}, layers that share a weight each by its own name.
    """
    return {layer.full_precision_name(name): layer for name, layer in quant_layers(model)}


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
