"""Spectra in the log of a Trainer, and so in whatever reports its training."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

NAMES = {"loss": "loss", "grad_norm": "gradient_norm"}  # in the log of a Trainer, and what signals call them


class TrainerLog:
    """Logs scalars with `Trainer.log`: into `state.log_history`, and to every callback that reports.

    What is logged before `open` waits until then. When a training begins, the callbacks that report may not be set up
    yet. What the log holds already, as that of a resumed training may, is not logged again.

    Args:
        trainer: The Trainer.
        callback: The callback that measures. transformers' reporting callbacks are moved behind it, so that they still
            report when it measures the end of the training, before they close at the same event.
    """

    def __init__(self, trainer: Trainer, callback: TrainerCallback):
        self.trainer = trainer
        self._waiting: list[dict[str, float]] = []
        self._is_open = False
        self._read = len(trainer.state.log_history)
        _close_reports_after(trainer, callback)

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Log scalars at the Trainer's own step, or keep them until `open`.

        Args:
            values: The scalars by name.
            step: The training step of the run. The Trainer's own may count from a later start.
        """
        if not self._is_open:
            self._waiting.append(values)
            return
        state, control = self.trainer.state, self.trainer.control
        now = [entry for entry in state.log_history if entry.get("step") == state.global_step]
        if any(values.items() <= entry.items() for entry in now):
            return
        wanted = control.should_log
        Trainer.log(self.trainer, dict(values))
        self.trainer.control.should_log |= wanted  # which logging resets, before the Trainer has logged its own loss

    def open(self) -> None:
        """Log what waits, and what comes from now on."""
        self._is_open = True
        while self._waiting:
            self(self._waiting.pop(0), self.trainer.state.global_step)

    def new_numbers(self, state: TrainerState) -> Iterator[tuple[int, dict[str, float]]]:
        """What the Trainer logged of its training since the last call.

        Args:
            state: The Trainer's state.

        Yields:
            The training step, and its "loss" and "gradient_norm" as far as they were logged.
        """
        entries, self._read = state.log_history[self._read :], len(state.log_history)
        for entry in entries:
            numbers = {ours: float(entry[theirs]) for theirs, ours in NAMES.items() if theirs in entry}
            if numbers:
                yield int(entry["step"]), numbers


def _close_reports_after(trainer: Trainer, callback: TrainerCallback) -> None:
    """Move transformers' reporting callbacks behind another callback, in their order."""
    handler, kinds = trainer.callback_handler, tuple(INTEGRATION_TO_CALLBACK.values())
    if callback not in handler.callbacks:  # called by a callback that holds it
        return
    before = handler.callbacks[: handler.callbacks.index(callback)]
    reports: list[Any] = [each for each in before if isinstance(each, kinds)]
    if reports:  # a new list: an event is going through the old one
        rest = [each for each in handler.callbacks if each not in reports]
        place = rest.index(callback) + 1
        handler.callbacks = [*rest[:place], *reports, *rest[place:]]
