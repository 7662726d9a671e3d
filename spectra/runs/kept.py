"""What a probe puts back, whatever the functions of the user do that it calls."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from spectra.backend.errors import InputError
from spectra.operators.hessian.isolation import random_states_kept


@contextlib.contextmanager
def randomness_kept() -> Iterator[None]:
    """Put back the random states of Python, NumPy and torch, on the CPU and on every CUDA device."""
    used = torch.cuda.is_available() and torch.cuda.is_initialized()
    with (
        torch.random.fork_rng(devices=range(torch.cuda.device_count()) if used else []),
        random_states_kept(torch.device("cpu")),
    ):
        yield


@contextlib.contextmanager
def model_kept(model: nn.Module) -> Iterator[None]:
    """Put back parameters, buffers, gradients and training flags, for a function that may change them.

    Copies of all tensors are held meanwhile. A tensor that was not changed is not written to, so that graphs which
    hold it stay valid.
    """
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    with torch.no_grad():
        tensors = [*model.parameters(), *model.buffers(), *(g for _, g in gradients if g is not None)]
        copies = [(tensor, tensor._version, tensor.clone()) for tensor in tensors if _has_values(tensor)]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for tensor, version, copy in copies:
                if tensor._version != version or not _equal(tensor, copy):
                    tensor.copy_(copy)


@contextlib.contextmanager
def without_optimizer_steps() -> Iterator[None]:
    """Inside, an optimizer step of this thread raises InputError: its optimizer's state would not be put back."""
    thread = threading.get_ident()

    def refuse(optimizer: torch.optim.Optimizer, *_: object) -> None:
        if threading.get_ident() == thread:
            raise InputError(
                f"the measured function makes a step of an optimizer ({type(optimizer).__name__}), which would change "
                "the training: measure with a loss= that makes none"
            )

    handle = register_optimizer_step_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors hold the same; False where there is no memory to compare them."""
    try:
        return torch.equal(one, other)
    except RuntimeError:
        return False


def _has_values(tensor: torch.Tensor) -> bool:
    """Whether there is something to put back, and it can be: not in lazy, meta, sparse and inference tensors."""
    lazy = isinstance(tensor, nn.UninitializedParameter | nn.UninitializedBuffer)
    return not (lazy or tensor.is_meta or tensor.is_inference() or tensor.layout != torch.strided)
