"""Training on several devices: `torchrun` starts a process (a rank) for each, and the gradients are averaged (DDP)."""

from __future__ import annotations

import os
from typing import TypeVar

import numpy as np
from torch import distributed

from qat.training.config import TrainConfig
from spectra.backend import ranks
from spectra.backend.errors import InputError

DAY = 24 * 60  # minutes; the others wait while the first rank measures a spectrum

T = TypeVar("T")


def rank() -> int:
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def rank_count() -> int:
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


def join(device: str | None) -> None:
    """Join the other ranks, and use the GPU of this one; nothing without torchrun.

    Args:
        device: "cpu", "cuda", or None for a GPU if there is one.
    """
    if rank_count() > 1:
        ranks.start(device=device, minutes=DAY)


def agreed(value: T) -> T:
    """The value that the first rank gives. All ranks must call it.

    Args:
        value: What this rank gives; it may be anything on ranks after the first.

    Returns:
        The first rank's value.
    """
    if not (distributed.is_available() and distributed.is_initialized()) or distributed.get_world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values)
    return values[0]


def refuse_ranks(command: str) -> None:
    """Raise an InputError under torchrun, for what trains on one device.

    Args:
        command: What the user called.

    Raises:
        InputError: There are several ranks.
    """
    if rank_count() > 1:
        raise InputError(f"{command} trains each run on one device: start it without torchrun, or use qat train --seed")


def sequences_at_once(config: TrainConfig) -> int:
    """How many sequences one rank passes through the model at once: batch_size / (ranks * accumulate).

    Args:
        config: How to train; `batch_size` counts the sequences of a training step on all ranks together.

    Returns:
        The number of sequences.

    Raises:
        InputError: The batch cannot be divided into equal parts.
    """
    parts = rank_count() * config.accumulate
    if config.batch_size % parts:
        raise InputError(
            f"a batch of {config.batch_size} sequences cannot be divided equally into {parts} ({rank_count()} ranks, "
            f"--accumulate {config.accumulate}): make --batch-size a multiple of {parts}"
        )
    return config.batch_size // parts


def batch_in_words(config: TrainConfig, length: int) -> str:
    """What a training step is made of, for people.

    Args:
        config: How to train.
        length: Tokens a sequence.

    Returns:
        For instance "16 sequences of 1,024 tokens a training step: 2 ranks x 4 parts x 2 sequences".
    """
    factors = [f"{rank_count()} ranks"] if rank_count() > 1 else []
    factors += [f"{config.accumulate} parts"] if config.accumulate > 1 else []
    said = f"{config.batch_size} sequences of {length:,} tokens a training step"
    return f"{said}: {' x '.join([*factors, f'{sequences_at_once(config)} sequences'])}" if factors else said


def order_of_rank(order: list[int], config: TrainConfig) -> list[int]:
    """The part of a data order that this rank trains on.

    The training steps see the same batches however many ranks and parts there are.

    Args:
        order: The order of all ranks together, `batch_size` entries a training step.
        config: How to train.

    Returns:
        This rank's entries, in order.
    """
    at_once = sequences_at_once(config)
    mine = []
    for start in range(rank() * at_once, len(order), rank_count() * at_once):
        mine += order[start : start + at_once]
    return mine


def seed_of_rank(config: TrainConfig) -> int:
    """The seed of the weight noise and dropout on this rank: the same on all, or each its own.

    Args:
        config: How to train.

    Returns:
        A seed of 32 bits.
    """
    if config.rank_noise == "same" or rank() == 0:
        return config.seed
    return int(np.random.SeedSequence([config.seed, rank()]).generate_state(1)[0])
