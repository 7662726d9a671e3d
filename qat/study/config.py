"""The settings of a training and of a study, with their defaults: frozen dataclasses, checked when they are made.

Nothing heavy is imported here, so that a command shows its help and refuses a wrong option at once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch

from qat.hessian import MODES
from qat.layers.config import QuantConfig
from qat.training.config import TrainConfig, check_seed
from qat.training.winq import WinQConfig, reset_steps
from spectra.backend.errors import InputError

METHODS = ("baseline", "winq")


@dataclass(frozen=True)
class SmallLlamaConfig:
    """The default model and how it is trained in full precision before anything is quantized."""

    vocabulary_size: int = 1024
    hidden_size: int = 64
    intermediate_size: int = 176
    layers: int = 3
    heads: int = 4
    positions: int = 2048
    steps: int = 320
    batch_size: int = 16
    length: int = 128
    learning_rate: float = 6e-3
    initializer_range: float = 0.06  # three times the usual: so narrow a model learns faster from there
    epochs: float = 12.0  # at most so many passes over the text, however many steps are asked for
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "steps", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"the small Llama's {name} is 1 or more, got {getattr(self, name)}")

    def steps_for(self, blocks: int) -> int:
        """The number of steps on a text of so many blocks."""
        return max(1, min(self.steps, math.ceil(self.epochs * blocks / self.batch_size)))


@dataclass(frozen=True)
class StudyConfig:
    """All settings of a study. Validated when made: bit-widths, methods, modes and counts.

    model: a hub name or a folder; None is the small Llama trained here. tokenizer: another than the model's own.
    text, dataset: files or a hub dataset; neither is the standard library's source. modes: see `qat.hessian_mode`.
    probes, lanczos_steps, deflate: of every spectrum, see `spectra.slq`. With 10 outliers deflated the interval of the
    root-mean-square eigenvalue is a tenth of what as many products give without.
    measure_sequences: how many training sequences a spectrum's loss is the mean of. workers: how many runs are trained
    at once, each in a process of its own on one thread; a script that asks for more than 1 needs the usual
    `if __name__ == "__main__":`.
    """

    out: str
    bits: tuple[float, ...] = (1, 2, 4)
    methods: tuple[str, ...] = METHODS
    model: str | None = None
    tokenizer: str | None = None
    text: tuple[str, ...] = ()
    dataset: str | None = None
    trust_remote_code: bool = False
    device: str | None = None
    quantizer: str = "auto"
    skip: tuple[str, ...] = ()
    length: int = 128
    train: TrainConfig = field(default_factory=TrainConfig)
    winq: WinQConfig = field(default_factory=WinQConfig)
    validation_sequences: int = 64
    modes: tuple[str, ...] = ("ste",)
    probes: int = 2
    lanczos_steps: int = 20
    deflate: int = 10
    measure_sequences: int = 4
    workers: int = 1
    small_llama: SmallLlamaConfig = field(default_factory=SmallLlamaConfig)

    def __post_init__(self) -> None:
        for name, known in (("methods", METHODS), ("modes", MODES)):
            chosen = getattr(self, name)
            for one in chosen:
                if one not in known:
                    raise InputError(f"unknown {name[:-1]} {one!r}: choose from {', '.join(known)}")
            object.__setattr__(self, name, tuple(dict.fromkeys(chosen)))
        object.__setattr__(self, "bits", tuple(dict.fromkeys(self.quantization(bits).bits for bits in self.bits)))
        for name in ("bits", "methods", "modes"):
            if not getattr(self, name):
                raise InputError(f"{name} is empty: give at least one, separated by commas")
        least = {
            "length": 2,
            "validation_sequences": 1,
            "probes": 1,
            "lanczos_steps": 1,
            "deflate": 0,
            "measure_sequences": 1,
            "workers": 1,
        }
        for name, smallest in least.items():
            if getattr(self, name) < smallest:
                raise InputError(f"{name} is {smallest} or more, got {getattr(self, name)}")
        choose_device(self.device)
        if "noisy" in self.modes and self.winq.sigma == 0:
            raise InputError("the noisy Hessian needs noise: give --sigma above 0, or leave noisy out of --modes")

    def quantization(self, bits: float) -> QuantConfig:
        """How a model of so many bits is quantized."""
        return QuantConfig(bits=bits, quantizer=self.quantizer, skip=self.skip)

    def measuring_steps(self) -> tuple[int, ...]:
        """Where spectra are taken between the start and the end: each quarter, and wherever WinQ resets."""
        steps = {round(self.train.steps * quarter / 4) for quarter in (1, 2, 3)}
        if "winq" in self.methods:
            steps |= set(reset_steps(self.winq.every, self.train.steps))
        return tuple(sorted(steps - {0, self.train.steps}))


def choose_device(name: str | None) -> torch.device:
    """The device of that name, "cpu" or "cuda"; None is a GPU if there is one. Raises InputError for one not here."""
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: leave out --device, or give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
