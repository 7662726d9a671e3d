"""Several processes, one spectrum: probes or batches spread over the ranks of torch.distributed.

Spread over probes, the ranks have nothing to say to each other until the end. Spread over batches, every product ends
in one all-reduce. Start with `torchrun --nproc-per-node N`; every rank makes the same calls on the same model and
batches.
"""

from __future__ import annotations

import contextlib
import datetime
import os
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import distributed

from spectra.backend.errors import InputError

SPREADS = ("none", "probes", "batches")
T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank is gone, or does not answer: nothing more can be computed together."""


def start(*, device: str | None = None, minutes: float = 30.0) -> torch.device:
    """Join the process group that torchrun set up, and return this rank's device.

    device: "cuda" (NCCL, one GPU a rank) or "cpu" (gloo); by default CUDA where there is some. minutes: how long a
    rank waits for the others before it gives up with a `RankError`.
    Raises InputError outside torchrun.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if "WORLD_SIZE" not in os.environ:
        raise InputError("several ranks are expected, but this process was not started by torchrun: start it with that")
    chosen = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device(kind)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if not distributed.is_initialized():
        backend = "nccl" if chosen.type == "cuda" else "gloo"
        distributed.init_process_group(backend, timeout=datetime.timedelta(minutes=minutes))
    return chosen


def stop() -> None:
    """Leave the process group, if there is one."""
    if distributed.is_initialized():
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, 0 where there is one process."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def rank_count() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def check_spread(spread: str, allowed: tuple[str, ...] = SPREADS) -> str:
    """The spread, if it is one of those allowed and there are ranks to spread over. Raises InputError."""
    if spread not in allowed:
        raise InputError(f"spread must be one of {', '.join(allowed)}, got {spread!r}")
    if spread != "none" and not distributed.is_initialized():
        raise InputError(
            f"spread={spread!r} needs several ranks: start with torchrun and call spectra.distributed.start() first"
        )
    return spread


def part_of_rank(items: list[T]) -> list[T]:
    """Every `rank_count()`-th of the items, from this rank's number on: together the ranks have each item once."""
    return items[rank() :: rank_count()]


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of the ranks' tensors, in place: one all-reduce."""
    with _together("adding up a product"):
        distributed.all_reduce(tensor)
    return tensor


def all_reduce_min(number: int, device: torch.device) -> int:
    """The smallest of the ranks' numbers, where they have to decide alike."""
    tensor = torch.tensor(number, device=device)
    with _together("agreeing on sizes"):
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MIN)
    return int(tensor)


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks, in their order: small host data, such as Jacobi matrices."""
    values: list[Any] = [None] * rank_count()
    with _together("gathering results"):
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def _together(what: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistBackendError, a closed connection, a timeout
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise RankError(
            f"rank {rank()} was {what} when another rank stopped or fell silent: look at the other ranks' messages "
            f"for the cause ({reason})"
        ) from error
