"""Training on several devices: `torchrun` starts a process (a rank) for each, and the gradients are averaged (DDP)."""

from __future__ import annotations

import os

import numpy as np

from qat.training.config import TrainConfig
from spectra.backend.errors import InputError


def rank() -> int:
    """The number of this process among those that torchrun has started; 0 without torchrun."""
    return int(os.environ.get("RANK", 0))


def rank_count() -> int:
    """How many processes torchrun has started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


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
    said = f"{config.batch_size} sequences of {length:,} tokens a training step"
    if rank_count() * config.accumulate == 1:
        return said
    ranks = f"{rank_count()} ranks x " if rank_count() > 1 else ""
    return f"{said}: {ranks}{config.accumulate} parts x {sequences_at_once(config)} sequences"


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
