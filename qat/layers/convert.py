"""Replace the linear layers of a model by quantized ones, in place."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn

from qat.layers.activations import ActivationQuantizer
from qat.layers.adapters import adapter_modules, adapter_note
from qat.layers.cache import CacheQuantizer, cache_projections
from qat.layers.config import QuantConfig
from qat.layers.linear import (
    QuantEmbedding,
    QuantLayer,
    QuantLinear,
    check_group_size,
    distinct_quant_layers,
    quant_layers,
    weight_names,
)
from qat.layers.quantizers.registry import make_quantizer
from qat.layers.read_past import is_conv1d, left_as_read
from qat.layers.readers import (
    QuantParameter,
    Read,
    convert,
    convert_parent,
    expert_notes,
    feeds_inline,
    weights_read,
)
from qat.layers.saving import save_quantized_values
from spectra.backend.errors import InputError

HEAD_NAMES = ("lm_head", "embed_out", "classifier", "score", "qa_outputs")
UPCAST = (torch.bfloat16, torch.float16)
HOOKS = (  # where torch keeps those of forward and backward passes
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks"),
    "_is_full_backward_hook",
)


@dataclass(frozen=True)
class ConversionReport:
    """What `quantize_model` did.

    Attributes:
        bits: The bit-width of the quantized weights.
        quantizer: The name of the scheme.
        swapped: Names of the modules that were replaced, and of the parameters that are quantized within their module,
            as the experts of a mixture are.
        skipped: For each other module that holds a matrix, the reason why it was left.
        weight_count: Quantized weights, tied ones counted once.
        parameter_count: All parameters of the model before, tied ones counted once.
        activation_bits: The bit-width of the inputs of the quantized layers.
        cache_bits: The bit-width of keys and values.
        upcast: What of `swapped` has weights that were bfloat16 or float16. Their latent weights are float32, since
            small updates vanish in 16 bits.
        notes: What else changed, in words.
    """

    bits: float
    quantizer: str
    swapped: tuple[str, ...]
    skipped: dict[str, str]
    weight_count: int
    parameter_count: int
    activation_bits: int = 16
    cache_bits: int = 16
    upcast: tuple[str, ...] = ()
    notes: tuple[str, ...] = field(default=())

    @property
    def share(self) -> float:
        """The part of the model's parameters that is quantized, 0 to 1."""
        return self.weight_count / self.parameter_count

    def __str__(self) -> str:
        lines = [
            f"{len(self.swapped)} modules, {self.weight_count:,} weights at {self.bits} bits by {self.quantizer}, "
            f"{self.share:.1%} of all parameters",
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
    if config.cache_bits < 16:
        cache_projections(model)  # raises before anything is changed

    parameter_count = sum(parameter.numel() for parameter in model.parameters())
    upcast = {id(item.weight): _latent(item.weight) for item in chosen.values() if item.weight.dtype in UPCAST}
    upcast_names = tuple(name for name, item in chosen.items() if id(item.weight) in upcast)
    scales: dict[tuple[int, bool], nn.Parameter] = {}
    layers: dict[str, QuantLayer] = {}
    for name, item in chosen.items():
        weight = upcast.get(id(item.weight), item.weight)
        # Modules that share a weight share its scale, so that they keep computing with one and the same matrix.
        key = (id(weight), item.transposed)
        layers[name] = layer = _quantized(item, weight, config, scales.get(key))
        if layer.quantizer.learned_scale:
            scales[key] = layer._parameters["scale"]  # type: ignore[assignment]
        layer.train(item.module.training)
        if not item.name:
            _keep_hooks(item.module, layer)
    experts = [item.module for item in chosen.values() if item.name]
    notes = (*_attention_notes(chosen, config), *expert_notes(experts, activations=config.activation_bits < 16))
    _put_in_place(model, chosen, layers, _activations(config))
    _declare_tied_scales(model)
    _call_every_layer(model)
    if config.cache_bits < 16:
        for module, heads in cache_projections(model).values():
            module.register_forward_hook(CacheQuantizer(heads, config.cache_bits, config.activation_symmetric))
    save_quantized_values(model, config)

    latent = set(weight_names(model))
    return ConversionReport(
        bits=config.bits,
        quantizer=config.scheme,
        swapped=tuple(chosen),
        skipped=skipped,
        weight_count=sum(p.numel() for name, p in model.named_parameters() if name in latent),
        parameter_count=parameter_count,
        activation_bits=config.activation_bits,
        cache_bits=config.cache_bits,
        upcast=upcast_names,
        notes=(*_notes(model, upcast, config), *notes, *adapter_note(model)),
    )


def _keep_hooks(module: nn.Module, layer: QuantLayer) -> None:
    """Give the layer the forward and backward hooks of the module that it replaces."""
    for name in HOOKS:
        vars(layer)[name] = vars(module)[name]


def _put_in_place(
    model: nn.Module,
    chosen: dict[str, Read],
    layers: dict[str, QuantLayer],
    activations: ActivationQuantizer | None,
) -> None:
    """Swap the modules for their layers, wherever they stand, and make the others read quantized weights."""
    replacements = {id(item.module): layers[name] for name, item in chosen.items() if not item.name}
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):  # named_children has a module under two names once
            if id(child) in replacements:
                setattr(parent, name, replacements[id(child)])
    read: dict[int, dict[str, QuantParameter]] = {}
    modules = {}
    for name, item in chosen.items():
        if item.name:
            modules[id(item.module)] = item.module
            read.setdefault(id(item.module), {})[item.name] = layers[name]  # type: ignore[assignment]
    for key, module in modules.items():
        convert(module, read[key], activations)
    for parent in list(model.modules()):
        convert_parent(parent)


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
    for name, item in _choose(model, config)[0].items():
        latent = _latent(item.weight) if item.weight.dtype in UPCAST else item.weight
        if id(item.weight) not in layers:
            layers[id(item.weight)] = name if item.name else f"{name}.weight", _quantized(item, latent, config, None)
    return dict(layers.values())


