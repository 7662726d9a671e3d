"""The settings of a study with their defaults: frozen dataclasses, checked when they are made."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch

from qat.hessian import MODES
from qat.layers.config import QuantConfig
from qat.training.config import TrainConfig, check_seed
from qat.training.distillation import DistillationConfig
from qat.training.parq import PARQConfig
from qat.training.winq import WinQConfig, reset_steps
from spectra.algorithms.inertia import COUNT_PRODUCTS
from spectra.backend.errors import InputError
from spectra.runs.settings import MeasurementSettings

METHODS = ("baseline", "winq")
MEASURED_LOSSES = ("cross-entropy", "training")
REFERENCE, REFERENCE_BITS = "full-precision", 16  # the unquantized model, trained as long as the others
MINIMUM = {
    "length": 2,
    "validation_sequences": 1,
    "probes": 1,
    "lanczos_steps": 1,
    "deflate": 0,
    "count_products": 0,
    "measure_sequences": 1,
    "workers": 1,
}
UNSET = ("seeds", "distillation")


@dataclass(frozen=True)
class SmallLlamaConfig:
    """The default model, and how it is trained in full precision before anything is quantized.

    Args:
        vocabulary_size: Tokens of the tokenizer that is trained with it.
        hidden_size: Width of the residual stream.
        intermediate_size: Width of the feed-forward layers.
        layers: Decoder layers.
        heads: Attention heads.
        positions: The longest sequence, in tokens.
        steps: Training steps.
        batch_size: Sequences a step.
        length: Tokens a sequence.
        learning_rate: Peak of the cosine schedule.
        initializer_range: Standard deviation of the initial weights. It is three times the usual 0.02: a model this
            narrow learns faster from there.
        epochs: Upper bound on the passes over the text; a short text is trained on for fewer steps.
        seed: Of the initial weights and the data order.

    Raises:
        InputError: A size or count is below 1, or the seed is out of range.
    """

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
    initializer_range: float = 0.06
    epochs: float = 12.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name in ("hidden_size", "intermediate_size", "layers", "heads", "steps", "batch_size", "length"):
            if getattr(self, name) < 1:
                raise InputError(f"the small Llama's {name} is 1 or more, got {getattr(self, name)}")

    def steps_for(self, blocks: int) -> int:
        """The number of training steps on a text of so many blocks: `steps`, or fewer so as to keep to `epochs`."""
        return max(1, min(self.steps, math.ceil(self.epochs * blocks / self.batch_size)))


@dataclass(frozen=True)
class StudyConfig:
    """All settings of a study: what is trained, how, on which text, and how spectra are measured along the way.

    Args:
        out: The folder to make.
        bits: Bit-widths of the quantized weights, of `qat.layers.config.BITS`.
        methods: Training methods, of `METHODS`.
        model: A folder or hub name of a causal language model; None is the small Llama, trained on the text.
        tokenizer: A folder or hub name of another tokenizer than the model's own; "train" trains one on the text.
        text: Text files, UTF-8.
        dataset: A dataset on the hub instead of files. Without either, the source of the standard library is used.
        trust_remote_code: Run the code that a model or tokenizer of the hub brings along.
        device: "cpu", "cuda", or None for a GPU if there is one.
        quantizer: A scheme, or "auto" to choose it by bit-width; see `qat.QuantConfig`.
        group_size: Columns that share a scale, or None for one scale a row; see `qat.QuantConfig`.
        initial_scale: Where learned scales start, "max" or "mse"; see `qat.QuantConfig`.
        skip: Globs of module names to leave in full precision.
        activation_bits: The width of activations, see `qat.QuantConfig`.
        activation_symmetric: Whether their grids are symmetric about zero.
        cache_bits: The width of keys and values.
        length: Tokens a sequence, in training and in measuring.
        train: How to train.
        winq: Settings of the method "winq".
        validation_sequences: How many sequences a validation loss is the mean of.
        modes: Which Hessians, see `qat.hessian_mode`.
        probes: Probe vectors of a spectrum, see `spectra.slq`.
        lanczos_steps: Lanczos steps a probe vector.
        deflate: Outlying eigenvalues that are measured first and projected out. With 10 the interval of the
            root-mean-square eigenvalue is a tenth as wide as for as many Hessian-vector products without.
        count_products: Hessian-vector products at most for the count of negative eigenvalues in each spectrum
            (`spectra.count_below`), from which the negative share is read; 0 leaves it out.
        measure_sequences: How many training sequences the loss of a spectrum is the mean of.
        workers: How many runs are trained at once, each in a process of its own on one thread. A script that asks
            for more than 1 needs the usual `if __name__ == "__main__":`.
        seeds: Seeds of the data order and the weight noise: every method is trained once with each. The probe vectors
            are those of the first, so that spectra of all runs are paired. Empty: `train.seed` alone.
        reference: Whether the unquantized model is trained too, by the same settings and with the cross-entropy.
        distillation: Settings of distillation from the full-precision model; None: the loss is the cross-entropy.
        measured_loss: The loss whose Hessian is measured: the "cross-entropy", which makes spectra of all runs
            comparable, or that of the "training", with `distillation`. That of the reference is the cross-entropy.
        parq: When the quantizer "parq" anneals the weights to the grid.
        save_every: Training steps between two checkpoints; 0: none. None: by time, every two minutes or less often,
            so that saving takes at most a fiftieth of the training.
        small_llama: The default model.

    Raises:
        InputError: A bit-width, method, mode, count or device cannot be used.
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
    group_size: int | None = None
    initial_scale: str = "max"
    skip: tuple[str, ...] = ()
    activation_bits: int = 16
    activation_symmetric: bool = True
    cache_bits: int = 16
    length: int = 128
    train: TrainConfig = field(default_factory=TrainConfig)
    winq: WinQConfig = field(default_factory=WinQConfig)
    validation_sequences: int = 64
    modes: tuple[str, ...] = ("ste",)
    probes: int = 2
    lanczos_steps: int = 20
    deflate: int = 10
    count_products: int = COUNT_PRODUCTS
    measure_sequences: int = 4
    workers: int = 1
    seeds: tuple[int, ...] = ()
    reference: bool = True
    distillation: DistillationConfig | None = None
    measured_loss: str = "cross-entropy"
    parq: PARQConfig = field(default_factory=PARQConfig)
    save_every: int | None = None
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
        for name, minimum in MINIMUM.items():
            if getattr(self, name) < minimum:
                raise InputError(f"{name} is {minimum} or more, got {getattr(self, name)}")
        if self.save_every is not None and self.save_every < 0:
            raise InputError(f"save_every is a number of training steps, or 0 for none, got {self.save_every}")
        self._settle_seeds()
        self._check_loss_and_annealing()
        MeasurementSettings(count_products=self.count_products)
        choose_device(self.device)
        if "noisy" in self.modes and self.winq.sigma == 0:
            raise InputError("the noisy Hessian needs noise: give --sigma above 0, or leave noisy out of --modes")

    def _check_loss_and_annealing(self) -> None:
        """Raises InputError for settings of what is not used."""
        if self.measured_loss not in MEASURED_LOSSES:
            raise InputError(
                f"unknown measured loss {self.measured_loss!r}: choose one of {', '.join(MEASURED_LOSSES)}"
            )
        if self.measured_loss == "training" and self.distillation is None:
            raise InputError("--measured-loss training is the loss of --distill: give --distill, or leave it out")
        if self.parq != PARQConfig() and self.quantizer != "parq":
            raise InputError(
                "--parq-start, --parq-end and --parq-steepness anneal the quantizer parq, got "
                f"{self.quantizer!r}: give --quantizer parq"
            )

    def _settle_seeds(self) -> None:
        """`train.seed` is the first seed; `seeds` is empty unless there are several."""
        seeds = tuple(dict.fromkeys(self.seeds))
        for seed in seeds:
            check_seed(seed)
        if seeds:
            object.__setattr__(self, "train", replace(self.train, seed=seeds[0]))
        object.__setattr__(self, "seeds", seeds if len(seeds) > 1 else ())

    @property
    def all_seeds(self) -> tuple[int, ...]:
        """The seeds to train with, one or more."""
        return self.seeds or (self.train.seed,)

    def to_config(self) -> dict[str, Any]:
        """The settings for config.json; those that are not set are left out."""
        settings = {name: value for name, value in asdict(self).items() if name not in UNSET or value}
        if self.quantizer != "parq":
            del settings["parq"]
        if self.measured_loss == StudyConfig.measured_loss:
            del settings["measured_loss"]
        return settings

    def quantization(self, bits: float) -> QuantConfig:
        """How a model of this bit-width is quantized."""
        return QuantConfig(
            bits=bits,
            quantizer=self.quantizer,
            group_size=self.group_size,
            initial_scale=self.initial_scale,
            skip=self.skip,
            activation_bits=self.activation_bits,
            activation_symmetric=self.activation_symmetric,
            cache_bits=self.cache_bits,
        )

    def measuring_steps(self) -> tuple[int, ...]:
        """The training steps between the first and the last at which spectra are measured.

        They are the quarters of the run, and wherever WinQ resets, for every method alike.
        """
        steps = {round(self.train.steps * quarter / 4) for quarter in (1, 2, 3)}
        if "winq" in self.methods:
            steps |= set(reset_steps(self.winq.every, self.train.steps))
        return tuple(sorted(steps - {0, self.train.steps}))


def choose_device(name: str | None) -> torch.device:
    """The device of that name.

    Args:
        name: "cpu", "cuda", or None for a GPU if there is one.

    Returns:
        The device.

    Raises:
        InputError: Another name, or "cuda" where there is no GPU.
    """
    if name not in (None, "cpu", "cuda"):
        raise InputError(f"unknown device {name!r}: choose cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: leave out --device, or give --device cpu")
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
