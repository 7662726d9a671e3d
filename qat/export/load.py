"""Load what `save_pretrained` of a quantized model, `qat train` and `qat export` wrote."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from qat.layers.config import QuantConfig
from qat.layers.convert import quantize_model
from qat.layers.linear import distinct_quant_layers, quant_layers
from qat.layers.saving import FOLDER, LAYOUT_VERSION, SETTINGS, plain_name
from spectra.backend.errors import InputError, first_line
from spectra.backend.extras import need

ALIGNMENT = 64  # bytes, that of torch's CPU allocator
STALE_SHARE = 1e-3  # of the weights may differ by rounding on another machine, where a scale is a mean over a row


@dataclass(frozen=True)
class Settings:
    """What quantization/settings.json says.

    Attributes:
        format: "latents" or "packed".
        config: How the model is quantized.
        dtype: The dtype that the model computes in.
        content: All of the file.
    """

    format: str
    config: QuantConfig
    dtype: torch.dtype
    content: dict[str, Any]


def load(folder: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """The quantized model in a folder that `save_pretrained`, `qat train` or `qat export --format packed` wrote.

    It has the codes, the scales and, on the same kind of device, the logits of the model that was saved, bit for bit.
    From the first two it has the latent weights as well, and training can go on. From packed weights it has layers that
    hold their codes alone and dequantize them at every use.

    Args:
        folder: The folder.
        trust_remote_code: Run the code that the model brings along.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        InputError: The folder holds no quantized model, or one that does not fit its description.
    """
    need("transformers")
    folder = Path(folder).expanduser()
    settings = read_settings(folder)
    if settings.format == "packed":
        from qat.export.packed import load_packed

        return load_packed(folder, settings, trust_remote_code=trust_remote_code)
    return _load_latents(folder, settings, trust_remote_code=trust_remote_code)


def load_any(name: str | Path, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model: a quantized one as by `load`, or a plain one from a folder or the hub.

    Args:
        name: A folder, or a name on the Hugging Face hub.
        trust_remote_code: Run the code that the model brings along.

    Returns:
        The model on the CPU, in evaluation mode.

    Raises:
        InputError: There is no such model, or it cannot be loaded.
    """
    from spectra.integrations.loading import load_model

    if is_quantized(name):
        return load(name, trust_remote_code=trust_remote_code)
    return load_model(name, trust_remote_code=trust_remote_code)


def is_quantized(folder: str | Path) -> bool:
    """Whether a folder holds a quantized model that `load` takes."""
    return (Path(folder).expanduser() / FOLDER / SETTINGS).is_file()


def read_settings(folder: Path) -> Settings:
    """The settings of a quantized model.

    Args:
        folder: The model's folder.

    Returns:
        The settings.

    Raises:
        InputError: There are none, or they cannot be read.
    """
    if not folder.is_dir():
        raise InputError(f"expected a folder of a quantized model, but there is no folder {folder}: check the path")
    if not is_quantized(folder):
        raise InputError(
            f"expected a quantized model in {folder}, but it has no {FOLDER}/{SETTINGS}: give a folder that "
            "save_pretrained of a quantized model, qat train or qat export wrote; transformers loads plain models"
        )
    path = folder / FOLDER / SETTINGS
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        config, dtype, kind = content["config"], getattr(torch, content["dtype"]), content["format"]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"{path} cannot be read ({first_line(error)}): save the model again") from error
    unknown = set(config) - {field.name for field in fields(QuantConfig)}
    if content.get("layout_version") != LAYOUT_VERSION or unknown or kind not in ("latents", "packed"):
        raise InputError(
            f"{folder} was written by another version of this package ({content.get('versions', {}).get('spectra-qat')}"
            f"{', with ' + ', '.join(sorted(unknown)) if unknown else ''}): update it, or save the model again"
        )
    return Settings(kind, QuantConfig(**config), dtype, content)


def _load_latents(folder: Path, settings: Settings, *, trust_remote_code: bool) -> nn.Module:
    """The model with its latents and learned scales."""
    from spectra.integrations.architectures import kind_of
    from spectra.integrations.loading import load_config, load_model

    kind = kind_of(load_config(folder, trust_remote_code=trust_remote_code))
    model: Any = load_model(folder, dtype=settings.dtype, trust_remote_code=trust_remote_code, kind=kind)
    align(model)
    saved = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if settings.content["tied_to_full_precision"]:
        tie(model)
    quantize_again(model, settings, folder)
    tensors = _read_latents(folder / FOLDER / settings.content["latents"])
    for name, layer in distinct_quant_layers(model):
        for key, parameter in layer._parameters.items():
            if key != "bias" and parameter is not None:
                _fill(parameter, tensors.get(f"{name}.{key}"), f"{name}.{key}", folder)
    _check_same_weights(model, saved, folder)
    return model.eval()


def align(model: nn.Module) -> None:
    """Copy what lies in a mapped file at any address to an aligned one, as the memory of a trained model is.

    Some products on a CPU round otherwise where memory is not aligned.
    """
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.data_ptr() % ALIGNMENT:
            tensor.data = tensor.data.clone()


def quantize_again(model: nn.Module, settings: Settings, folder: Path) -> None:
    """Quantize the plain model of a folder, and check that the layers are those of its settings."""
    config = settings.config
    quantize_model(model, replace(config, initial_scale="max"))  # the scales come from the file: none is searched
    for module in model.modules():
        if hasattr(module, "qat_config"):
            module.qat_config = config  # type: ignore[assignment]
    found, expected = [name for name, _ in quant_layers(model)], list(settings.content["layers"])
    if found != expected:
        raise misfit(folder, f"has {len(found)} layers to quantize, where {len(expected)} are described")


def tie(model: Any) -> None:
    """Tie the output head to the input embeddings, and let the config say so."""
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = True
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


def misfit(folder: Path, what: str) -> InputError:
    """The error for a model and a description of it that do not belong together."""
    return InputError(
        f"{folder / FOLDER / SETTINGS} does not describe the model beside it, which {what}: save the quantized model "
        f"again, or remove the folder {FOLDER} if the model is a plain one now"
    )


def _read_latents(path: Path) -> dict[str, Tensor]:
    """The latents and scales by name."""
    from safetensors.torch import load_file

    try:
        if path.suffix == ".bin":
            return torch.load(path, map_location="cpu", weights_only=True)
        return load_file(path)
    except Exception as error:
        raise InputError(f"the latents {path} cannot be read ({first_line(error)}): copy the whole folder") from error


def _fill(parameter: nn.Parameter, tensor: Tensor | None, name: str, folder: Path) -> None:
    """Give a parameter the saved values."""
    if tensor is None:
        raise InputError(f"the latents of {folder} lack {name}: save the model again")
    if tensor.shape != parameter.shape:
        raise misfit(folder, f"has {name} of shape {tuple(parameter.shape)}, not {tuple(tensor.shape)}")
    parameter.data = tensor.clone() if tensor.data_ptr() % ALIGNMENT else tensor


def _check_same_weights(model: nn.Module, saved: dict[str, Tensor], folder: Path) -> None:
    """Check that the plain weights in the folder are the quantized values of the latents in it."""
    for name, layer in distinct_quant_layers(model):
        plain = saved[plain_name(name, layer)]
        with torch.no_grad():
            quantized = layer.quantized_weight().to(plain.dtype)
        differing = (~torch.isclose(quantized, plain, rtol=1e-3, atol=1e-7)).double().mean().item()
        if differing > STALE_SHARE:
            raise misfit(folder, f"has other weights in {name} than the quantized values of the latents")
