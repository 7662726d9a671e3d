"""One measurement shared by several processes (ranks) of torch.distributed.

With spread="probes" each rank takes a part of the probe vectors, and the ranks exchange results once, at the end. With
spread="batches" each rank takes a part of the batches, and every Hessian-vector product ends in one all-reduce. Start
with `torchrun --nproc-per-node N`. Every rank makes the same calls on the same model and batches.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import functools
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, TypeVar

import torch
from torch import distributed

from spectra.backend.errors import InputError, first_line

SPREADS = ("none", "probes", "batches")
COLLECTIVES = ("all_reduce", "all_reduce_coalesced", "all_gather", "all_gather_coalesced", "all_gather_into_tensor")
COLLECTIVES += ("all_gather_object", "all_to_all", "all_to_all_single", "barrier", "monitored_barrier", "broadcast")
COLLECTIVES += ("broadcast_object_list", "_broadcast_coalesced", "gather", "gather_object", "reduce", "reduce_scatter")
COLLECTIVES += ("reduce_scatter_tensor", "scatter", "scatter_object_list", "send", "recv", "isend", "irecv")
COLLECTIVES += ("all_gather_single", "all_reduce_single", "reduce_scatter_single")
COLLECTIVES += ("send_object_list", "recv_object_list", "batch_isend_irecv")
GLOO_REST = 0.1  # seconds in which the threads of gloo finish their work
T = TypeVar("T")


class RankError(RuntimeError):
    """Another rank has stopped or does not answer, so that collective operations are no longer possible."""


def start(*, device: str | None = None, minutes: float = 30.0) -> torch.device:
    """Join the process group that torchrun set up.

    Args:
        device: "cuda" (NCCL, one GPU a rank) or "cpu" (gloo). By default CUDA where it is available.
        minutes: How long a rank waits for the others before it raises `RankError`.

    Returns:
        The device of this rank.

    Raises:
        InputError: If the process was not started by torchrun.
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
        atexit.register(stop)
    return chosen


def stop() -> None:
    """Leave the process group; does nothing where there is none.

    A thread of gloo needs the interpreter when it has finished a collective operation. If the group is destroyed before
    that, the two wait for each other. If the interpreter ends before that, because another object such as a
    DistributedDataParallel model holds the group, the process is aborted (exit code 134). A short wait prevents both.
    """
    if distributed.is_initialized():
        if distributed.get_backend() == "gloo":
            time.sleep(GLOO_REST)
        distributed.destroy_process_group()


def rank() -> int:
    """The number of this process, from 0; 0 without a process group."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def rank_count() -> int:
    """The number of processes; 1 without a process group."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def check_spread(spread: str, allowed: tuple[str, ...] = SPREADS) -> str:
    """Validate the option `spread`.

    Args:
        spread: "none", or what is distributed over the ranks: "probes" or "batches".
        allowed: The values that the caller supports.

    Returns:
        `spread`.

    Raises:
        InputError: If the value is not allowed, or if there is no process group to distribute over.
    """
    if spread not in allowed:
        raise InputError(f"spread must be one of {', '.join(allowed)}, got {spread!r}")
    if spread != "none" and not distributed.is_initialized():
        raise InputError(
            f"spread={spread!r} needs several ranks: start with torchrun and call spectra.distributed.start() first"
        )
    return spread


def items_of_rank(items: list[T]) -> list[T]:
    """The items that this rank takes: every `rank_count()`-th, beginning with number `rank()`.

    Every item belongs to exactly one rank.
    """
    return items[rank() :: rank_count()]


