"""Measuring without a trace: what a measurement changes in the program is put back when it ends."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

# Attention implementations of transformers that can be differentiated twice (sdpa through its math kernel).
TWICE_DIFFERENTIABLE = ("eager", "sdpa")


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel wrappers, which cannot be probed."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


@contextlib.contextmanager
def isolated(
    model: nn.Module, *, training: bool = False, attention: Sequence[str] = TWICE_DIFFERENTIABLE
) -> Iterator[None]:
    """Run the model for measurement: gradients on, twice-differentiable kernels, no autocast, no compilation.

    On exit these are as before, bit for bit: the training flag of every module, the random states of Python, NumPy and
    torch on every device in use, gradient checkpointing, sparse gradients of embeddings, and the attention
    implementation. Parameters and buffers are the task of `Substitution`.

    Args:
        model: the model.
        training: the mode in which it runs.
        attention: the attention implementations that can be used; the first of them replaces any other.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_states_kept(device))
        stack.enter_context(_modes_kept(model, training))
        stack.enter_context(_attention_in(model, attention))
        stack.enter_context(_dense_gradients(model))
        stack.enter_context(_recurrent_layers_without_cudnn(model, device))
        stack.enter_context(differentiating(device))
        yield


@contextlib.contextmanager
def differentiating(device: torch.device) -> Iterator[None]:
    """Gradients on, even where the caller switched them off; no compilation, no autocast, math attention."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """Put back the random states of Python, NumPy and torch (CPU and, if used, the accelerator)."""
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002, the state to protect is the legacy one
    devices = [device] if device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


@contextlib.contextmanager
def _modes_kept(model: nn.Module, training: bool) -> Iterator[None]:
    modes = [(m, m.training) for m in model.modules()]
    checkpointing = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module, _ in modes:
            module.training = training
        for module in checkpointing:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for module in checkpointing:
            module.gradient_checkpointing = True  # type: ignore[assignment]


@contextlib.contextmanager
def _attention_in(model: nn.Module, allowed: Sequence[str]) -> Iterator[None]:
    setter = getattr(model, "set_attn_implementation", None)
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if setter is None or current is None or current in allowed:
        yield
        return
    setter(allowed[0])
    try:
        yield
    finally:
        setter(current)


@contextlib.contextmanager
def _dense_gradients(model: nn.Module) -> Iterator[None]:
    """Embeddings with sparse gradients, which have no second derivative, compute dense ones; the values are equal."""
    sparse = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]
    try:
        for module in sparse:
            module.sparse = False
        yield
    finally:
        for module in sparse:
            module.sparse = True


@contextlib.contextmanager
def _recurrent_layers_without_cudnn(model: nn.Module, device: torch.device) -> Iterator[None]:
    """cuDNN's recurrent layers have no second derivative and no gradient in evaluation mode; torch's own have both."""
    if device.type != "cuda" or not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield
