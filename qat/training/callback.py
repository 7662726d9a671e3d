"""WinQ as a callback of the Hugging Face Trainer. Apart from winq.py, so that only this file imports transformers."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from transformers import TrainerCallback

from qat.training.winq import PRESETS, AroundReset, WinQ, WinQConfig
from spectra.backend.errors import InputError


class WinQCallback(TrainerCallback):
    """Noise while the Trainer trains, and a reset toward the grid every so often (WinQ, arXiv 2605.17471).

    every: steps, or a fraction of the run, as in WinQConfig; alpha: the share that moves toward Q(W); sigma: the
    size of the weight noise; noise_scales: noise on the learned scales too. around_reset: called as
    around_reset("before-reset" | "after-reset", step). Steps are optimizer steps, also when resuming.
    The noise comes off when training ends. If training raises, the Trainer tells its callbacks nothing: call `stop()`,
    or leave it, since the noise acts in train mode only and the next training sets it anew.
    Raises InputError for a value out of range, and when training starts on a model without quantized layers.
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
        """The settings of the paper's text ("paper") or of its released code ("released"): see qat.PRESETS."""
        if name not in PRESETS:
            raise InputError(f"preset must be one of {', '.join(PRESETS)}; got {name!r}")
        return cls(**asdict(PRESETS[name]), around_reset=around_reset)

    @property
    def config(self) -> WinQConfig:
        return self.winq.config

    @property
    def resets(self) -> list[int]:
        """The steps at which this run has reset the weights so far."""
        return self.winq.resets

    def stop(self) -> None:
        """Takes the noise off, for when training raised."""
        self.winq.stop()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.winq.start(kwargs["model"], state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.winq.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.winq.stop()
