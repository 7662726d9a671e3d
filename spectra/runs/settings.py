"""How a spectrum is measured: what a probe, its records, config.json and the `spectra measure` command share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from numbers import Real
from typing import Any

import numpy as np

from spectra.algorithms.inertia import COUNT_PRODUCTS, FEWEST_PRODUCTS
from spectra.algorithms.lanczos import REORTHOGONALIZATION
from spectra.backend.errors import InputError
from spectra.backend.ranks import SPREADS
from spectra.estimates.quantities import NEAR_ZERO

DEFLATED = 20  # eigenvalues by default: on small language models the RMS eigenvalue's interval is then 1.5 % wide
IN_CONFIG = {"steps": "lanczos_steps", "seed": "probe_seed", "deflate": "deflated"}  # names in config.json that differ
IN_RECORD = {"probes": "probes", "steps": "lanczos_steps", "seed": "seed", "near_zero_tol": "near_zero_tol"}


class UnknownSettingError(InputError, TypeError):
    """A keyword that is no setting; a TypeError as for every unknown keyword."""


@dataclass(frozen=True, kw_only=True)
class MeasurementSettings:
    """How a spectrum is measured, whatever the model, the batches and the parameters.

    Args:
        probes: Random probe vectors. More of them narrow the intervals.
        steps: Lanczos steps for each probe vector. More of them resolve finer.
        seed: Seed of the probe vectors. Spectra with the same seed are paired.
        deflate: Eigenvalues of largest magnitude that are found first and taken out of the recurrence. None: 20 where
            the search for them fits in a quarter of the free memory, else none.
        reorthogonalize: "full", "none" or "auto", see `spectra.lanczos`.
        near_zero_tol: An eigenvalue counts as near zero where |lambda| is below this.
        microbatch: Rows of a batch in one forward pass. None: all of them, see `spectra.HessianOperator`.
        engine: How blocks of products are computed. None: the operator's own choice.
        precision: Precision of the products. None: that of the weights, see `spectra.HessianOperator`.
        spread: "probes" or "batches" over the ranks of torch.distributed, or "none".
        batch_groups: Groups of batches for `spectra.batch_noise`, at least 2. 0: batch noise is not measured.
        count_products: The largest number of products for the count of eigenvalues below zero after a change of
            variables (`spectra.count_below`), from which the negative share is read. It needs 100 or more. 0: none.

    Raises:
        InputError: If a value is out of its range. Engine and precision are checked by the operator.

    Example:
        >>> MeasurementSettings(probes=8).steps
        100
    """

    probes: int = 2
    steps: int = 100
    seed: int = 0
    deflate: int | None = None
    reorthogonalize: str = "auto"
    near_zero_tol: float = NEAR_ZERO
    microbatch: int | None = None
    engine: str | None = None
    precision: str | None = None
    spread: str = "none"
    batch_groups: int = 0
    count_products: int = COUNT_PRODUCTS

    def __post_init__(self) -> None:
        if not (_is_count(self.probes, 1) and _is_count(self.steps, 1)):
            raise InputError(f"probes and steps must be at least 1, got probes={self.probes}, steps={self.steps}")
        if not _is_count(self.seed):
            raise InputError(f"seed must be a whole number, got {self.seed!r}")
        if self.deflate is not None and not _is_count(self.deflate, 0):
            raise InputError(f"deflate must be a number of eigenvalues, 0 or more, got {self.deflate!r}")
        if not (isinstance(self.near_zero_tol, Real) and self.near_zero_tol > 0):
            raise InputError(f"near_zero_tol must be a positive number, got {self.near_zero_tol!r}")
        if self.microbatch is not None and not _is_count(self.microbatch, 1):
            raise InputError(f"microbatch must be a number of rows, at least 1, got {self.microbatch!r}")
        if not _is_count(self.batch_groups, 0) or self.batch_groups == 1:
            raise InputError(f"batch_groups must be 0, or at least 2 groups, got {self.batch_groups!r}")
        if not _is_count(self.count_products, 0) or 0 < self.count_products < FEWEST_PRODUCTS:
            raise InputError(
                f"count_products must be 0, or at least {FEWEST_PRODUCTS} products, got {self.count_products!r}"
            )
        for name, known in (("reorthogonalize", REORTHOGONALIZATION), ("spread", SPREADS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")

    def changed(self, **options: Any) -> MeasurementSettings:
        """The same settings but for some.

        Args:
            **options: Fields by name.

        Returns:
            The settings.

        Raises:
            UnknownSettingError: If there is no such field.
            InputError: If a value is out of its range.
        """
        known = [field.name for field in fields(self)]
        for name in options:
            if name not in known:
                raise UnknownSettingError(f"there is no setting {name!r}: choose among {', '.join(known)}")
        return replace(self, **options)

    def to_config(self) -> dict[str, Any]:
        """The settings under the names that config.json has for them; what is None is left out.

        Returns:
            Plain values by name. `deflated` is the number that is tried where `deflate` is None.
        """
        values = {IN_CONFIG.get(field.name, field.name): getattr(self, field.name) for field in fields(self)}
        if self.deflate is None:
            values["deflated"] = DEFLATED
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> MeasurementSettings:
        """The settings that a run was measured with.

        Args:
            config: The contents of the run's config.json; other entries are ignored, missing ones take defaults.

        Returns:
            The settings, with which another run can be measured in the same way.

        Raises:
            InputError: If an entry is out of its range.
        """
        names = {field.name: IN_CONFIG.get(field.name, field.name) for field in fields(cls)}
        return cls(**{name: config[key] for name, key in names.items() if config.get(key) is not None})

    def to_record(self) -> dict[str, Any]:
        """The settings that every record repeats, under the names of `SpectrumRecord`'s fields."""
        return {key: getattr(self, name) for name, key in IN_RECORD.items()}

    def operator_options(self) -> dict[str, Any]:
        """The keywords that an operator is built with: microbatch always, the others where they are set."""
        options = {"engine": self.engine, "precision": self.precision}
        options["spread"] = "batches" if self.spread == "batches" else None
        return {"microbatch": self.microbatch} | {key: value for key, value in options.items() if value is not None}


def _is_count(value: Any, smallest: int | None = None) -> bool:
    """Whether the value is an integer (of Python or NumPy), no bool, and not below `smallest`."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        return False
    return smallest is None or int(value) >= smallest
