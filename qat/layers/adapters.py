"""LoRA: which modules of a PEFT model are adapters, which stay in full precision beside quantized base weights."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn

BASE = "base_layer"  # what peft calls the layer that an adapter is added to


def adapter_modules(model: nn.Module) -> dict[int, str]:
    """The modules of a PEFT model that are left in full precision.

    Args:
        model: Any module; without peft imported it cannot have adapters.

    Returns:
        {id of the module: reason}.
    """
    left: dict[int, str] = {}
    for module in model.modules():
        if not is_adapted(module):
            continue
        kind = type(module).__name__
        for name, child in module.named_children():
            if name != BASE:
                left |= {id(inner): "LoRA adapter: full precision" for inner in child.modules()}
            elif _reads_base_weight(module):
                reason = f"peft's {kind} reads its weight or settings without calling it"
                left |= {id(inner): reason for inner in child.modules()}
    return left


def is_adapted(module: nn.Module) -> bool:
    """Whether a module is a layer of peft around another one."""
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    return tuners is not None and isinstance(module, tuners.BaseTunerLayer) and BASE in dict(module.named_children())


def _reads_base_weight(module: nn.Module) -> bool:
    """Whether the forward pass uses the base layer itself, as DoRA does its weight.

    Plain LoRA of a linear layer calls its base layer, and adds to the output.
    """
    adapted: Any = module
    plain = type(module).__module__ == "peft.tuners.lora.layer" and type(module).__name__ == "Linear"
    return not plain or bool(adapted.lora_variant)


def adapter_note(model: nn.Module) -> tuple[str, ...]:
    """What to know about a quantized model with adapters, as a note of the report."""
    count = sum(is_adapted(module) for module in model.modules())
    if not count:
        return ()
    return (
        f"{count} LoRA adapters stay in full precision and are added to the output of their quantized layers: "
        "to quantize them with the weights instead, call merge_and_unload() before quantize_model",
    )