def _check_fresh(model: nn.Module) -> None:
    """Raises InputError for a model that is quantized already, or is one linear layer."""
    quantized = quant_layers(model)
    if quantized:
        raise InputError(
            f"the model is quantized already ({quantized[0][0]} is a {type(quantized[0][1]).__name__}): "
            "start again from the full-precision model"
        )
    if type(model) is nn.Linear or is_conv1d(model):
        raise InputError(
            "the model is a single linear layer, which cannot be swapped in place: wrap it in nn.Sequential"
        )


def _choose(model: nn.Module, config: QuantConfig) -> tuple[dict[str, Read], dict[str, str]]:
    """The weights to quantize by name, and for each other module that holds a matrix the reason to leave it.

    The name is that of the module to swap, or that of the parameter where its module reads it.
    """
    _check_shapes(model)
    heads, embeddings = _output_heads(model), _token_embeddings(model)
    kept = left_as_read(model, activations=config.activation_bits < 16) | adapter_modules(model)
    outputs = {id(m.out_proj) for m in model.modules() if type(m) is nn.MultiheadAttention}
    _check_globs(model, config)
    chosen: dict[str, Read] = {}
    skipped: dict[str, str] = {}
    for name, module in model.named_modules():
        if not any(parameter is not None and parameter.dim() >= 2 for parameter in module._parameters.values()):
            continue
        read = weights_read(module)
        reason = (
            _skip_pattern(name, config)
            or kept.get(id(module), "")
            or _reason_by_instance(module)
            or ("" if read or id(module) in outputs else _reason_by_class(module))
            or _reason_by_role(module, config, heads=heads, embeddings=embeddings)
        )
        if reason:
            skipped[name] = reason
            continue
        prefix = f"{name}." if name else ""
        items = {f"{prefix}{item.name}": item for item in read} or {name: _whole(module)}
        for key, item in items.items():
            reason = _skip_pattern(key, config) or _reason_by_weight(item.weight)
            if reason:
                skipped[key] = reason
            else:
                chosen[key] = item

    for key, item in chosen.items():
        if not item.weight.detach().isfinite().all():
            raise InputError(
                f"{key} holds NaN or infinity in its weight, which has no scale: check the model's weights"
            )
    if config.group_size is not None:
        check_group_size({name: item.columns for name, item in chosen.items()}, config.group_size)
    modules = {id(item.module) for item in chosen.values()}
    if config.quantize_head and not modules & heads:
        raise InputError("quantize_head=True, but the model has no output head that can be quantized: leave it False")
    if config.quantize_embeddings and not modules & embeddings:
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


def _check_shapes(model: nn.Module) -> None:
    """Raises InputError for lazy modules, whose weights have no shape before the first batch."""
    for name, parameter in model.named_parameters():
        if nn.parameter.is_lazy(parameter):
            raise InputError(f"{name} has no shape yet: run a batch through the model before quantizing it")


def _reason_by_class(module: nn.Module) -> str:
    """Why a module of this class is left; "" where it can be replaced."""
    if type(module) in (nn.Linear, nn.Embedding) or is_conv1d(module) or _is_plain_subclass(module):
        return ""
    for known in (nn.Linear, nn.Embedding):
        if isinstance(module, known):
            return f"{type(module).__name__} is a subclass of nn.{known.__name__}, whose forward pass may differ"
    return f"{type(module).__name__} is not a linear layer"


