"""A command that torchrun started in several processes: they shard the model among them, and the first one speaks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import nn

from spectra.backend import ranks
from spectra.backend.errors import InputError

T = TypeVar("T")


def is_shared() -> bool:
    """Whether torchrun has started several processes of this command."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


@contextlib.contextmanager
def one_command(device: str | None) -> Iterator[None]:
    """A context in which the processes of torchrun are the ranks of one command, and only the first prints.

    Args:
        device: The device asked for, such as "cpu"; None for GPUs where there are any.
    """
    if not is_shared():
        yield
        return
    kind = None if device is None else device.partition(":")[0]
    ranks.start(device=kind)
    with contextlib.ExitStack() as stack:
        if ranks.rank():
            silence = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(silence))
            stack.enter_context(contextlib.redirect_stderr(silence))
        try:
            yield
        except InputError:
            if ranks.rank():
                raise SystemExit(2) from None  # every rank has the same error, and the first prints it
            raise


def together(run: Callable[[], T]) -> T:
    """Call what may fail on one rank alone, such as reading files. Then all ranks have the error."""
    if not is_shared():
        return run()
    device = torch.device("cuda" if torch.distributed.get_backend() == "nccl" else "cpu")
    return ranks.together(run, device)


def shard(model: nn.Module) -> None:
    """Shard a model over the processes by FSDP2, where there are several.

    It is not run through FSDP2's hooks, so that one group holds all parameters.

    Args:
        model: The model, whole on the device of each rank.
    """
    if not is_shared():
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kind = next(model.parameters()).device.type
    fully_shard(model, mesh=init_device_mesh(kind, (ranks.rank_count(),)))
