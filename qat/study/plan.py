"""The runs of a study: which there are, in which folders, and in which order they are trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qat.study.config import REFERENCE, REFERENCE_BITS, StudyConfig
from qat.study.presentation import REFERENCE_LABEL, run_label, with_seed


@dataclass(frozen=True)
class PlannedRun:
    """One training of a study.

    Attributes:
        bits: The bit-width of the quantized weights; 16 for the reference.
        method: "baseline", "winq", or "full-precision" for the reference.
        seed: Of the data order and the weight noise.
        folder: The run folder.
        shown_seed: The seed, where the study has several; else None.
        activation_bits: The bit-width of activations.
        cache_bits: The bit-width of keys and values.
    """

    bits: float
    method: str
    seed: int
    folder: Path
    shown_seed: int | None = None
    activation_bits: int = 16
    cache_bits: int = 16

    @property
    def widths(self) -> dict[str, int]:
        """The bit-widths of activations, and of keys and values."""
        return {"activation_bits": self.activation_bits, "cache_bits": self.cache_bits}

    @property
    def is_reference(self) -> bool:
        """Whether it is the unquantized model."""
        return self.method == REFERENCE

    @property
    def label(self) -> str:
        """The name of the run in tables and figures, such as "2-bit WinQ"."""
        label = REFERENCE_LABEL if self.is_reference else run_label(self.bits, self.method, **self.widths)
        return with_seed(label, self.shown_seed)

    @property
    def name(self) -> str:
        """The name of the run in messages, such as "2 bit, winq"."""
        return with_seed(REFERENCE_LABEL if self.is_reference else f"{self.bits:g} bit, {self.method}", self.shown_seed)


def plan_of(config: StudyConfig) -> list[PlannedRun]:
    """The runs of a study in the order of its table: first the reference, where it is trained.

    Args:
        config: The study's settings.

    Returns:
        The runs. Folders are named by bit-width and method, and by seed where there are several.
    """
    kinds: list[tuple[float, str]] = [(REFERENCE_BITS, REFERENCE)] if config.reference else []
    kinds += [(bits, method) for bits in config.bits for method in config.methods]
    return [
        PlannedRun(
            bits,
            method,
            seed,
            Path(config.out) / ((method if method == REFERENCE else f"{bits:g}bit-{method}") + _ending(config, seed)),
            seed if config.seeds else None,
            **({} if method == REFERENCE else widths_of(config)),
        )
        for bits, method in kinds
        for seed in config.all_seeds
    ]


def widths_of(config: StudyConfig) -> dict[str, int]:
    """The bit-widths of activations, and of keys and values, of a study's quantized runs."""
    return {"activation_bits": config.activation_bits, "cache_bits": config.cache_bits}


def _ending(config: StudyConfig, seed: int) -> str:
    return f"-seed{seed}" if config.seeds else ""


def queue(plan: Sequence[PlannedRun], *, workers: int) -> list[int]:
    """The order in which runs are trained.

    Runs of one bit-width share the spectrum of their start. Where several are trained at once, those of one bit-width
    are far from each other, so that the first has measured it when the next begins. The reference, the shortest, comes
    last, so that all end at much the same time.

    Args:
        plan: The runs.
        workers: How many are trained at once.

    Returns:
        Indices of the plan.
    """
    if workers <= 1:
        return list(range(len(plan)))
    rank = [sum(other.bits == run.bits for other in plan[:index]) for index, run in enumerate(plan)]
    return sorted(range(len(plan)), key=lambda index: (plan[index].is_reference, rank[index], index))
