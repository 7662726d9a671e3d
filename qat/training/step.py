"""The forward pass of a training step: from a batch to its loss, in bfloat16 and compiled where that is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from qat.training.config import TrainConfig
from qat.training.noise import DrawnNoise
from qat.training.ranks import rank_count
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
    gradients, norms and the loss stay float32. Compiled, the quantizers are fused into a few kernels. Only the loss of
    this module is compiled: the model inside is as it was, for validation and spectra. Because the logits do not leave
    the compiled part, neither a copy of them in float32 nor a gradient of zeros for them is made.

    Args:
        model: The model that is trained; it is used, not copied.
        dtype: "float32" or "bfloat16".
        compiled: Whether to compile.
        loss: What is minimized.
        backend: The compiler; another than "inductor" is for tests.
        noise: Where the weight noise of all layers is drawn at once; None: each layer draws its own. A compiled step
            always has one.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        dtype: str = "float32",
        compiled: bool = False,
        loss: Loss = next_token_loss,
        backend: Any = "inductor",
        noise: DrawnNoise | None = None,
    ) -> None:
        super().__init__()
        self.model, self.loss, self.dtype = model, loss, dtype
        self.noise = DrawnNoise(model) if compiled and noise is None else noise
        self._computed = self._loss
        if compiled:
            if callable(getattr(model, "loss_function", None)):
                # transformers looks it up at each call. For some models it warns then, which would split the graph.
                model.loss_function = model.loss_function
            # All batches have one shape, so nothing is gained by code for several.
            self._computed = torch.compile(self._loss, backend=backend, dynamic=False)

    def forward(self, **batch: Tensor) -> Tensor:
        """The loss of a batch."""
        if self.noise is not None:
            self.noise.draw()
        return self._computed(batch)

    def _loss(self, batch: Mapping[str, Tensor]) -> Tensor:
        with computing_in(self.dtype, next(iter(batch.values())).device):
            return self.loss(self.model, batch)

    def close(self) -> None:
        """Free the memory of the weight noise; the layers draw their own again."""
        if self.noise is not None:
            self.noise.clear()


def computing_in(dtype: str, device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A context in which matrix products are computed in this dtype.

    Args:
        dtype: "float32" or "bfloat16".
        device: Where they are computed.

    Returns:
        The context.
    """
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == "bfloat16")


@contextlib.contextmanager
def compiling(enabled: bool) -> Iterator[None]:
    """A context for a training that is compiled: failures of the compiler in one line, and its memory freed at the end.

    Args:
        enabled: Whether anything is compiled; torch's compiler is not even loaded otherwise.

    Raises:
        InputError: A compiler is missing, or the model cannot be compiled.
    """
    if not enabled:
        yield
        return
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(f"torch.compile failed ({reason}): train with --no-compile, or compile=False") from error
    finally:
        torch._dynamo.reset()  # its count of compilations, which is limited, begins anew for the next training


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


def computation_facts(config: TrainConfig, model: nn.Module, device: torch.device) -> dict[str, Any]:
    """What a run's config.json says of how its training is computed.

    Args:
        config: How to train.
        model: What is trained.
        device: Where it is trained.

    Returns:
        Plain values by name.
    """
    chosen = resolved(config, model, device)
    return {"computed_in": chosen.dtype, "compiled": chosen.compile, "ranks": rank_count()}


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
