"""WinQ and PARQ as callbacks of the Hugging Face Trainer. The methods themselves do not need transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from qat.training.parq import PARQ, PARQConfig
from qat.training.winq import PRESETS, AroundReset, WinQ, WinQConfig
from spectra.backend.errors import InputError


class WinQCallback(TrainerCallback):
    """Weight noise while the Trainer trains, and resets toward the quantization grid (WinQ, arXiv 2605.17471).

    Training steps are optimizer steps, also when a training is resumed. The weight noise is removed when training ends.
    If training raises, the Trainer does not tell its callbacks: call `stop()` to remove the noise. It acts in train
    mode only, and the next training sets it anew.

    Args:
        every: When to reset, as in `qat.WinQConfig`.
        alpha: How far a reset moves the weights toward Q(W), 0 to 1.
        sigma: Standard deviation of the weight noise.
        noise_scales: Whether learned scales get the same noise.
        around_reset: Called as around_reset("before-reset", step) and around_reset("after-reset", step).

    Raises:
        InputError: A value is out of range; or, when training starts, the model has no quantized layers.
    """

    def __init__(
        self,
        every: float = 0.25,
        alpha: float = 0.4,
        sigma: float = 1e-3,
        *,
        noise_scales: bool = False,
        around_reset: AroundReset | None = None,
    ) -> None:
        config = WinQConfig(every=every, alpha=alpha, sigma=sigma, noise_scales=noise_scales)
        self.winq = WinQ(config, around_reset=around_reset)

    @classmethod
    def preset(cls, name: str, *, around_reset: AroundReset | None = None) -> WinQCallback:
        """The callback with the settings of the paper's text or of its released code.

        Args:
            name: "paper" or "released", see `qat.PRESETS`.
            around_reset: As for the class.

        Returns:
            The callback.

        Raises:
            InputError: There is no such preset.
        """
        if name not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
        return cls(**asdict(PRESETS[name]), around_reset=around_reset)

    @property
    def config(self) -> WinQConfig:
        """The settings in use."""
        return self.winq.config

    @property
    def resets(self) -> list[int]:
        """The training steps at which this run has reset the weights so far."""
        return self.winq.resets

    def stop(self) -> None:
        """Remove the weight noise after training raised."""
        self.winq.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Add the weight noise and plan the resets."""
        self.winq.start(kwargs["model"], state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reset the weights where a reset is due."""
        self.winq.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Remove the weight noise."""
        self.winq.stop()


class PARQCallback(TrainerCallback):
    """Anneals weights that are quantized by "parq" to their grid while the Trainer trains (PARQ, arXiv 2503.15748).

    The annealing follows the optimizer steps, also when a training is resumed. When training ends, the weights are on
    the grid. If training raises, the Trainer does not tell its callbacks: call `stop()`. Evaluation is always on the
    grid.

    Args:
        start: The part of the run that trains in full precision, as in `qat.PARQConfig`.
        end: The part of the run after which the weights are on the grid.
        steepness: Of the sigmoid between them.

    Raises:
        InputError: A value is out of range; or, when training starts, no layer of the model is quantized by "parq".
    """

    def __init__(self, start: float = 0.0, end: float = 0.9, steepness: float = 10.0) -> None:
        self.parq = PARQ(PARQConfig(start=start, end=end, steepness=steepness))

    @property
    def config(self) -> PARQConfig:
        """The settings in use."""
        return self.parq.config

    def stop(self) -> None:
        """Put the weights on the grid after training raised."""
        self.parq.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Anneal as far as the first step of this training asks for."""
        self.parq.start(kwargs["model"], state.max_steps, done=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Anneal as far as the next step asks for."""
        self.parq.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the weights on the grid."""
        self.parq.stop()
