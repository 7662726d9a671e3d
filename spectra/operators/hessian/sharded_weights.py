"""Models that FSDP2 (`torch.distributed.fsdp.fully_shard`) has sharded, as ordinary modules with whole parameters."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from spectra.backend import ranks
from spectra.backend.errors import InputError

HOOKS = ("_forward_pre_hooks", "_forward_hooks")
ELSE = "measure the model before it is sharded, or a copy with its full state dict"


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter is a DTensor, or a module is managed by FSDP2."""
    return bool(managed_modules(model)) or any(is_distributed(p) for p in model.parameters())


def reshard(model: nn.Module) -> None:
    """Give back the whole parameters that FSDP2 keeps after a forward pass without a backward pass."""
    for module in managed_modules(model):
        module.reshard()


def check_sharding(model: nn.Module) -> None:
    """Refuse every sharding but that of FSDP2 over all ranks.

    Args:
        model: The model.

    Raises:
        InputError: For FSDP1, tensor parallel plans, parameters kept on the CPU, and a mesh without some ranks.
    """
    for name, module in model.named_modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise InputError(
                f"'{name or type(module).__name__}' is sharded by FullyShardedDataParallel, and each rank holds a part "
                "of its parameters only: shard it with torch.distributed.fsdp.fully_shard (FSDP2) instead, measure the "
                "model before it is wrapped, or a copy with its full state dict"
            )
    managed = {id(p) for module in managed_modules(model) for p in module.parameters()}
    for name, parameter in model.named_parameters():
        if is_distributed(parameter):
            check_parameter(name, parameter, managed=id(parameter) in managed)


def check_parameter(name: str, parameter: Any, *, managed: bool) -> None:
    """Refuse a parameter that is sharded in another way than by FSDP2 over all ranks; see `check_sharding`."""
    mesh, placements = parameter.device_mesh, parameter.placements
    sharded = [place for place in placements if place.is_shard()]
    replicated = [place for place in placements if place.is_replicate()]
    # on the two dimensions of a mesh FSDP2 replicates along the first and shards along the second
    plain = len(sharded) == 1 and len(sharded) + len(replicated) == len(placements) and placements[-1].is_shard()
    if not managed or not plain:
        raise InputError(
            f"parameter '{name}' is a DTensor placed as {tuple(placements)}, as tensor parallel plans make it, which "
            f"is not supported; fully_shard (FSDP2) alone is: {ELSE}"
        )
    if mesh.size() != ranks.rank_count():
        raise InputError(
            f"parameter '{name}' is sharded over {mesh.size()} of {ranks.rank_count()} ranks, a mesh with all of them "
            f"is expected: shard the model over all ranks, or {ELSE}"
        )
    if parameter.device.type != mesh.device_type:
        raise InputError(
            f"parameter '{name}' is kept on {parameter.device.type} while FSDP2 computes on {mesh.device_type} "
            f"(CPUOffloadPolicy), which is not supported: shard it without an offload policy, or {ELSE}"
        )


class WholeWeights:
    """The whole parameters of a sharded model, gathered from the ranks, while they are needed.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module):
        self._model = model
        self._whole: dict[
            int, tuple[nn.Parameter, nn.Parameter]
        ] = {}  # by the id of the sharded one, which comes first

    @property
    def size(self) -> int:
        """Bytes of all whole parameters, whether they are gathered now or not."""
        return sum(p.numel() * p.element_size() for p in self._model.parameters() if is_distributed(p))

    def gather(self) -> None:
        """Gather all parameters, in place of those gathered before. All ranks call this together."""
        reshard(self._model)
        found: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
        with torch.inference_mode(False), torch.no_grad(), ranks.rank_errors("gathering weights"):
            for parameter in self._model.parameters():
                if not is_distributed(parameter):
                    continue
                value = parameter.detach().full_tensor()  # type: ignore[attr-defined]
                known = self._whole.get(id(parameter))
                if known is None:
                    found[id(parameter)] = parameter, nn.Parameter(value, requires_grad=parameter.requires_grad)
                else:
                    known[1].copy_(value)
                    found[id(parameter)] = known
        self._whole = found

    def drop(self) -> None:
        """Free the memory of the whole parameters."""
        self._whole = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """A context in which the model holds whole parameters, and the hooks of FSDP2 do not run."""
        put_back: list[tuple[Any, str, nn.Parameter]] = []
        try:
            for module in self._model.modules():
                for name, parameter in module._parameters.items():
                    if id(parameter) in self._whole and parameter is not None:
                        put_back.append((module._parameters, name, parameter))
                        module._parameters[name] = self._whole[id(parameter)][1]
            with hooks_removed(self._model):
                yield
        finally:
            for table, name, parameter in put_back:
                table[name] = parameter


@contextlib.contextmanager
def hooks_removed(model: nn.Module) -> Iterator[None]:
    """A context in which the hooks of FSDP2 do not run."""
    hooks = [(vars(m), key, vars(m)[key]) for m in model.modules() for key in HOOKS if vars(m).get(key)]
    try:
        for table, key, before in hooks:
            table[key] = type(before)((number, hook) for number, hook in before.items() if not _is_managing(hook))
        yield
    finally:
        for table, key, before in hooks:
            table[key] = before


def managed_modules(model: nn.Module) -> list[Any]:
    """The modules that FSDP2 manages; none where the program has not loaded it."""
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for module in model.modules() if isinstance(module, kind)]


def is_distributed(parameter: torch.Tensor | None) -> bool:
    """Whether a tensor is a DTensor."""
    return hasattr(parameter, "device_mesh")


def _is_managing(hook: Any) -> bool:
    """Whether a hook is one of FSDP2."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.")
