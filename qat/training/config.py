"""The settings of a training, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import dataclass

from spectra.backend.errors import InputError

SMALL_LLAMA_RATE, PRETRAINED_RATE = 3e-3, 2e-5  # a model trained on billions of tokens diverges at the first rate
SCHEDULES = ("constant", "cosine", "wsd")
DTYPES = ("auto", "float32", "bfloat16")
RANK_NOISE = ("same", "own")
TELEMETRY_LINES = 128  # of a run, unless telemetry_every says how many steps lie between two


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
        telemetry_every: Training steps between two lines of telemetry; 0 is a 128th of the run.
        seed: Seed of the data order and the weight noise.
        scale_learning_rate: The peak rate of the learned scales; None is `learning_rate`, as in the released code of
            ParetoQ (arXiv 2502.02631), where scales are parameters like all others. Their gradients are scaled down as
            in LSQ.
        dtype: "float32"; "bfloat16", in which matrix products are computed while the weights stay float32; or "auto",
            bfloat16 on a GPU that has it.
        compile: Whether torch.compile fuses the training step; None compiles on a GPU.
        accumulate: In how many equal parts a batch passes through the model, one after the other. The gradient is the
            mean over the batch all the same.
        activation_checkpointing: Whether activations are computed again in the backward pass, which saves memory and
            costs about a third more time.
        rank_noise: With several ranks (torchrun): whether weight noise and dropout are the "same" on all, as in the
            released code of WinQ, where each rank has the same seed, or each rank has its "own".

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
    telemetry_every: int = 0
    seed: int = 0
    scale_learning_rate: float | None = None
    dtype: str = "auto"
    compile: bool | None = None
    accumulate: int = 1
    activation_checkpointing: bool = False
    rank_noise: str = "same"

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("steps", "batch_size", "accumulate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is 1 or more, got {getattr(self, name)}")
        for name in ("learning_rate", "scale_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not (math.isfinite(rate) and rate > 0):
                raise InputError(f"{name} is a number above 0, got {rate}: try 1e-3")
        for name, known in (("dtype", DTYPES), ("rank_noise", RANK_NOISE)):
            if getattr(self, name) not in known:
                raise InputError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")
        if self.schedule not in SCHEDULES:
            raise InputError(f"unknown schedule {self.schedule!r}: choose one of {', '.join(SCHEDULES)}")
        for name in ("warmup", "decay"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is a share of the steps from 0 to 1, got {getattr(self, name)}")
        for name in ("weight_decay", "gradient_clip", "evaluate_every", "telemetry_every"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} is 0 or more, got {getattr(self, name)}")

    def evaluation_steps(self) -> tuple[int, ...]:
        """The training steps after which the validation loss is measured: 0, every `evaluate_every`, and the last."""
        every = self.evaluate_every or max(1, self.steps // 16)
        return (*range(0, self.steps, every), self.steps)

    def telemetry_interval(self) -> int:
        """Training steps between two lines of telemetry: `telemetry_every`, or a 128th of the run."""
        return self.telemetry_every or max(1, self.steps // TELEMETRY_LINES)


def check_seed(seed: int) -> None:
    """Check a seed.

    Args:
        seed: What a user gave.

    Raises:
        InputError: It is no whole number of 32 bits.
    """
    if not 0 <= seed < 2**32:
        raise InputError(f"a seed is a whole number from 0 to {2**32 - 1}, got {seed}")