def _reason_by_instance(module: nn.Module) -> str:
    """Why this one module of a class that can be replaced is left; "" where it is as its class made it."""
    if type(module) not in (nn.Linear, nn.Embedding) and not is_conv1d(module):
        return ""
    if not isinstance(module._parameters.get("weight"), nn.Parameter):
        return "its weight is computed from other parameters (pruning, weight_norm or spectral_norm)"
    return "its forward pass was replaced on this module" if "forward" in vars(module) else ""


def _is_plain_subclass(module: nn.Module) -> bool:
    """Whether it is a subclass of nn.Linear that computes the same: transformers' FalconLinear."""
    kind = type(module)
    return kind.__module__.startswith("transformers.models.falcon") and kind.__name__ == "FalconLinear"


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


def _reason_by_weight(weight: nn.Parameter) -> str:
    """Why a module with such a weight is left; "" where it can be replaced."""
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
        found = [module for name, module in model.named_modules() if name.rpartition(".")[2] in HEAD_NAMES]
    else:
        found = [head]
    heads = {id(inner) for module in found for inner in module.modules()}  # peft wraps heads
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    heads |= {id(module) for module in model.modules() if type(module) is nn.Linear and id(module.weight) in tables}
    return heads


def _token_embeddings(model: nn.Module) -> set[int]:
    """The token embeddings: what `get_input_embeddings` gives, else every nn.Embedding."""
    try:
        return {id(inner) for inner in model.get_input_embeddings().modules()}  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return {id(module) for module in model.modules() if isinstance(module, nn.Embedding)}


def _check_globs(model: nn.Module, config: QuantConfig) -> None:
    """Raises InputError for a glob that matches no module."""
    names = [name for name, _ in model.named_modules() if name]
    names += [f"{name}.{item.name}" for name, module in model.named_modules() for item in weights_read(module)]
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


def _check_ties_of_upcast(model: nn.Module, chosen: dict[str, Read]) -> None:
    """Raises InputError where a 16-bit weight is tied to a module that is not replaced.

    The weight gets a new float32 Parameter, which the other module would not share.
    """
    swapped = {(id(item.module), item.name or "weight") for item in chosen.values()}
    sharing = {id(item.weight): name for name, item in chosen.items() if item.weight.dtype in UPCAST}
    for name, module in model.named_modules():
        for own, parameter in module._parameters.items():
            if (id(module), own) not in swapped and id(parameter) in sharing:
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


def _whole(module: nn.Module) -> Read:
    """A linear layer or an embedding, which is replaced as a whole."""
    return Read(module, "", _weight(module), is_conv1d(module))


def _quantized(item: Read, weight: nn.Parameter, config: QuantConfig, scale: nn.Parameter | None) -> QuantLayer:
    """The quantized layer that replaces a module, or a parameter of it."""
    quantizer, module = make_quantizer(config.quantizer, config.bits), item.module
    scales: dict[str, Any] = {
        "scale": scale,
        "group_size": config.group_size,
        "initial_scale": config.initial_scale,
    }
    if item.name:
        return QuantParameter(weight, quantizer, transposed=item.transposed, **scales)
    if isinstance(module, nn.Embedding):
        return QuantEmbedding(weight, quantizer, padding_idx=module.padding_idx, dtype=module.weight.dtype, **scales)
    bias: nn.Parameter | None = module._parameters.get("bias")
    return QuantLinear(weight, bias, quantizer, transposed=item.transposed, activations=_activations(config), **scales)


def _activations(config: QuantConfig) -> ActivationQuantizer | None:
    """What quantizes the inputs of the layers."""
    if config.activation_bits == 16:
        return None
    return ActivationQuantizer(config.activation_bits, config.activation_symmetric)


def _attention_notes(chosen: dict[str, Read], config: QuantConfig) -> tuple[str, ...]:
    """Inputs that stay in full precision although activations are quantized."""
    if config.activation_bits == 16:
        return ()
    notes = []
    if any(isinstance(item.module, nn.MultiheadAttention) for item in chosen.values()):
        notes.append("nn.MultiheadAttention: its inputs are quantized, those of its output projection are not")
    inline = {type(item.module).__name__ for item in chosen.values() if item.name and feeds_inline(item.module)}
    notes += [f"{name}: its inputs are quantized, those of its second matrix are not" for name in sorted(inline)]
    return tuple(notes)


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
    frozen = sum(not layer.weight.requires_grad for _, layer in distinct_quant_layers(model))
    if frozen:
        notes.append(f"{frozen} of {len(latent)} quantized weights do not require gradients, and training leaves them")
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
