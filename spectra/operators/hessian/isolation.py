"""Restores everything that a measurement changes in the program, when the measurement ends."""

from __future__ import annotations

import contextlib
import random
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from spectra.backend.errors import InputError

# Attention implementations of transformers that can be differentiated twice (sdpa through its math kernel).
TWICE_DIFFERENTIABLE = ("eager", "sdpa")
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks")
MODULE_TABLES = ("_parameters", "_buffers", "_modules", *BACKWARD_HOOKS)  # attributes that torch itself maintains


def check_is_model(model: Any) -> None:
    """Refuse what is no module, such as a function, a list of parameters or a Trainer."""
    if isinstance(model, nn.Module):
        return
    if isinstance(model, type):
        advice = f"make one, such as {model.__name__}(...)"
    elif isinstance(getattr(model, "model", None), nn.Module):
        advice = "give its .model"
    else:
        advice = "put its parameters and its forward pass into a torch.nn.Module"
    raise InputError(f"a model is expected, a torch.nn.Module, got a {_class_name(model)}: {advice}")


def _class_name(value: Any) -> str:
    return "class" if isinstance(value, type) else type(value).__name__


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside torch.compile, DataParallel and DistributedDataParallel wrappers, which cannot be probed."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod  # type: ignore[assignment]
        elif isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return model


class RandomStates:
    """The random states of Python, NumPy and torch (CPU and, if used, the accelerator) at one moment.

    Args:
        device: The device whose random state is saved beside the CPU's.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002, the global state is the one to restore
        self._cpu = torch.get_rng_state()
        self._accelerator = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def restore(self) -> None:
        """Set all states to what they were."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._cpu)
        if self._accelerator is not None:
            torch.cuda.set_rng_state(self._accelerator, self._device)


@contextlib.contextmanager
def isolated(
    model: nn.Module,
    *,
    training: bool = False,
    attention: Sequence[str] = TWICE_DIFFERENTIABLE,
    random_states: RandomStates | None = None,
) -> Iterator[None]:
    """A context that runs the model for a measurement, and restores it afterwards.

    Inside, gradients are on and kernels are twice differentiable. There is no compilation and no autocast, neither the
    caller's nor that of a model which accelerate prepared for mixed precision.

    On exit these are as before, bit for bit: the training flag of every module, the gradients that parameters hold and
    whether they require them, the random states of Python, NumPy and torch on every device in use, random generators
    and other attributes of modules, gradient checkpointing, backward hooks, sparse and scaled gradients of embeddings,
    and the attention implementation. `Substitution` takes care of parameters and buffers.

    Args:
        model: The model.
        training: The mode in which it runs.
        attention: The attention implementations that can be used; the first of them replaces any other.
        random_states: The random states from which forward passes inside draw; None for the current ones.
    """
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with contextlib.ExitStack() as stack:
        stack.enter_context(random_states_kept(device))
        if random_states is not None:
            random_states.restore()
        stack.enter_context(_attributes_kept(model))
        stack.enter_context(_gradients_kept(model))
        stack.enter_context(_without_accelerates_autocast(model))
        stack.enter_context(_without_backward_hooks(model))
        stack.enter_context(_modes_kept(model, training))
        stack.enter_context(_attention_in(model, attention))
        stack.enter_context(_plain_gradients(model))
        stack.enter_context(_recurrent_layers_without_cudnn(model, device))
        stack.enter_context(differentiating(device))
        yield


