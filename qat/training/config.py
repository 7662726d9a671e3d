"""How to train: an optimizer, a learning-rate schedule, a fixed data order."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.backend.errors import InputError

SMALL_LLAMA_RATE, PRETRAINED_RATE = 3e-3, 2e-5  # a model trained on billions of tokens breaks at the first


SCHEDULES = ("constant", "cosine", "wsd")


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, a learning-rate schedule, a fixed data order. Validated when made.

    schedule: "constant"; "cosine", to 0 at the end; "wsd" (warmup, stable, decay), linearly to 0 over the last fifth.
    warmup: the share of the steps over which the rate rises linearly from 0, whatever the schedule.
    evaluate_every: steps between two validation losses, 0 for a sixteenth of the run.
    """

    steps: int = 128
    batch_size: int = 16
    learning_rate: float = SMALL_LLAMA_RATE
    schedule: str = "constant"
    warmup: float = 0.0
    decay: float = 0.2
    weight_decay: float = 0.0
    gradient_clip: float = 1.0
    evaluate_every: int = 0
    telemetry_every: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("steps", "batch_size", "telemetry_every"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is 1 or more, got {getattr(self, name)}")
        if not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise InputError(f"learning_rate is a number above 0, got {self.learning_rate}: try 1e-3")
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share of the steps from 0 to 1, got {getattr(self, name)}")
        for name in ("weight_decay", "gradient_clip", "evaluate_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is 0 or more, got {getattr(self, name)}")

    def evaluation_steps(self) -> tuple[int, ...]:
        """After which steps the validation loss is taken: 0, every evaluate_every, and the last."""
        every = self.evaluate_every or max(1, self.steps // 16)
        return (*range(0, self.steps, every), self.steps)


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is a whole number from 0 to {2**32 - 1}, got {seed}")