def all_reduce_sum_(tensor: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by the sum of the tensors of all ranks."""
    with rank_errors("summing a Hessian-vector product over the ranks"):
        distributed.all_reduce(tensor)
    return tensor


def all_gather_into(whole: torch.Tensor, part: torch.Tensor, group: Any = None) -> None:
    """Fill a tensor with the equally long parts of all ranks (of a group), in the order of their numbers."""
    with rank_errors("gathering a vector"):
        _first_of("all_gather_single", "all_gather_into_tensor")(whole, part, group=group)


def broadcast_(tensor: torch.Tensor, source: int) -> None:
    """Fill a tensor with that of one rank."""
    with rank_errors("gathering a vector"):
        distributed.broadcast(tensor, src=source)


def reduce_(tensor: torch.Tensor, target: int) -> None:
    """Replace a tensor on one rank by the sum of the tensors of all; those of the other ranks are overwritten too."""
    with rank_errors("summing a Hessian-vector product over the ranks"):
        distributed.reduce(tensor, dst=target)


def reduce_scatter_into(part: torch.Tensor, whole: torch.Tensor) -> None:
    """Sum the tensors of all ranks, and fill `part` with this rank's part of the sum."""
    with rank_errors("summing a Hessian-vector product over the ranks"):
        _first_of("reduce_scatter_single", "reduce_scatter_tensor")(part, whole)


def _first_of(*names: str) -> Callable[..., Any]:
    """The first of these functions that torch.distributed has; torch 2.13 renamed some."""
    return next(getattr(distributed, name) for name in names if hasattr(distributed, name))


def together(run: Callable[[], T], device: torch.device) -> T:
    """Call a function on every rank. If it fails on one, every rank raises the error of that rank.

    The others would otherwise wait for the failed one in their next collective operation.

    Args:
        run: What each rank does alone, without collective operations.
        device: A device on which ranks can exchange tensors.

    Returns:
        What `run` returns on this rank.
    """
    error: Exception | None = None
    result: list[T] = []
    try:
        result.append(run())
    except RankError:
        raise
    except Exception as caught:  # whatever it is, the other ranks have to know
        error = caught
    if not all_reduce_min(0 if error is not None else 1, device):
        raise_for_all(error)
    return result[0]


def raise_for_all(error: Exception | None) -> NoReturn:
    """Raise the error of the first rank that has one on every rank. All ranks call this together.

    Args:
        error: The error of this rank, None for a rank that has none.
    """
    found = all_gather(None if error is None else (type(error), str(error)))
    number, (kind, text) = next((i, each) for i, each in enumerate(found) if each is not None)
    try:
        raised = kind(f"rank {number}: {text}")
    except Exception:  # a class that takes other arguments
        raised = RuntimeError(f"rank {number}: {kind.__name__}: {text}")
    raise raised from error


def all_reduce_min(number: int, device: torch.device) -> int:
    """The smallest of the numbers of all ranks, for decisions that all ranks must make alike."""
    tensor = torch.tensor(number, device=device)
    with rank_errors("agreeing on a size"):
        distributed.all_reduce(tensor, op=distributed.ReduceOp.MIN)
    return int(tensor)


def all_gather_number(number: int, group: Any = None) -> list[int]:
    """The whole numbers of all ranks, exchanged in host memory.

    Args:
        number: The number of this rank.
        group: A gloo group of all ranks; None for the default group, if that is one.

    Returns:
        The numbers in the order of the ranks.
    """
    found = [torch.zeros((), dtype=torch.int64) for _ in range(rank_count())]
    with rank_errors("waiting for the others"):
        distributed.all_gather(found, torch.tensor(number), group=group)
    return [int(each) for each in found]


def host_group() -> Any:
    """A group of all ranks that exchanges host memory; None if the default group does. All ranks call this together."""
    return None if distributed.get_backend() == "gloo" else distributed.new_group(backend="gloo")


def all_gather(value: Any) -> list[Any]:
    """The values of all ranks in the order of their numbers; for small host data such as Jacobi matrices."""
    values: list[Any] = [None] * rank_count()
    with rank_errors("gathering results"):
        distributed.all_gather_object(values, value)
    return values


@contextlib.contextmanager
def without_collectives(where: str) -> Iterator[None]:
    """A context for what one rank computes alone: collective operations of this thread, which wait, are refused.

    Args:
        where: What calls them, for the message.
    """
    if rank_count() == 1:
        yield
        return
    thread, before = threading.get_ident(), {name: getattr(distributed, name, None) for name in COLLECTIVES}

    def refusing(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def refuse(*arguments: Any, **options: Any) -> Any:
            if threading.get_ident() != thread:
                return call(*arguments, **options)
            raise InputError(
                f"{where} calls torch.distributed.{name}, which waits for the other ranks, but one rank measures "
                "alone: measure with a loss= without it"
            )

        return refuse

    try:
        for name, call in before.items():
            if call is not None:
                setattr(distributed, name, refusing(name, call))
        yield
    finally:
        for name, call in before.items():
            if call is not None:
                setattr(distributed, name, call)


@contextlib.contextmanager
def rank_errors(action: str) -> Iterator[None]:
    """Raise a RankError where the collective operation inside fails because of another rank."""
    try:
        yield
    except (RuntimeError, ValueError) as error:  # DistBackendError, a closed connection, a timeout
        reason = first_line(error)
        raise RankError(
            f"rank {rank()} was {action} when another rank stopped or fell silent: look at the other ranks' messages "
            f"for the cause ({reason})"
        ) from error