@contextlib.contextmanager
def differentiating(device: torch.device) -> Iterator[None]:
    """A context with gradients, also where the caller switched them off; no compilation, autocast, fused attention."""
    with (
        _plain_encoder_layers(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
        sdpa_kernel(SDPBackend.MATH),
    ):
        yield


@contextlib.contextmanager
def random_states_kept(device: torch.device) -> Iterator[None]:
    """A context that restores the random states of Python, NumPy and torch (CPU and, if used, the accelerator)."""
    before = RandomStates(device)
    try:
        yield
    finally:
        before.restore()


def draw_other_numbers(model: nn.Module, seed: int) -> None:
    """Seed every random state that a forward pass may draw from, also generators that are attributes of modules."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    torch.manual_seed(seed)
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, torch.Generator):
                value.manual_seed(seed)
            elif isinstance(value, random.Random):
                value.seed(seed)


@contextlib.contextmanager
def _plain_encoder_layers() -> Iterator[None]:
    """torch's encoder layers call their modules. Their fused kernel reads the weights without calling the modules."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _attributes_kept(model: nn.Module) -> Iterator[None]:
    """Restore attributes that a forward pass sets on modules: counters, caches, lists, plain tensors, generators."""
    modules = [module for module in model.modules() if not isinstance(module, torch.jit.ScriptModule)]
    tables = [(vars(module), dict(vars(module))) for module in modules]
    contents = [_Content(value) for _, table in tables for key, value in table.items() if key not in MODULE_TABLES]
    contents = [content for content in contents if content.saved is not None]
    try:
        yield
    finally:
        for table, before in tables:
            for key in table.keys() - before.keys():
                del table[key]
            table.update(before)
        for content in contents:
            content.restore()


class _Content:
    """The content of an attribute's value; `saved` is None for a value that cannot be changed in place."""

    def __init__(self, value: Any):
        self.value = value
        self.saved: Any = None
        if type(value) in (list, dict, set, deque, OrderedDict):
            self.saved = value.copy()
        elif isinstance(value, torch.Generator):
            self.saved = value.get_state()
        elif isinstance(value, random.Random):
            self.saved = value.getstate()
        elif isinstance(value, np.random.Generator):
            self.saved = value.bit_generator.state
        elif isinstance(value, torch.Tensor) and not value.requires_grad and not value.is_inference():
            self.saved, self._version = value.detach().clone(), value._version

    def restore(self) -> None:
        """Give the value its content back."""
        value: Any = self.value
        if isinstance(value, torch.Generator):
            value.set_state(self.saved)
        elif isinstance(value, random.Random):
            value.setstate(self.saved)
        elif isinstance(value, np.random.Generator):
            value.bit_generator.state = self.saved
        elif isinstance(value, torch.Tensor):
            if value._version != self._version:
                with torch.no_grad():
                    value.copy_(self.saved)
        elif isinstance(value, list | deque):
            value.clear()
            value.extend(self.saved)
        else:
            value.clear()
            value.update(self.saved)


@contextlib.contextmanager
def _without_backward_hooks(model: nn.Module) -> Iterator[None]:
    """Remove backward hooks of modules for a while: they change or watch gradients, and are no part of the loss."""
    hooked = [
        (vars(module), key) for module in model.modules() for key in BACKWARD_HOOKS if vars(module).get(key, None)
    ]
    before = [(table, key, table[key]) for table, key in hooked]
    try:
        for table, key in hooked:
            table[key] = OrderedDict()
        yield
    finally:
        for table, key, hooks in before:
            table[key] = hooks


def names_with_hooks(model: nn.Module) -> list[str]:
    """The parameters and modules whose hooks change or watch gradients."""
    parameters = [name for name, p in model.named_parameters() if p._backward_hooks]
    modules = [
        name or type(module).__name__
        for name, module in model.named_modules()
        if any(vars(module).get(key, None) for key in BACKWARD_HOOKS)
    ]
    return parameters + modules


def note_of_scaled_gradients(model: nn.Module) -> list[str]:
    """A note that names the embeddings whose gradients are divided by how often a token occurs, if there are any."""
    embeddings = (nn.Embedding, nn.EmbeddingBag)
    modules = [(name or type(m).__name__, m) for name, m in model.named_modules() if isinstance(m, embeddings)]
    names = [name for name, module in modules if module.scale_grad_by_freq]
    left_out = "scale_grad_by_freq, which makes a gradient that is not that of the loss, is left out"
    return [f"{left_out}: {', '.join(names[:3])}"] if names else []


@contextlib.contextmanager
def _modes_kept(model: nn.Module, training: bool) -> Iterator[None]:
    """Put every module in train or evaluation mode, without gradient checkpointing, and restore both."""
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
def _without_accelerates_autocast(model: nn.Module) -> Iterator[None]:
    """Inside, a model that accelerate prepared for mixed precision has the forward pass that it had before."""
    tables = [vars(module) for module in model.modules() if "_original_forward" in vars(module)]
    wrapped = [(table, table["forward"]) for table in tables if "forward" in table]
    try:
        for table, _ in wrapped:
            table["forward"] = table["_original_forward"]
        yield
    finally:
        for table, forward in wrapped:
            table["forward"] = forward


@contextlib.contextmanager
def _attention_in(model: nn.Module, allowed: Sequence[str]) -> Iterator[None]:
    """Switch a transformers model to an allowed attention implementation, and restore its own."""
    current, used = attention_of(model, allowed)
    if current == used:
        yield
        return
    setter: Any = model.set_attn_implementation
    setter(used)
    try:
        yield
    finally:
        setter(current)


@contextlib.contextmanager
def experts_in(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Compute the experts of a transformers model one by one in float64, for which torch has no grouped product.

    Args:
        model: The model.
        dtype: The dtype of its weights inside.
    """
    found = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values()
    grouped = [c for c in found if getattr(c, "_experts_implementation", None) == "grouped_mm"]
    changed = grouped if dtype == torch.float64 else []
    try:
        for config in changed:
            config._experts_implementation = "eager"
        yield
    finally:
        for config in changed:
            config._experts_implementation = "grouped_mm"


def attention_of(model: nn.Module, allowed: Sequence[str] = TWICE_DIFFERENTIABLE) -> tuple[str | None, str | None]:
    """The attention implementation of a transformers model, and the one that it has during a measurement.

    Args:
        model: The model.
        allowed: The implementations that can be used; the first of them replaces any other.

    Returns:
        Both names; None and None for a model that does not name its own.
    """
    current = getattr(getattr(model, "config", None), "_attn_implementation", None)
    if current is None or not hasattr(model, "set_attn_implementation") or current in allowed:
        return current, current
    return current, allowed[0]


@contextlib.contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Inside, parameters hold no gradients, so that a loss that calls .backward() adds to none of the caller's."""
    before = [(p, p.requires_grad, p.grad) for p in model.parameters() if not p.is_inference()]
    try:
        for parameter, _, gradient in before:
            if gradient is not None:
                parameter.grad = None
        yield
    finally:
        for parameter, flag, gradient in before:
            if parameter.grad is not gradient:
                parameter.grad = gradient
            if parameter.requires_grad is not flag:
                parameter.requires_grad_(flag)


@contextlib.contextmanager
def _plain_gradients(model: nn.Module) -> Iterator[None]:
    """Embeddings compute the gradient of the loss.

    Sparse gradients have no second derivative; the values are equal. Those that are divided by how often a token occurs
    (`scale_grad_by_freq`) are no gradient of any loss.
    """
    embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    before = [(module, module.sparse, module.scale_grad_by_freq) for module in embeddings]
    try:
        for module in embeddings:
            module.sparse = module.scale_grad_by_freq = False
        yield
    finally:
        for module, sparse, scaled in before:
            module.sparse, module.scale_grad_by_freq = sparse, scaled


@contextlib.contextmanager
def _recurrent_layers_without_cudnn(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Switch cuDNN off for recurrent layers: it has no second derivative, and no gradient in evaluation mode."""
    if device.type != "cuda" or not any(isinstance(m, nn.RNNBase) for m in model.modules()):
        yield
        return
    with torch.backends.cudnn.flags(enabled=False):
        yield
