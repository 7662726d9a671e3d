"""Training losses that stay on the device until somebody needs them.

Copying a loss to the host waits until the device has finished the step, and the device then waits for the host to
prepare the next. So losses are kept where they are, and copied several at a time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, distributed

LOOK_EVERY = 16  # training steps between two copies to the host, where the device is not the host


def look_every(device: torch.device) -> int:
    """How many training steps lie between two looks: one on a CPU, where a look costs nothing."""
    return 1 if device.type == "cpu" else LOOK_EVERY


class StepLosses:
    """The losses of the training steps since the last look.

    Args:
        every: After so many steps a look is due.
    """

    def __init__(self, every: int) -> None:
        self.every = every
        self._waiting: dict[int, Tensor] = {}

    def add(self, step: int, loss: Tensor) -> None:
        """Add a loss to that of a training step. It is not copied to the host.

        Args:
            step: The training step.
            loss: A scalar without a graph; with gradient accumulation, a part of the step's loss.
        """
        self._waiting[step] = self._waiting[step] + loss if step in self._waiting else loss

    @property
    def due(self) -> bool:
        """Whether enough steps were made since the last look."""
        return len(self._waiting) >= self.every

    def look(self) -> list[tuple[int, float]]:
        """Copy the losses since the last look to the host. All ranks must call it at the same steps.

        Returns:
            Pairs (training step, loss), up to the first loss that is not finite; the mean over the ranks, where there
            are several.
        """
        if not self._waiting:
            return []
        losses = torch.stack([loss.float() for loss in self._waiting.values()])
        if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
            distributed.all_reduce(losses)
            losses /= distributed.get_world_size()
        found = []
        for step, loss in zip(self._waiting, losses.tolist(), strict=True):
            found.append((step, loss))
            if not math.isfinite(loss):
                break
        self._waiting = {}
        return found
