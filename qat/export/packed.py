"""Packed weights: the codes of a quantized model in as few bits as they need, with the scales as they are.

    config.json, tokenizer files          as in the folder that was exported
    quantization/settings.json            how it is quantized, and the layers: shape, codes in ascending order
    quantization/packed.safetensors       NAME.codes (uint8, see pack.py), NAME.scale (one a row or group), and every
                                          other tensor of the model under its own name

There is no model.safetensors: a program that does not know the format finds no weights, instead of wrong ones.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.export.load import Settings, align, misfit, quantize_again
from qat.export.pack import bits_per_code, pack, unpack
from qat.layers.linear import QuantEmbedding, QuantLayer, QuantLinear, quant_layers
from qat.layers.saving import FOLDER, SETTINGS, declared_untied, description, plain_name
from spectra.backend.errors import InputError, first_line

PACKED = "packed.safetensors"
ENDS = (".codes", ".scale")


class PackedLayer(QuantLayer):
    """A quantized layer that holds codes and scales in place of latent weights, and computes the same outputs.

    `hold` turns a quantized layer into one, in place.
    """

    codes_packed: Tensor
    scale_kept: Tensor
    code_values: Tensor

    def hold(self, packed: Tensor, scale: Tensor, code_values: Tensor, shape: tuple[int, ...]) -> None:
        """Take packed codes and scales, and drop the latent weight and a learned scale.

        Args:
            packed: The codes in the layout of the weight, as `pack` gives them.
            scale: The scales.
            code_values: The codes of the quantizer in ascending order, int8.
            shape: That of the weight.
        """
        self.weight_shape = shape
        del self._parameters["weight"]
        self._parameters.pop("scale", None)
        self.register_buffer("codes_packed", packed)
        self.register_buffer("scale_kept", scale)
        self.register_buffer("code_values", code_values)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """Raises InputError: there is no latent weight."""
        raise InputError(
            "packed layers have no latent weights: load the folder that was exported, which has them, or use "
            "layer.quantized_weight()"
        )

    @property
    def scale(self) -> Tensor:
        """The scales, as they were exported."""
        return self.scale_kept

    def rows(self) -> Tensor:
        """Raises InputError: there is no latent weight."""
        return self.weight

    def codes(self) -> Tensor:
        """The integer code of each weight, int8, in the layout of the weight."""
        numbers = unpack(self.codes_packed, math.prod(self.weight_shape), len(self.code_values))
        return self.code_values[numbers.int()].view(self.weight_shape)

    def quantized_weight(self) -> Tensor:
        """Q(W) in the layout of the weight."""
        return self._flip(self.training_weight())

    def training_weight(self) -> Tensor:
        """Q(W) as (rows, columns)."""
        # As a view of the layout of the weight, so that products run as those of the exported model, bit for bit.
        codes = self.codes().transpose(-2, -1) if self.transposed else self.codes()
        return self.quantizer.dequantize(codes.reshape(-1, codes.shape[-1]), self.scale_kept)

    def _flip(self, matrix: Tensor) -> Tensor:
        """From (rows, columns) back to the layout of the weight, which may be a stack of matrices."""
        shape = self.weight_shape
        if not self.transposed:
            return matrix.reshape(shape)
        flipped = matrix.reshape(*shape[:-2], shape[-1], shape[-2]).transpose(-2, -1)
        return flipped.contiguous() if len(shape) == 3 else flipped  # as QuantParameter and QuantLinear do

    def extra_repr(self) -> str:
        """What printing the model shows of this layer."""
        return f"shape={tuple(self.weight_shape)}, quantizer={self.quantizer!r}, levels={len(self.code_values)}"


class PackedLinear(PackedLayer, QuantLinear):
    """A `QuantLinear` with packed weights."""


class PackedEmbedding(PackedLayer, QuantEmbedding):
    """A `QuantEmbedding` with packed weights."""


@functools.cache
def packed_class(kind: type[QuantLayer]) -> type[PackedLayer]:
    """The packed counterpart of a class of quantized layers.

    Args:
        kind: The class.

    Returns:
        `PackedLinear`, `PackedEmbedding`, or a class made here, as for the experts of a mixture.
    """
    known = {QuantLinear: PackedLinear, QuantEmbedding: PackedEmbedding}
    return known.get(kind) or type(f"Packed{kind.__name__.removeprefix('Quant')}", (PackedLayer, kind), {})


def write_packed(model: nn.Module, out: Path) -> dict[str, Any]:
    """Write config.json and packed weights.

    Args:
        model: A quantized model of transformers.
        out: The folder, which is there.

    Returns:
        What the command says: bits a weight as packed, and how many bytes codes and scales take.
    """
    from safetensors.torch import save_file

    tensors, layers = _tensors(model)
    beside = out / FOLDER
    beside.mkdir()
    save_file(tensors, beside / PACKED, metadata={"format": "pt"})
    settings = {"format": "packed", **description(model), "layers": layers}
    (beside / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    exported: Any = model
    exported.config.architectures = [type(model).__name__]
    with declared_untied(model):
        exported.config.save_pretrained(out)
    if exported.can_generate():
        exported.generation_config.save_pretrained(out)
    sizes = {end: sum(_bytes(tensor) for name, tensor in tensors.items() if name.endswith(end)) for end in ENDS}
    bits = max(about["bits"] for about in layers.values())
    return {"bits_per_weight": bits, "code_bytes": sizes[".codes"], "scale_bytes": sizes[".scale"]}


def load_packed(folder: Path, settings: Settings, *, trust_remote_code: bool = False) -> nn.Module:
    """The model in a folder of packed weights. Its layers hold the codes and dequantize them at every use.

    Args:
        folder: The folder.
        settings: Its settings.
        trust_remote_code: Run the code that the model brings along.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        InputError: The folder cannot be read, or its parts do not belong together.
    """
    from safetensors.torch import load_file

    path = folder / FOLDER / PACKED
    try:
        tensors = load_file(path)
    except Exception as error:
        raise InputError(f"packed weights {path} cannot be read ({first_line(error)}): export again") from error
    model = _skeleton(folder, settings.dtype, trust_remote_code=trust_remote_code)
    layers = settings.content["layers"]
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith(ENDS)}
    missing, tied_names = _load_rest(model, state), _tied_names(model)
    quantize_again(model, settings, folder)
    lacking = missing - {plain_name(name, layer) for name, layer in quant_layers(model)} - tied_names
    if lacking:
        raise InputError(f"packed weights {path} lack {min(lacking)}: export again")
    for name, layer in quant_layers(model):
        _hold(layer, layers[name], tensors, name, folder)
    align(model)
    return model.eval()


def _tensors(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """The tensors of the file, and the description of the layers."""
    state = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    layers: dict[str, dict[str, Any]] = {}
    packed: dict[str, Tensor] = {}
    first: dict[tuple[int, ...], str] = {}
    values = code_values(model)
    for name, layer in quant_layers(model):
        for key in layer._parameters:
            if key != "bias":
                state.pop(f"{name}.{key}")
        shared = (id(layer.weight), id(layer._parameters.get("scale")), int(layer.transposed))
        source = first.setdefault(shared, name)
        layers[name] = {
            "shape": list(layer.weight.shape),
            "code_values": values,
            "bits": bits_per_code(len(values)),
            "tensors": source,
        }
        if source == name:
            codes = layer.codes().cpu().contiguous()
            packed[f"{name}.codes"] = pack(torch.bucketize(codes, torch.tensor(values, dtype=torch.int8)), len(values))
            packed[f"{name}.scale"] = layer.scale.detach().cpu().contiguous()
    seen: set[int] = set()
    for name, tensor in state.items():  # tied ones once
        if tensor.data_ptr() not in seen or not tensor.numel():
            packed[name] = tensor.contiguous()
            seen.add(tensor.data_ptr())
    return packed, layers


def code_values(model: nn.Module) -> list[int]:
    """The codes that the model's weights have, ascending, at least two."""
    found: set[int] = set()
    for _, layer in quant_layers(model):
        found |= set(layer.codes().unique().tolist())
    while len(found) < 2:
        found.add(max(found) + 1)
    return sorted(found)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _skeleton(folder: Path, dtype: torch.dtype, *, trust_remote_code: bool) -> Any:
    """The plain model of config.json with untrained weights."""
    import transformers

    from spectra.integrations.architectures import architecture_of, kind_of
    from spectra.integrations.loading import load_config, quiet_transformers

    config = load_config(folder, trust_remote_code=trust_remote_code)
    auto = kind_of(config).auto_class
    with quiet_transformers():
        if auto:
            options = {"trust_remote_code": trust_remote_code}
            return getattr(transformers, auto).from_config(config, dtype=dtype, **options)
        kind: Any = getattr(transformers, architecture_of(config), None) or transformers.AutoModel
        return kind._from_config(config, dtype=dtype)


