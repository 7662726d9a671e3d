"""One measured spectrum as plain numbers, or why there is none: a line of records.jsonl."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from spectra.backend.errors import InputError
from spectra.estimates.estimate import Estimate
from spectra.runs.jsonlines import plain

VERSION = "schema_version"  # the key in records and in config.json
VERSION_NUMBER = 3  # 1: checks stand among the extras; 2: apart from them; neither names its version; 3: names it
REQUIRED = (
    *("step", "mode", "loss", "gradient_norm", "dimension", "estimates", "near_zero_tol"),
    *("probes", "lanczos_steps", "seed", "reorthogonalize", "products", "seconds"),
)
OK, FAILED = "ok", "failed"
NUMBERS = ("loss", "gradient_norm", "near_zero_tol", "seconds", "wall_time")
CHECKS = ("symmetry_gap", "linearity_gap", "repeatability", "precision_error")  # in older records among the extras
KINDS = {
    **dict.fromkeys(("step", "dimension", "probes", "lanczos_steps", "seed", "products"), (int,)),
    **dict.fromkeys(NUMBERS, (int, float)),
    **dict.fromkeys(("mode", "reorthogonalize", "label", "dtype", "device", "engine"), (str,)),
    **dict.fromkeys(("block", "weights", "status", "reason", "remedy"), (str,)),
    **dict.fromkeys(("estimates", "extras", "checks", "versions", "batch_noise", "count"), (dict,)),
    "notes": (list,),
    "lanczos": (str, type(None)),
}
KIND_NAMES = {
    int: "a whole number",
    float: "a number",
    str: "text",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


@dataclass(frozen=True)
class SpectrumRecord:
    """One spectrum: of which Hessian, after how many training steps, how it was measured, and what came out.

    A measurement that failed leaves a record too. Its status is "failed", it says why in `reason`, and it holds no
    estimates; numbers that are not known are NaN, and counts 0.

    Attributes:
        step: The training step.
        mode: Which Hessian; for a diagonal block with its name, as in "full: model.layers.0".
        loss: The loss on the measured batches.
        gradient_norm: The norm of its gradient in the measured parameters.
        dimension: The number of measured parameters, n.
        estimates: Quantities of the spectrum with their intervals, by key; `spectra.estimates.quantities` lists them.
        near_zero_tol: |lambda| below which an eigenvalue counts as near zero.
        probes: The number of probe vectors.
        lanczos_steps: Lanczos steps for each of them.
        seed: The seed of the probe vectors.
        reorthogonalize: "full" or "none", or "exact" where the whole matrix was diagonalised.
        products: The number of Hessian-vector products spent.
        seconds: The time that the measurement took.
        label: A name for the occasion, such as "start".
        extras: Numbers measured beside the spectrum, by name.
        checks: What the operator was checked for before its first spectrum of the run, by name: the figures of
            `HessianOperator.checks`, and "precision_error".
        versions: The versions of spectra, torch and Python.
        dtype: The type of the numbers in products.
        device: The device that computed them.
        engine: How blocks of products were computed, see `spectra.HessianOperator`.
        batch_noise: Where it was asked for, by quantity: the half-widths due to "probes" and to "batches", the "bias",
            and the ends of the total interval, "low" and "high".
        notes: What a reader of the numbers should know of how they were computed.
        wall_time: When the record was made, in seconds since 1970.
        lanczos: The file of the Jacobi matrices, relative to the run folder; None if they were not kept.
        block: The name of the diagonal block that was measured; "" for the whole.
        weights: A hash of some entries of the weights that were measured; "" where it is not known.
        count: What the count below zero after a change of variables took: its Lanczos "steps", the "search_products"
            for the change of variables, and its "products" in all. Empty without one.
        status: "ok", or "failed".
        reason: Why the measurement failed, in one line.
        remedy: What to do about it, where that is known.
    """

    step: int
    mode: str
    loss: float
    gradient_norm: float
    dimension: int
    estimates: dict[str, Estimate]
    near_zero_tol: float
    probes: int
    lanczos_steps: int
    seed: int
    reorthogonalize: str
    products: int
    seconds: float
    label: str = ""
    extras: dict[str, float] = field(default_factory=dict)
    checks: dict[str, float] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    dtype: str = ""
    device: str = ""
    engine: str = ""
    batch_noise: dict[str, dict[str, float]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    wall_time: float = field(default_factory=time.time)
    lanczos: str | None = None
    block: str = ""
    weights: str = ""
    count: dict[str, int] = field(default_factory=dict)
    status: str = OK
    reason: str = ""
    remedy: str = ""

    @property
    def is_measured(self) -> bool:
        """Whether there is a spectrum: whether the measurement did not fail."""
        return self.status == OK

    def to_dict(self) -> dict[str, Any]:
        """The record in types that JSON has. A number that is not finite becomes None."""
        fields = {VERSION: VERSION_NUMBER} | {name: getattr(self, name) for name in self.__dataclass_fields__}
        return plain(fields | {"estimates": {name: e.to_dict() for name, e in self.estimates.items()}})

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> SpectrumRecord:
        """The inverse of `to_dict`, for records of earlier versions too.

        Args:
            fields: What `to_dict` gave. Unknown fields are ignored, optional ones may be missing. Checks that stand
                among the extras, where version 1 wrote them, are moved to `checks`.

        Returns:
            The record.

        Raises:
            InputError: If a required field is missing or is of another kind, or the record is of a later version.
        """
        read_version(fields, "the record")
        for name in REQUIRED:
            if name not in fields:
                raise InputError(f"expected a spectrum record with {', '.join(REQUIRED)}; this one has no {name}")
        known: dict[str, Any] = {"wall_time": None}
        known |= {name: fields[name] for name in cls.__dataclass_fields__ if name in fields}
        known |= {name: math.nan for name in NUMBERS if known.get(name) is None}
        for name, kinds in KINDS.items():
            if name in known and (not isinstance(known[name], kinds) or isinstance(known[name], bool)):
                raise InputError(f"expected {_listed(kinds)} as the {name} of a spectrum record, got {known[name]!r}")
        try:
            known["estimates"] = {name: Estimate.from_dict(e) for name, e in known["estimates"].items()}
        except (AttributeError, TypeError, ValueError, OverflowError):
            raise InputError("expected estimates of a value, low and high each, as the estimates of a record") from None
        extras, checks = _read_numbers(fields.get("extras")), _read_numbers(fields.get("checks"))
        known["checks"] = {name: extras[name] for name in CHECKS if name in extras} | checks
        known["extras"] = {name: value for name, value in extras.items() if name not in CHECKS}
        return cls(**known)


def read_version(fields: Mapping[str, Any], what: str) -> int:
    """The version of the schema that a record or a config.json was written in.

    Args:
        fields: The contents.
        what: What they are the contents of, for the message.

    Returns:
        The version; 2 for those before 3, which do not name it.

    Raises:
        InputError: If it is later than this version of spectra can read.
    """
    version = fields.get(VERSION, 2)
    if not isinstance(version, int) or version > VERSION_NUMBER:
        raise InputError(
            f"{what} was written by a later version of spectra (schema {version}, this one reads up to "
            f"{VERSION_NUMBER}): update spectra"
        )
    return version


def read_number(value: Any) -> Any:
    """The value as it was before `plain` wrote it: None stands for a number that was not finite, and reads as NaN."""
    return math.nan if value is None else value


def _read_numbers(values: Mapping[str, Any] | None) -> dict[str, Any]:
    """`read_number` of each value; empty for None. What is no number is left out."""
    numbers = {name: read_number(value) for name, value in (values or {}).items()}
    return {name: value for name, value in numbers.items() if isinstance(value, int | float)}


def _listed(kinds: Any) -> str:
    """The types of a field in words."""
    return " or ".join(KIND_NAMES[kind] for kind in kinds)
