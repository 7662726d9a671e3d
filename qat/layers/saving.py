"""Folders of quantized models: the quantized values for every tool, latent weights and scales beside them.

`save_pretrained` of a quantized model writes

    config.json, model.safetensors, ...   the model with Q(W) under the plain names, as any tool loads it
    quantization/settings.json            how it is quantized, and what wrote it
    quantization/latents.safetensors      the latent weights and the learned scales, for `qat.load`

The subfolder keeps the latents from tools that read every .safetensors file of a folder.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from qat.layers.config import QuantConfig
from qat.layers.linear import QuantLayer, distinct_quant_layers, quant_layers
from spectra.backend.errors import InputError

FOLDER, SETTINGS, LATENTS = "quantization", "settings.json", "latents.safetensors"
LAYOUT_VERSION = 1
# Folders of training checkpoints, as the Hugging Face Trainer names them. From those it loads with `load_state_dict`,
# which takes latents. It reads pytorch_model.bin before sharded safetensors; `from_pretrained` does the opposite.
CHECKPOINT = re.compile(r"checkpoint-\d+")
CHECKPOINT_WEIGHTS, WEIGHTS, INDEX = "pytorch_model.bin", "model.safetensors", "model.safetensors.index.json"
ONE_SHARD = "model-00001-of-00001.safetensors"
PACKAGES = ("spectra-qat", "torch", "transformers")


class SavesQuantizedValues:
    """What a quantized model of transformers gets on top of its class: another `save_pretrained`.

    `save_quantized_values` makes a subclass of this and of the model's class, with the name of the latter.
    """

    original: ClassVar[type]
    qat_config: QuantConfig

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **options: Any,
    ) -> None:
        """Save the model with its quantized values, and latents and scales beside them.

        Args:
            save_directory: The folder.
            is_main_process: Whether this process writes.
            state_dict: Latents and all else in place of the model's own.
            **options: Those of transformers.

        Raises:
            InputError: The model has no latents, or a distributed checkpoint is asked for.
        """
        if options.get("distributed_checkpoint"):
            raise InputError("a quantized model is not saved with distributed_checkpoint=True: leave it False")
        model: Any = self
        state = dict(model.state_dict() if state_dict is None else state_dict)
        folder = Path(save_directory)
        writes = is_main_process and not folder.is_file()
        if writes:
            write_latents(model, state, folder, variant=options.get("variant"))
        save: Any = super()
        with declared_untied(model):
            plain = plain_state(model, state)
            save.save_pretrained(save_directory, is_main_process=is_main_process, state_dict=plain, **options)
        if writes:
            _name_dtype(folder, model_dtype(model))
            if CHECKPOINT.fullmatch(folder.name):
                _as_shard(folder)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """The class is made at run time, and made again where a model is loaded."""
        return _empty, (self.original,), self.__dict__


@functools.cache
def _saving_class(original: type) -> type:
    names = {"original": original, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (SavesQuantizedValues, original), names)


def _empty(original: type) -> Any:
    made: Any = _saving_class(original)
    return made.__new__(made)


def save_quantized_values(model: nn.Module, config: QuantConfig) -> None:
    """Let `save_pretrained` of a quantized model, and of the models in it, write folders as described above.

    Args:
        model: A quantized model. Other than transformers' models are left as they are: peft's save adapters alone.
        config: How it was quantized.
    """
    for module in model.modules():
        of_peft = type(module).__module__.startswith("peft.")
        if hasattr(type(module), "save_pretrained") and not of_peft and quant_layers(module):
            module.qat_config = config  # type: ignore[assignment]
            module.__class__ = _saving_class(type(module))


def plain_state(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the plain model: Q(W) in place of W, without scales.

    Q(W) is computed on the CPU, so that it does not depend on the device.

    Args:
        model: A quantized model.
        state: Its state dict, latents included; it is not changed.

    Returns:
        The tensors by name. Where two layers share a latent weight and a scale, they share Q(W).
    """
    plain = dict(state)
    made: dict[tuple[Any, ...], Tensor] = {}
    for name, layer in quant_layers(model):
        own = [key for key in layer._parameters if key != "bias"]
        for key in own:
            plain.pop(f"{name}.{key}", None)
        if f"{name}.weight" not in state:
            continue  # not asked for
        given = {key: state[f"{name}.{key}"] for key in own if f"{name}.{key}" in state}
        identity = (*(tensor.data_ptr() for tensor in given.values()), layer.transposed)
        if identity not in made:
            with torch.no_grad(), parameters_of(layer, {key: tensor.cpu() for key, tensor in given.items()}):
                made[identity] = layer.quantized_weight().detach().contiguous()
        plain[plain_name(name, layer)] = made[identity]
    return plain


