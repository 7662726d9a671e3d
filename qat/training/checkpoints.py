"""Checkpoints along a training: killed at any moment, it goes on from the last one and ends with the same bits.

The Hugging Face Trainer saves and loads optimizer, schedule, random states and its own counters. The weights are one
safetensors file, and so is what telemetry and probes carry from step to step. A checkpoint counts once its last file,
which lists the others, is on the disk. Nothing in it is unpickled but tensors and plain numbers (`weights_only=True`).
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import distributed, nn
from transformers import Trainer, TrainerCallback

from spectra.backend.errors import InputError, first_line
from spectra.runs.files import sync, sync_folder, write_whole
from spectra.runs.folder import RECORDS, TELEMETRY
from spectra.runs.jsonlines import encoded

CHECKPOINTS = "checkpoints"  # the folder in that of a run
COMPLETE, WEIGHTS = "complete.json", "weights.safetensors"
APPENDED = (RECORDS, TELEMETRY)  # files of a run that grow along a training
KEPT = 2  # checkpoints: should the newer one be damaged, the other is there
# Saving by time: it may take this share of a training, and a short training is not saved at all.
SAVING_SHARE, SHORTEST_INTERVAL = 0.02, 120.0
CLOCK_STEPS = 8  # training steps between two looks at the clock where several processes have to agree
UNREADABLE = (OSError, SafetensorError, pickle.UnpicklingError, RuntimeError, ValueError, KeyError, TypeError, EOFError)


class HasState(Protocol):
    """What carries something from one training step to a later one, such as `Telemetry` and `spectra.SpectrumProbe`."""

    def save_state(self, path: Path) -> None:
        """Write it to a file."""
        ...

    def load_state(self, path: Path) -> None:
        """Take it over from a file of `save_state`."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, complete.

    Attributes:
        folder: Its folder.
        step: The training steps that were done.
        sizes: How long each growing file of the run was then, in bytes.
    """

    folder: Path
    step: int
    sizes: Mapping[str, int]


def last_checkpoint(run_folder: Path) -> Checkpoint | None:
    """The last complete checkpoint of a run.

    Args:
        run_folder: The run's folder; it may not be there.

    Returns:
        The checkpoint; None if there is none, or if the run's files are shorter than they were when it was written.
    """
    found = [_complete(folder) for folder in (run_folder / CHECKPOINTS).glob("checkpoint-*")]
    fitting = [checkpoint for checkpoint in found if checkpoint is not None and _fits(checkpoint, run_folder)]
    return max(fitting, key=lambda checkpoint: checkpoint.step, default=None)


def remove_checkpoints(run_folder: Path, *, but: Checkpoint | None = None) -> None:
    """Remove the checkpoints of a run; a kill meanwhile leaves none that looks complete and is not.

    Args:
        run_folder: The run's folder.
        but: A checkpoint to keep, with those before it.
    """
    for folder in (run_folder / CHECKPOINTS).glob("*"):
        found = None if but is None else _complete(folder)
        if but is None or found is None or found.step > but.step:
            _remove(folder)
    if but is None:
        shutil.rmtree(run_folder / CHECKPOINTS, ignore_errors=True)


def _remove(folder: Path) -> None:
    """Remove a checkpoint, first the file that makes it count."""
    (folder / COMPLETE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


class Checkpoints(TrainerCallback):
    """When a training is saved, where, and what of it beside the Trainer's own state.

    Args:
        run_folder: The run's folder; the checkpoints are in `checkpoints/` there.
        every: Training steps between two checkpoints; 0: none is written. None: by time, so that saving takes at most a
            fiftieth of the training, and two minutes lie between two checkpoints or more.
        resumed: The checkpoint to go on from.
        parts: What else has a state, by the name of its file.
        clock: Gives the time in seconds.
    """

    def __init__(
        self,
        run_folder: Path,
        *,
        every: int | None = None,
        resumed: Checkpoint | None = None,
        parts: Mapping[str, HasState] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run_folder, self.folder = run_folder, run_folder / CHECKPOINTS
        self.every, self.resumed, self.parts, self.clock = every, resumed, dict(parts or {}), clock
        self.longest = 0.0  # seconds that a checkpoint took
        self.saved_at = clock()
        self.written = 0
        self.failed = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take over the state of the parts; the Trainer has loaded its own."""
        self.saved_at = self.clock()
        if self.resumed is not None:
            for name, part in self.parts.items():
                part.load_state(self.resumed.folder / f"{name}.safetensors")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Ask for a checkpoint where one is due. It is written when all callbacks have seen this step."""
        if self._due(state.global_step, last=state.global_step >= state.max_steps):
            control.should_save = True

    def close(self) -> None:
        """Remove the folder if nothing was saved; the Trainer makes it in any case."""
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _due(self, step: int, *, last: bool) -> bool:
        """Whether to save after this step; the last one too, if the training was long enough to be saved before."""
        if self.every == 0:
            return False
        if last and (self.written or self.resumed is not None):
            return True
        if self.every is not None:
            return step % self.every == 0
        if not _shares_work():
            return self._time_has_come()
        if step % CLOCK_STEPS:
            return False
        answer = [self._time_has_come()]
        distributed.broadcast_object_list(answer)  # clocks differ, and every process saves its random state
        return answer[0]

    def _time_has_come(self) -> bool:
        return self.clock() - self.saved_at >= max(SHORTEST_INTERVAL, self.longest / SAVING_SHARE)

    def save(self, step: int, write: Callable[[], None], *, main: bool) -> None:
        """Write a checkpoint. Where there is no room on the disk, the training goes on with the one before.

        Args:
            step: The training steps that are done.
            write: Writes the Trainer's files to `checkpoints/checkpoint-STEP`.
            main: Whether this is the process that writes what all have in common.
        """
        started, folder = self.clock(), self.folder / f"checkpoint-{step}"
        try:
            if main:
                (folder / COMPLETE).unlink(missing_ok=True)
                folder.mkdir(parents=True, exist_ok=True)
                for name, part in self.parts.items():
                    part.save_state(folder / f"{name}.safetensors")
            write()
            if _shares_work():
                distributed.barrier()
            if main:
                self._complete(folder, step)
        except (OSError, SafetensorError, RuntimeError) as error:
            if _shares_work() or isinstance(error, torch.OutOfMemoryError):
                raise
            shutil.rmtree(folder, ignore_errors=True)
            if not self.failed:
                self.failed = True
                warnings.warn(
                    f"no checkpoint was written at training step {step} ({first_line(error)}): the training goes on; "
                    "make room on the disk, or turn checkpoints off with --save-every 0",
                    stacklevel=2,
                )
        else:
            self.written += 1
        self.saved_at = self.clock()
        self.longest = max(self.longest, self.saved_at - started)

    def _complete(self, folder: Path, step: int) -> None:
        """Bring the files to the disk, then the one that makes the checkpoint count, then remove older ones."""
        files = sorted(path for path in folder.iterdir() if path.name != COMPLETE)
        for path in files:
            sync(path)
        sync_folder(folder)
        sizes = {name: _size(self.run_folder / name) for name in APPENDED}
        content = {"step": step, "run": sizes, "files": {path.name: path.stat().st_size for path in files}}
        write_whole(folder / COMPLETE, encoded(content) + b"\n")
        sync_folder(self.folder)
        there = sorted(self.folder.glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        for older in there[:-KEPT]:
            _remove(older)


class CheckpointingTrainer(Trainer):
    """The Trainer with checkpoints that are complete or do not count, and hold the latent weights as they are."""

    checkpoints: Checkpoints | None = None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        assert self.checkpoints is not None
        write = super()._save_checkpoint
        self.checkpoints.save(self.state.global_step, lambda: write(model, trial), main=self.args.should_save)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        assert output_dir is not None
        os.makedirs(output_dir, exist_ok=True)
        save_file(_separate(_state(self.model)), os.path.join(output_dir, WEIGHTS))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        path = Path(resume_from_checkpoint) / WEIGHTS
        there = _state(self.model)
        try:
            saved = load_file(path)
            with torch.no_grad():
                for name in there.keys() | saved.keys():
                    there[name].copy_(saved[name])
        except UNREADABLE as error:
            raise _unreadable(path.parent, error) from None

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except UNREADABLE as error:
            raise _unreadable(checkpoint, error) from None

    def _load_rng_state(self, checkpoint: str | None) -> None:
        try:
            super()._load_rng_state(checkpoint)
        except UNREADABLE as error:
            raise _unreadable(checkpoint, error) from None


def _shares_work() -> bool:
    """Whether several processes train together."""
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def _state(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer under one name each, tied ones once."""
    return {name: tensor.data for name, tensor in (*model.named_parameters(), *model.named_buffers())}


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors as the file format takes them: contiguous, and none in the memory of another."""
    places: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        found[name] = tensor.clone(memory_format=torch.contiguous_format) if place in places else tensor.contiguous()
        places.add(place)
    return found


def _unreadable(folder: Any, error: BaseException) -> InputError:
    return InputError(
        f"the checkpoint {folder} cannot be read ({first_line(error)}): delete that folder, and the same command "
        "goes on from the one before, or starts again"
    )


def _complete(folder: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None if one of its files is not there as it was written."""
    try:
        content = json.loads((folder / COMPLETE).read_bytes())
        whole = all(_size(folder / Path(name).name) == size for name, size in content["files"].items())
        sizes = {name: int(content["run"][name]) for name in APPENDED}
        return Checkpoint(folder, int(content["step"]), sizes) if whole else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _fits(checkpoint: Checkpoint, run_folder: Path) -> bool:
    """Whether the run's files hold what they held at the checkpoint: as many bytes or more, and whole lines."""
    for name, size in checkpoint.sizes.items():
        if _size(run_folder / name) < size:
            return False
        if size:
            with open(run_folder / name, "rb") as file:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    return False
    return True


def _size(path: Path) -> int:
    """The length of a file in bytes; 0 if it is not there."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
