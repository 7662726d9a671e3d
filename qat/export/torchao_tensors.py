"""A folder of transformers whose quantized weights are torchao's tensors.

    config.json          with a quantization_config of the method "torchao"
    model.safetensors    each quantized weight as an IntxUnpackedToInt8Tensor: its integers in int8, whatever the width,
                         a scale a row or group, zero points of 0; all other tensors as they are

`AutoModelForCausalLM.from_pretrained` loads it where torchao is installed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qat.export.command import copy_companions
from qat.export.grid import Grid, check_weights_alone, grid_of
from qat.layers.linear import QuantLinear, quant_layers
from qat.layers.saving import WEIGHTS, declared_untied, model_dtype, plain_state
from spectra.backend.errors import InputError
from spectra.backend.extras import need


def write_torchao(model: Any, source: Path, out: Path) -> dict[str, Any]:
    """Write a model with torchao's tensors in place of its quantized weights.

    Args:
        model: A quantized model of transformers, on the CPU.
        source: The folder it came from, where its tokenizer is.
        out: The folder, which is there.

    Returns:
        What the command says: the kind of tensor.

    Raises:
        InputError: A layer is none that torchao's tensors can stand in: a Conv1D, an embedding, experts; or its grid is
            no integers times a scale.
    """
    need("torchao")
    from safetensors.torch import save_file
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict  # pyright: ignore[reportMissingImports]

    check_weights_alone(model, "torchao's tensors of weights")
    layers = dict(quant_layers(model))
    for name, layer in layers.items():
        if type(layer) is not QuantLinear or layer.transposed:
            raise InputError(
                f"torchao's tensors stand in nn.Linear, and {name} is a {_was(layer)}: quantize without it (skip), "
                "or use --format packed"
            )
    grids = {name: grid_of(name, layer) for name, layer in layers.items()}
    dtype = model_dtype(model)
    state: dict[str, Tensor] = plain_state(model, model.state_dict())
    width = max(_width(grid) for grid in grids.values())
    for name, grid in grids.items():
        state[f"{name}.weight"] = _tensor(grid, width, dtype)
    tied = _tied_head(model)
    if tied:
        state.pop(tied, None)
    plain: Any = {key: value.detach() for key, value in state.items()}
    tensors, metadata = flatten_tensor_state_dict(plain)
    save_file({key: value.contiguous() for key, value in tensors.items()}, out / WEIGHTS, {"format": "pt", **metadata})
    copy_companions(source, out)
    model.config.architectures = [type(model).__name__]
    with declared_untied(model):
        model.config.save_pretrained(out)
    if model.can_generate():
        model.generation_config.save_pretrained(out)
    _describe(out, model, grids, width, dtype)
    return {"tensor": f"IntxUnpackedToInt8Tensor of int{width}"}


def _width(grid: Grid) -> int:
    """Bits of the smallest signed integer that holds the levels."""
    low, high = min(grid.levels), max(grid.levels)
    return next(bits for bits in range(2, 9) if -(2 ** (bits - 1)) <= low and high < 2 ** (bits - 1))


def _tensor(grid: Grid, width: int, dtype: torch.dtype) -> Tensor:
    """The torchao tensor of a matrix."""
    from torchao.quantization import IntxUnpackedToInt8Tensor  # pyright: ignore[reportMissingImports]

    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise InputError(f"torchao's tensors are float32, bfloat16 or float16; the model is {dtype}: convert it first")
    scale = grid.scale.to(dtype)
    return IntxUnpackedToInt8Tensor(
        qdata=grid.integers.contiguous(),
        scale=scale,
        zero_point=torch.zeros_like(scale, dtype=torch.int8),
        target_dtype=getattr(torch, f"int{width}"),
        block_size=(1, grid.group),
        dtype=dtype,
        activation_quantization=None,
    )


def _describe(out: Path, model: Any, grids: dict[str, Grid], width: int, dtype: torch.dtype) -> None:
    """Add the quantization_config by which transformers knows what the weights are."""
    from torchao.quantization import IntxWeightOnlyConfig, PerAxis, PerGroup  # pyright: ignore[reportMissingImports]
    from transformers import TorchAoConfig

    group = model.qat_config.group_size
    granularity = PerAxis(0) if group is None else PerGroup(group)
    others = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (torch.nn.Linear, torch.nn.Embedding)) and name not in grids
    ]
    settings = TorchAoConfig(
        IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{width}"), granularity=granularity),
        modules_to_not_convert=others,
    )
    path = out / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = settings.to_dict()
    config["dtype"] = str(dtype).removeprefix("torch.")
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _tied_head(model: Any) -> str | None:
    """The name of the weight of a head that is tied to embeddings which are not quantized, as it is not either."""
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or isinstance(head, QuantLinear) or head.weight is not table.weight:
        return None
    return next(f"{name}.weight" for name, module in model.named_modules() if module is head)


def _was(layer: Any) -> str:
    """What a layer was before it was quantized."""
    return "Conv1D" if getattr(layer, "transposed", False) else type(layer).__name__.replace("Quant", "quantized ")
