"""Quantized weights of modules that read them in a forward pass of their own, instead of calling linear layers.

Known are mixtures of experts of transformers, whose experts lie in one 3-D parameter, and nn.MultiheadAttention. Such a
module stays in its place, with everything else that it holds. Each of its matrices becomes a `QuantParameter`, a child
of the parameter's name, and its forward pass runs on a view of the module in which these names are the quantized
weights. The forward pass is not written anew, so all of its paths are quantized. Modules that read the weights of their
linear layers get such a view as well (`qat.layers.read_past` finds them).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.layers.activations import ActivationQuantizer
from qat.layers.linear import QuantLayer, QuantLinear
from qat.layers.quantizers.base import Quantizer
from qat.layers.quantizers.rounding import straight_through
from qat.layers.read_past import read_layers

# Experts that transformers does not decorate with `use_experts_implementation`, and whether their matrices are
# (experts, in, out), as the decorator's is_transposed says, and not (experts, out, in).
UNDECORATED = {
    "JetMoeParallelExperts": False,
    "Llama4TextExperts": True,
    "LongcatFlashExperts": False,
    "Step3p7Experts": False,
}
ATTENTION_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class PerExpert:
    """A quantizer for a stack of matrices, as if each had a quantizer of its own.

    Scales that a scheme computes from a whole matrix are computed for each expert, and the factor on the gradient of a
    learned scale counts the weights of one expert.

    Args:
        inner: The scheme.
        experts: How many matrices lie above each other in the rows.
    """

    def __init__(self, inner: Quantizer, experts: int) -> None:
        self.inner, self.experts = inner, experts

    def __getattr__(self, name: str) -> Any:
        if name == "inner" or name.startswith("__"):  # asked for by copy and pickle before there is an inner one
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __call__(self, weight: Tensor, scale: Tensor) -> Tensor:
        """The quantized weights."""
        if self.inner.learned_scale:
            scale = straight_through(scale, scale * self.experts**0.5)
        return self.inner(weight, scale)

    def initial_scale(self, weight: Tensor) -> Tensor:
        """The scales to start from."""
        return torch.cat([self.inner.initial_scale(part) for part in weight.chunk(self.experts)])

    def __repr__(self) -> str:
        return repr(self.inner)


class QuantParameter(QuantLayer):
    """A weight that its parent module reads as a tensor: one matrix, or a stack of them with a scale for each row.

    Args:
        weight: The latent weight, (rows, columns) or (experts, rows, columns), or with the last two exchanged where
            `transposed`.
        quantizer: The scheme.
        transposed: Whether output features are in columns.
        **scales: As in `QuantLayer`.
    """

    replaces_module = False

    def __init__(self, weight: nn.Parameter, quantizer: Quantizer, *, transposed: bool = False, **scales: Any) -> None:
        if weight.dim() == 3:
            quantizer = PerExpert(quantizer, len(weight))  # type: ignore[assignment]
        super().__init__(weight, quantizer, transposed=transposed, **scales)

    def rows(self) -> Tensor:
        """The latent weight as (rows, columns), the experts one below the other."""
        weight = self.weight.transpose(-2, -1) if self.transposed else self.weight
        return weight.reshape(-1, weight.shape[-1])

    def forward(self) -> Tensor:
        """The quantized weight in the layout of the latent one."""
        return self._flip(self.forward_weight())

    def _flip(self, matrix: Tensor) -> Tensor:
        """From (rows, columns) back to the layout of the weight."""
        shape = self.weight.shape
        if not self.transposed:
            return matrix.reshape(shape)
        # Contiguous, as the parameter is: grouped products take no other strides.
        return matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-2, -1).contiguous()


class View:
    """A module as its own forward pass sees it, with other values for some of its attributes.

    Args:
        module: The module.
        values: Attributes by name.
    """

    def __init__(self, module: nn.Module, values: dict[str, Any]) -> None:
        for name, value in {**values, "_module": module}.items():
            setattr(self, name, value)  # torch before 2.13 does not compile __dict__.update

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class Reader(nn.Module):
    """The base of modules that read quantized weights. `convert` makes a subclass of it and of the module's class.

    Attributes:
        quantized_from: The class of the module before, whose forward pass is run.
        input_quantizer: Quantizes inputs; None leaves them in full precision.
    """

    quantized_from: ClassVar[type[nn.Module]]
    input_quantizer: ActivationQuantizer | None

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, and made again where a module is loaded."""
        return _empty, (type(self).__mro__[1], self.quantized_from), self.__dict__

    def _weights(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The quantized weights by the names of the parameters that they replace."""
        return {name: part().to(dtype) for name, part in self.named_children() if isinstance(part, QuantParameter)}


class QuantExperts(Reader):
    """A mixture of experts with quantized matrices, as transformers holds them, in each of its implementations."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the experts put out; the arguments are those of the original class."""
        dtype = _compute_dtype(hidden_states)
        settings: Any = self
        values: dict[str, Any] = dict(self._weights(dtype))
        run: Callable[..., Any] = self.quantized_from.forward
        decorated = hasattr(self, "has_gate")
        if decorated and dtype == torch.float64 and settings.config._experts_implementation == "grouped_mm":
            run = expert_by_expert  # torch's grouped product does not take float64
        if self.input_quantizer is not None:
            hidden_states = self.input_quantizer(hidden_states)
            if decorated:  # what goes into the second matrix comes from one of these two
                second = "_apply_gate" if settings.has_gate else "act_fn"
                values[second] = _then(getattr(self, second), self.input_quantizer)
                if settings.config._experts_implementation in (None, "eager"):
                    run = expert_by_expert  # the class's own loop applies the gate in line
        return run(View(self, values), hidden_states, *args, **kwargs)


class QuantAttention(Reader):
    """nn.MultiheadAttention with quantized projections."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As nn.MultiheadAttention."""
        dtype = _compute_dtype(query)
        values: dict[str, Any] = dict(self._weights(dtype))
        out: Any = self.out_proj
        if isinstance(out, QuantLinear):
            bias = None if out.bias is None else out.bias.to(dtype)
            values["out_proj"] = SimpleNamespace(weight=out.forward_weight().to(dtype), bias=bias)
        if self.input_quantizer is not None:
            # torch takes a faster path where query, key and value are one object, so equal ones stay one.
            quantized = {id(x): self.input_quantizer(x) for x in (query, key, value)}
            query, key, value = quantized[id(query)], quantized[id(key)], quantized[id(value)]
        return self.quantized_from.forward(View(self, values), query, key, value, *args, **kwargs)  # type: ignore[arg-type]


class LayerView:
    """A quantized layer as a parent sees it that reads its weight: the weight is Q(W).

    Args:
        layer: The layer.
        dtype: The dtype of the weight.
    """

    def __init__(self, layer: QuantLinear, dtype: torch.dtype) -> None:
        self._layer, self._dtype = layer, dtype

    @property
    def weight(self) -> Tensor:
        """Q(W) in the layout of the latent weight."""
        layer: QuantLinear = self.__dict__["_layer"]
        return layer._flip(layer.forward_weight()).to(self.__dict__["_dtype"])

    def __call__(self, x: Tensor) -> Tensor:
        """What the layer puts out."""
        return self.__dict__["_layer"](x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_layer"], name)


class QuantParent(Reader):
    """A module that reads the weights of quantized layers in its forward pass, and sees their quantized values.

    Attributes:
        quantized_reads: The names of these layers.
    """

    quantized_reads: tuple[str, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The arguments are those of the original class."""
        inputs = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor) and x.is_floating_point()]
        layers: dict[str, Any] = {name: self._modules[name] for name in self.quantized_reads}
        dtype = inputs[0].dtype if inputs else next(iter(self.parameters())).dtype
        values = {name: LayerView(layer, dtype) for name, layer in layers.items()}
        return self.quantized_from.forward(View(self, values), *args, **kwargs)  # type: ignore[arg-type]


def expert_by_expert(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The forward pass that `use_experts_implementation` stands for, one expert after the other.

    Args:
        self: The experts.
        hidden_states: (tokens, features).
        top_k_index: (tokens, k), the experts of each token.
        top_k_weights: (tokens, k), how much each counts.

    Returns:
        (tokens, features).
    """
    out = torch.zeros_like(hidden_states)
    for expert in range(self.num_experts):
        tokens, place = torch.where(top_k_index == expert)
        if not len(tokens):
            continue
        first = "gate_up_proj" if self.has_gate else "up_proj"
        x = _expert_linear(self, first, expert, hidden_states[tokens])
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        x = _expert_linear(self, "down_proj", expert, x)
        if getattr(self, "has_post_expert_norm", False):  # older transformers have no such norm
            x = self.post_expert_norm(x)
        out = out.index_add(0, tokens, (x * top_k_weights[tokens, place, None]).to(out.dtype))
    return out


def _expert_linear(experts: Any, name: str, expert: int, x: Tensor) -> Tensor:
    """One matrix of one expert."""
    weight = getattr(experts, name)[expert]
    bias = getattr(experts, f"{name}_bias")[expert] if experts.has_bias else None
    return F.linear(x, weight.t() if experts.is_transposed else weight, bias)


@dataclass(frozen=True)
class Read:
    """A weight that a module reads.

    Attributes:
        module: The module.
        name: The name of its parameter.
        weight: The parameter.
        transposed: Whether output features are in columns.
    """

    module: nn.Module
    name: str
    weight: nn.Parameter
    transposed: bool = False

    @property
    def columns(self) -> int:
        """The width of the weight: how many inputs a row has."""
        return self.weight.shape[-2 if self.transposed else -1]


def weights_read(module: nn.Module) -> tuple[Read, ...]:
    """The weights that a module reads in its forward pass and that can be quantized there.

    Args:
        module: Any module.

    Returns:
        None of them for a module that is not known to read its weights.
    """
    if type(module) is nn.MultiheadAttention:
        names = [name for name in ATTENTION_WEIGHTS if module._parameters.get(name) is not None]
        return tuple(Read(module, name, module._parameters[name]) for name in names)  # type: ignore[arg-type]
    transposed = _experts_transposed(module)
    if transposed is None:
        return ()
    return tuple(
        Read(module, name, parameter, transposed)
        for name, parameter in module._parameters.items()
        if parameter is not None and parameter.dim() == 3
    )


def feeds_inline(module: nn.Module) -> bool:
    """Whether experts compute the input of their second matrix in line, where it cannot be quantized."""
    return (
        len(weights_read(module)) > 1 and type(module) is not nn.MultiheadAttention and not hasattr(module, "has_gate")
    )


def _experts_transposed(module: nn.Module) -> bool | None:
    """Whether the experts of transformers are (experts, in, out); None for what is no module of experts."""
    if not type(module).__module__.startswith("transformers."):
        return None
    if hasattr(module, "has_gate") and isinstance(getattr(module, "is_transposed", None), bool):
        return module.is_transposed  # type: ignore[return-value]
    return UNDECORATED.get(type(module).__name__)


def convert(module: nn.Module, layers: dict[str, QuantParameter], activations: ActivationQuantizer | None) -> None:
    """Make a module read quantized weights, in place.

    Args:
        module: Of one of the kinds that `weights_read` knows.
        layers: Its quantized weights by the names of the parameters.
        activations: What quantizes its inputs, or None.
    """
    for name in layers:
        del module._parameters[name]
    children = dict(module._modules)
    module._modules.clear()
    module._modules.update(layers, **children)  # the weights in the order that they had as parameters
    module.input_quantizer = activations  # type: ignore[assignment]
    base = QuantAttention if type(module) is nn.MultiheadAttention else QuantExperts
    module.__class__ = _quantized_class(base, type(module))


def convert_parent(module: nn.Module) -> None:
    """Make a module see the quantized weights of those of its layers that it reads, in place; leave any other one."""
    read = tuple(name for name in read_layers(module) if isinstance(module._modules[name], QuantLinear))
    if read:
        module.quantized_reads = read  # type: ignore[assignment]
        module.__class__ = _quantized_class(QuantParent, type(module))


@functools.cache
def _quantized_class(base: type[Reader], original: type[nn.Module]) -> Any:
    return type(f"Quant{original.__name__}", (base, original), {"quantized_from": original})


def _empty(base: type[Reader], original: type[nn.Module]) -> nn.Module:
    quantized = _quantized_class(base, original)
    return quantized.__new__(quantized)


def _then(first: Callable[..., Tensor], second: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """One function after another."""
    return lambda *args: second(first(*args))


def _compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype that a matrix product with x is computed in: autocast does not reach grouped products."""
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype
