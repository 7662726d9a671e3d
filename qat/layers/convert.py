"""Replace the linear layers of a model by quantized ones, in place."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qat.layers.config import QuantConfig
from qat.layers.linear import QuantEmbedding, QuantLayer, QuantLinear, check_group_size, quant_layers, weight_names
from qat.layers.quantizers.registry import make_quantizer
from spectra.backend.errors import InputError

HEAD_NAMES = ("lm_head", "embed_out")
UPCAST = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ConversionReport:
    """What `quantize_model` did.

    Attributes:
        bits: The bit-width of the quantized weights.
        quantizer: The name of the scheme.
        swapped: Names of the modules that were replaced.
        skipped: For each other module that holds a matrix, the reason why it was left.
        weight_count: Quantized weights, tied ones counted once.
        upcast: The replaced modules whose weights were bfloat16 or float16. Their latent weights are float32, since
            small updates vanish in 16 bits.
        notes: What else changed, in words.
    """

    bits: float
    quantizer: str
    swapped: tuple[str, ...]
    skipped: dict[str, str]
    weight_count: int
    upcast: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        lines = [
            f"{len(self.swapped)} modules, {self.weight_count:,} weights at {self.bits} bits by {self.quantizer}",
            *(f"left {name}: {reason}" for name, reason in self.skipped.items()),
            *self.notes,
        ]
        return "\n".join(lines)


def quantize_model(model: nn.Module, config: QuantConfig | None = None) -> ConversionReport:
    """Replace the linear layers of a model by `QuantLinear`, in place.

    Modules of the classes nn.Linear and transformers' Conv1D are replaced. Their subclasses are not, since they may
    compute something else. The output head and the embeddings are replaced only if the config asks for it. Bias,
    training mode and the Parameter objects of the weights are kept, so that ties, and optimizers built before, stay
    valid. Only bfloat16 and float16 weights get new Parameters: float32 copies.

    Args:
        model: The full-precision model.
        config: What to quantize and how; None for 2 bits.

    Returns:
        What was replaced, what was left and why.

    Raises:
        InputError: There is nothing to quantize, the model is quantized already, or the config names what the model
            does not have. The model is unchanged.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> quantize_model(model, QuantConfig(bits=2, skip="2")).swapped
        ('0',)
    """
    config = config or QuantConfig()
    _check_fresh(model)
    chosen, skipped = _choose(model, config)
    _check_ties_of_upcast(model, chosen)

    weights = {name: _weight(module) for name, module in chosen.items()}
    upcast = {id(weight): _latent(weight) for weight in weights.values() if weight.dtype in UPCAST}
    scales: dict[tuple[int, bool], nn.Parameter] = {}
    replacements: dict[int, QuantLayer] = {}
    for name, module in chosen.items():
        weight = upcast.get(id(weights[name]), weights[name])
        # Modules that share a weight share its scale, so that they keep computing with one and the same matrix.
        key = (id(weight), _is_conv1d(module))
        layer = _quantized(module, weight, config, scales.get(key))
        if layer.quantizer.learned_scale:
            scales[key] = layer._parameters["scale"]  # type: ignore[assignment]
        replacements[id(module)] = layer.train(module.training)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    _declare_tied_scales(model)
    _call_every_layer(model)

    latent = set(weight_names(model))
    return ConversionReport(
        bits=config.bits,
        quantizer=config.scheme,
        swapped=tuple(chosen),
        skipped=skipped,
        weight_count=sum(p.numel() for name, p in model.named_parameters() if name in latent),
        upcast=tuple(name for name in chosen if id(weights[name]) in upcast),
        notes=_notes(model, upcast, config),
    )


def planned_layers(model: nn.Module, config: QuantConfig | None = None) -> dict[str, QuantLayer]:
    """The quantized layers by which `quantize_model` would replace modules, without replacing them.

    Args:
        model: The full-precision model, which is left as it is.
        config: What to quantize and how; None for 2 bits.

    Returns:
        {name of the weight: layer}, a weight that modules share once.

    Raises:
        InputError: As `quantize_model`.
    """
    config = config or QuantConfig()
    _check_fresh(model)
    layers: dict[int, tuple[str, QuantLayer]] = {}
    for name, module in _choose(model, config)[0].items():
        weight = _weight(module)
        latent = _latent(weight) if weight.dtype in UPCAST else weight
        if id(weight) not in layers:
            layers[id(weight)] = f"{name}.weight", _quantized(module, latent, config, None)
    return dict(layers.values())


def _check_fresh(model: nn.Module) -> None:
    """Raises InputError for a model that is quantized already, or is one linear layer."""
    quantized = quant_layers(model)
    if quantized:
        raise InputError(
            f"the model is quantized already ({quantized[0][0]} is a {type(quantized[0][1]).__name__}): "
            "start again from the full-precision model"
        )
    if type(model) is nn.Linear or _is_conv1d(model):
        raise InputError(
            "the model is a single linear layer, which cannot be swapped in place: wrap it in nn.Sequential"
        )


def _choose(model: nn.Module, config: QuantConfig) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The modules to swap by name, and for each other module that holds a matrix the reason to leave it."""
    heads, embeddings = _output_heads(model), _token_embeddings(model)
    of_attention = {id(c) for m in model.modules() if isinstance(m, nn.MultiheadAttention) for c in m.children()}
    _check_globs(model, config)
    chosen: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not any(parameter is not None and parameter.dim() >= 2 for parameter in module._parameters.values()):
            continue
        reason = (
            _skip_pattern(name, config)
            or _reason_by_class(module)
            or ("nn.MultiheadAttention reads its weight without calling it" if id(module) in of_attention else "")
            or _reason_by_role(module, config, heads=heads, embeddings=embeddings)
            or _reason_by_weight(module)
        )
        if reason:
            skipped[name] = reason
        else:
            chosen[name] = module

    if config.group_size is not None:
        columns = {f"{name}.weight": _weight(m).shape[0 if _is_conv1d(m) else 1] for name, m in chosen.items()}
        check_group_size(columns, config.group_size)
    if config.quantize_head and not any(id(module) in heads for module in chosen.values()):
        raise InputError("quantize_head=True, but the model has no output head that can be quantized: leave it False")
    if config.quantize_embeddings and not any(id(module) in embeddings for module in chosen.values()):
        raise InputError(
            "quantize_embeddings=True, but the model has no nn.Embedding that can be quantized: leave it False"
        )
    if not chosen:
        left = (
            "; ".join(f"{name or 'the model'}: {reason}" for name, reason in list(skipped.items())[:3])
            or "it has no weight matrix"
        )
        raise InputError(
            f"{type(model).__name__} has nothing to quantize ({left}): "
            "expected a model with nn.Linear or Conv1D layers, or fewer skip globs"
        )
    return chosen, skipped


def _reason_by_class(module: nn.Module) -> str:
    """Why a module of this class is left; "" where it can be replaced."""
    if type(module) in (nn.Linear, nn.Embedding) or _is_conv1d(module):
        return ""
    for known in (nn.Linear, nn.Embedding):
        if isinstance(module, known):
            return f"{type(module).__name__} is a subclass of nn.{known.__name__}, whose forward pass may differ"
    return f"{type(module).__name__} is not a linear layer"


def _reason_by_role(module: nn.Module, config: QuantConfig, *, heads: set[int], embeddings: set[int]) -> str:
    """Why a head or an embedding is left; "" where it is neither, or the config asks for it."""
    if isinstance(module, nn.Embedding):
        if id(module) not in embeddings:
            return "not the token embeddings"
        if not config.quantize_embeddings:
            return "token embeddings (quantize_embeddings=False)"
        if module.max_norm is not None or module.scale_grad_by_freq or module.sparse:
            return "nn.Embedding with max_norm, scale_grad_by_freq or sparse gradients"
    elif id(module) in heads and not config.quantize_head:
        return "output head (quantize_head=False)"
    return ""


def _reason_by_weight(module: nn.Module) -> str:
    """Why a module with such a weight is left; "" where it can be replaced."""
    weight = _weight(module)
    if weight.is_meta:
        raise InputError("the weights are on the meta device and have no values: load the model before quantizing it")
    if weight.dtype not in (torch.float32, torch.float64, *UPCAST):
        return f"its weight is {_dtype(weight)}"
    return "" if weight.numel() else "its weight is empty"


def _output_heads(model: nn.Module) -> set[int]:
    """The output head: what `get_output_embeddings` gives, else by name, and any linear layer tied to embeddings."""
    try:
        head = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        head = None
    if head is None:
        heads = {id(module) for name, module in model.named_modules() if name.rpartition(".")[2] in HEAD_NAMES}
    else:
        heads = {id(head)}
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads |= {id(module) for module in model.modules() if type(module) is nn.Linear and id(module.weight) in tables}
    return heads


def _token_embeddings(model: nn.Module) -> set[int]:
    """The token embeddings: what `get_input_embeddings` gives, else every nn.Embedding."""
    try:
        return {id(model.get_input_embeddings())}  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}


def _check_globs(model: nn.Module, config: QuantConfig) -> None:
    """Raises InputError for a glob that matches no module."""
    names = [name for name, _ in model.named_modules() if name]
    for pattern in config.skip:
        if not any(fnmatchcase(name, pattern) for name in names):
            linear = next((name for name, module in model.named_modules() if type(module) is nn.Linear), names[-1:])
            raise InputError(f"skip glob {pattern!r} matches no module of the model: names look like {linear}")


def _skip_pattern(name: str, config: QuantConfig) -> str:
    """The reason to leave a module that a glob matches, or one of its parents; "" where none does."""
    parts = name.split(".")
    names = [".".join(parts[: depth + 1]) for depth in range(len(parts))]
    for pattern in config.skip:
        if any(fnmatchcase(candidate, pattern) for candidate in names):
            return f"skip glob {pattern!r}"
    return ""


def _check_ties_of_upcast(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raises InputError where a 16-bit weight is tied to a module that is not replaced.

    The weight gets a new float32 Parameter, which the other module would not share.
    """
    swapped = {id(module) for module in chosen.values()}
    sharing = {id(_weight(module)): name for name, module in chosen.items() if _weight(module).dtype in UPCAST}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if id(module) not in swapped and id(parameter) in sharing:
                assert parameter is not None
                raise InputError(
                    f"{sharing[id(parameter)]}.weight ({_dtype(parameter)}) is tied to {name}.{own}, which stays "
                    f"{_dtype(parameter)}: load the model in float32, or quantize both or neither"
                )


def _weight(module: nn.Module) -> nn.Parameter:
    """The weight of a linear layer or an embedding."""
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    return weight


def _latent(weight: nn.Parameter) -> nn.Parameter:
    """A float32 copy: most updates of a 16-bit weight are smaller than its rounding error and would vanish."""
    return nn.Parameter(weight.detach().float(), requires_grad=weight.requires_grad)


def _quantized(module: nn.Module, weight: nn.Parameter, config: QuantConfig, scale: nn.Parameter | None) -> QuantLayer:
    """The quantized layer that replaces a module."""
    quantizer = make_quantizer(config.quantizer, config.bits)
    scales: dict[str, Any] = {
        "scale": scale,
        "group_size": config.group_size,
        "initial_scale": config.initial_scale,
    }
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(weight, quantizer, padding_idx=module.padding_idx, dtype=module.weight.dtype, **scales)
    bias = module._parameters.get("bias")
    return QuantLinear(weight, bias, quantizer, transposed=_is_conv1d(module), **scales)  # type: ignore[arg-type]


def _is_conv1d(module: nn.Module) -> bool:
    """Whether it is transformers' Conv1D. If transformers is not imported, the model cannot have one."""
    pytorch_utils = sys.modules.get("transformers.pytorch_utils")
    return pytorch_utils is not None and type(module) is pytorch_utils.Conv1D


def _declare_tied_scales(model: nn.Module) -> None:
    """Declare scales that two modules share to a transformers model, as its `save_pretrained` requires."""
    tied = getattr(model, "_tied_weights_keys", None)
    if not isinstance(tied, dict):
        return
    first: dict[int, str] = {}
    shared = {}
    for name, layer in quant_layers(model):
        if layer.quantizer.learned_scale and first.setdefault(id(layer.scale), name) != name:
            shared[f"{name}.scale"] = f"{first[id(layer.scale)]}.scale"
    if shared:
        model._tied_weights_keys = {**tied, **shared}  # type: ignore[assignment]


def _call_every_layer(model: nn.Module) -> None:
    """Switch off the fused inference path of torch's encoder layers, which reads weights without calling the layers."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and quant_layers(module):
            module.activation_relu_or_gelu = 0  # the code of an activation that the fused path does not know
        if isinstance(module, nn.TransformerEncoder) and quant_layers(module):
            module.use_nested_tensor = False  # which only the fused path can read


def _notes(model: nn.Module, upcast: dict[int, nn.Parameter], config: QuantConfig) -> tuple[str, ...]:
    """Notes for the user: groups, new dtypes, and ties with modules that are not quantized."""
    notes = []
    if config.group_size is not None:
        notes.append(f"one scale for each {config.group_size} columns of a row")
    if upcast:
        notes.append(f"{len(upcast)} weights were 16-bit and have float32 latents now; the layers compute as before")
    latent = {id(layer.weight): name for name, layer in quant_layers(model)}
    for name, module in model.named_modules():
        if not isinstance(module, QuantLayer):
            notes += [
                f"{latent[id(parameter)]}.weight is tied to {name}.{own}, which uses it unquantized: "
                "resets move it there too"
                for own, parameter in module._parameters.items()
                if parameter is not None and id(parameter) in latent
            ]
    return tuple(notes)


def _dtype(tensor: torch.Tensor) -> str:
    """The name of a tensor's dtype without "torch."."""
    return str(tensor.dtype).removeprefix("torch.")
