"""The forward pass of a training step: from a batch to its loss, in bfloat16 and compiled where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.training.config import TrainConfig
from spectra.backend.errors import InputError

GAINS_FROM = 10_000_000  # parameters from which a GPU has enough to do that bfloat16 and compiling pay off

Loss = Callable[[nn.Module, Mapping[str, Tensor]], Tensor]


def next_token_loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The mean next-token cross-entropy of a batch, as the model itself computes it.

    Args:
        model: A causal language model of transformers.
        batch: `input_ids` and `labels`, (sequences, tokens).

    Returns:
        The loss, a scalar with a graph.
    """
    return model(**batch, use_cache=False).loss


class TrainingStep(nn.Module):
    """A model together with its loss, as one module that returns the loss alone.

    With dtype "bfloat16" matrix products are computed in bfloat16 (torch.autocast), while latent weights, their
    gradients, norms and the loss stay float32. Compiled, the quantizers and their weight noise are fused into a few
    kernels. Only this module is compiled: the model inside is as it was, for validation and spectra. Because the logits
    do not leave the compiled part, neither a copy of them in float32 nor a gradient of zeros for them is made.

    Args:
        model: The model that is trained; it is used, not copied.
        dtype: "float32" or "bfloat16".
        compiled: Whether to compile.
        loss: What is minimized.
        backend: The compiler; another than "inductor" is for tests.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: str = "float32",
        compiled: bool = False,
        loss: Loss = next_token_loss,
        backend: Any = "inductor",
    ) -> None:
        super().__init__()
        self.model, self.loss, self.autocast = model, loss, dtype == "bfloat16"
        if compiled:
            # All batches have one shape, so nothing is gained by code for several.
            self.compile(backend=backend, dynamic=False)

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss of a batch."""
        device = next(iter(batch.values())).device.type
        with torch.autocast(device, dtype=torch.bfloat16, enabled=self.autocast):
            return self.loss(self.model, batch)


def resolved(config: TrainConfig, model: nn.Module, device: torch.device) -> TrainConfig:
    """The settings with what "auto" stands for: bfloat16 and compiled on a GPU, float32 and eager elsewhere.

    Models with fewer than ten million parameters are trained in float32 and eager everywhere: compiling them takes
    longer than it saves.

    Args:
        config: How to train.
        model: What is trained.
        device: Where it is trained.

    Returns:
        Settings whose `dtype` is "float32" or "bfloat16", and whose `compile` is True or False.
    """
    gains = device.type == "cuda" and sum(parameter.numel() for parameter in model.parameters()) >= GAINS_FROM
    dtype, compiled = config.dtype, config.compile
    if dtype == "auto":
        dtype = "bfloat16" if gains and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    return replace(config, dtype=dtype, compile=gains if compiled is None else compiled)


def checkpoint_activations(model: Any, enabled: bool) -> None:
    """Have a model of transformers keep the inputs of its layers alone, and compute the rest again backward.

    Args:
        model: The model.
        enabled: Whether it shall, or no longer.

    Raises:
        InputError: The model's class does not support it.
    """
    if not getattr(model, "supports_gradient_checkpointing", False):
        raise InputError(
            f"{type(model).__name__} has no activation checkpointing: train without it, or use --accumulate"
        )
    newer = hasattr(model, "activation_checkpointing_enable")  # transformers renamed it
    name = f"{'activation' if newer else 'gradient'}_checkpointing"
    if enabled:
        # The reentrant kind cannot be differentiated twice, as spectra do.
        getattr(model, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(model, f"{name}_disable")()