def _load_rest(model: Any, state: Mapping[str, Tensor]) -> set[str]:
    """Load all tensors that are not quantized, with their dtypes; returns the names of the others."""
    result = model.load_state_dict(state, strict=False, assign=True)
    if result.unexpected_keys:
        raise InputError(f"the packed weights hold {result.unexpected_keys[0]}, which the model does not have")
    model.tie_weights()
    return set(result.missing_keys)


def _tied_names(model: Any) -> set[str]:
    """Names of parameters that are tied to another."""
    names: dict[int, str] = {}
    tied = set()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if names.setdefault(id(parameter), name) != name:
            tied |= {name, names[id(parameter)]}
    return tied


def _hold(layer: Any, about: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, folder: Path) -> None:
    """Turn a quantized layer into a packed one."""
    source, shape = about["tensors"], tuple(about["shape"])
    if tuple(layer.weight.shape) != shape:
        raise misfit(folder, f"has {name} of shape {tuple(layer.weight.shape)}, not {shape}")
    if f"{source}.codes" not in tensors or f"{source}.scale" not in tensors:
        raise InputError(f"packed weights of {folder} lack those of {source}: export again")
    layer.__class__ = packed_class(type(layer))
    values = torch.tensor(about["code_values"], dtype=torch.int8)
    layer.hold(tensors[f"{source}.codes"], tensors[f"{source}.scale"], values, shape)