def plain_name(name: str, layer: QuantLayer) -> str:
    """The name that the weight of the layer of this name has in the plain model."""
    return layer.full_precision_name(name)


@contextlib.contextmanager
def parameters_of(layer: QuantLayer, tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """A context in which a layer has other values as its parameters."""
    before = dict(layer._parameters)
    layer._parameters.update(
        {key: nn.Parameter(tensor.detach(), requires_grad=False) for key, tensor in tensors.items()}
    )
    try:
        yield
    finally:
        layer._parameters.update(before)


def write_latents(model: nn.Module, state: Mapping[str, Tensor], folder: Path, *, variant: str | None = None) -> None:
    """Write latents, learned scales and settings beside a model.

    Args:
        model: A quantized model.
        state: Its state dict.
        folder: The model's folder; it is made where there is none.
        variant: The name that transformers puts into the names of the weight files.

    Raises:
        InputError: The model is a packed one, which has no latents.
    """
    from safetensors.torch import save_file

    if any("weight" not in layer._parameters for _, layer in quant_layers(model)):
        raise InputError("the model was loaded from packed weights and has no latent ones: copy its folder instead")
    beside = folder / FOLDER
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    if CHECKPOINT.fullmatch(folder.name):
        torch.save({key: tensor.detach().cpu() for key, tensor in state.items()}, folder / CHECKPOINT_WEIGHTS)
        latents = f"../{CHECKPOINT_WEIGHTS}"
    else:
        save_file(_latents(model, state), beside / LATENTS, metadata={"format": "pt"})
        latents = LATENTS
    settings = {
        "format": "latents",
        "latents": latents,
        "layers": [name for name, _ in quant_layers(model)],
        "tied_to_full_precision": _tied_outside(model),
        "variant": variant,
        **description(model),
    }
    (beside / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def description(model: nn.Module) -> dict[str, Any]:
    """What settings.json says of every quantized model: layout version, config, dtype, versions."""
    return {
        "layout_version": LAYOUT_VERSION,
        "config": asdict(model.qat_config),  # type: ignore[arg-type]
        "dtype": str(model_dtype(model)).removeprefix("torch."),
        "versions": {package: _version(package) for package in PACKAGES},
    }


def model_dtype(model: nn.Module) -> torch.dtype:
    """The dtype that the model computes in: that of its parameters outside the quantized layers."""
    quantized = {id(parameter) for _, layer in quant_layers(model) for parameter in layer.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in quantized:
            return parameter.dtype
    return next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())


def _latents(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Latents and learned scales by name, on the CPU, each once."""
    tensors, seen = {}, set()
    for name, layer in distinct_quant_layers(model):
        for key in layer._parameters:
            tensor = state.get(f"{name}.{key}")
            if key != "bias" and tensor is not None and tensor.data_ptr() not in seen:
                seen.add(tensor.data_ptr())
                tensors[f"{name}.{key}"] = tensor.detach().cpu().contiguous()
    return tensors


def _tied_outside(model: nn.Module) -> bool:
    """Whether a latent weight is shared with a module that uses it unquantized."""
    latent = {id(layer.weight) for _, layer in quant_layers(model)}
    return any(
        id(parameter) in latent
        for module in model.modules()
        if not isinstance(module, QuantLayer)
        for parameter in module._parameters.values()
    )


@contextlib.contextmanager
def declared_untied(model: nn.Module) -> Iterator[None]:
    """A context in which the config says that head and embeddings are two matrices, where one alone is quantized."""
    config: Any = model.config
    configs = {id(part): part for part in (config, config.get_text_config())}.values() if _tied_outside(model) else ()
    before = [(part, part.tie_word_embeddings) for part in configs if hasattr(part, "tie_word_embeddings")]
    for part, _ in before:
        part.tie_word_embeddings = False
    try:
        yield
    finally:
        for part, tied in before:
            part.tie_word_embeddings = tied


def _name_dtype(folder: Path, dtype: torch.dtype) -> None:
    """Let config.json name the dtype that the model computes in; transformers names that of its first parameter."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    name = str(dtype).removeprefix("torch.")
    if config.get("dtype", name) != name:
        path.write_text(json.dumps({**config, "dtype": name}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_shard(folder: Path) -> None:
    """Turn model.safetensors into a shard with an index, so that the Trainer reads pytorch_model.bin instead."""
    from safetensors import safe_open

    if not (folder / WEIGHTS).is_file():
        return
    (folder / WEIGHTS).replace(folder / ONE_SHARD)
    with safe_open(folder / ONE_SHARD, framework="pt") as file:
        names = list(file.keys())
    index = {
        "metadata": {"total_size": (folder / ONE_SHARD).stat().st_size},
        "weight_map": dict.fromkeys(names, ONE_SHARD),
    }
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return None
