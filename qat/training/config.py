"""The settings of a training, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.backend.errors import InputError

SMALL_LLAMA_RATE, PRETRAINED_RATE = 3e-3, 2e-5  # a model trained on billions of tokens diverges at the first rate
SCHEDULES = ("constant", "cosine", "wsd")


@dataclass(frozen=True)
class TrainConfig:
    """How to train: AdamW, a learning-rate schedule, a fixed data order.

    Args:
        steps: Training steps.
        batch_size: Sequences a training step.
        learning_rate: The peak of the schedule.
        schedule: "constant"; "cosine", to 0 at the end; or "wsd" (warmup, stable, decay), linearly to 0 at the end.
        warmup: The share of the steps over which the rate rises linearly from 0, whatever the schedule.
        decay: The share of the steps over which "wsd" decays.
        weight_decay: Weight decay of AdamW on matrices; scales and biases get none.
        gradient_clip: The largest gradient norm; 0 does not clip.
        evaluate_every: Training steps between two validation losses; 0 is a sixteenth of the run.
        telemetry_every: Training steps between two lines of telemetry.
        seed: Seed of the data order and the weight noise.

    Raises:
        InputError: A value is out of range.
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
        """The training steps after which the validation loss is measured: 0, every `evaluate_every`, and the last."""
        every = self.evaluate_every or max(1, self.steps // 16)
        return (*range(0, self.steps, every), self.steps)


def check_seed(seed: int) -> None:
    """Check a seed.

    Args:
        seed: What a user gave.

    Raises:
        InputError: It is no whole number of 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is a whole number from 0 to {2**32 - 1}, got {seed}")
