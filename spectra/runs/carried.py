"""What a probe carries from one measurement to the next, in a file: a training that goes on measures the same bits."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from spectra.algorithms.congruence import Congruence
from spectra.algorithms.kronecker import Block, KroneckerTransform
from spectra.backend.errors import InputError, first_line
from spectra.runs.files import written_whole

SIDES = ("left", "right")


@dataclass
class Carried:
    """What a measurement takes over from those before it, by mode.

    Attributes:
        checks: What the checks found, figures by name, and what they noted.
        outliers: (n, k), the eigenvectors that were deflated last.
        congruences: The change of variables of the last count.
    """

    checks: dict[str, tuple[dict[str, float], list[str]]] = field(default_factory=dict)
    outliers: dict[str, torch.Tensor] = field(default_factory=dict)
    congruences: dict[str, Congruence] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file, whole or not at all.

        Args:
            path: The file.
        """
        tensors = {f"outliers/{mode}": vectors.contiguous() for mode, vectors in self.outliers.items()}
        plain: dict[str, Any] = {"checks": self.checks, "congruences": {}}
        for mode, congruence in self.congruences.items():
            plain["congruences"][mode] = _numbers_of(congruence)
            for side in SIDES:
                for index, factor in enumerate(getattr(congruence.transform, side)):
                    tensors[f"{side}/{index}/{mode}"] = factor.contiguous()
            if congruence.mask is not None:
                tensors[f"mask/{mode}"] = congruence.mask
        with written_whole(Path(path)) as partial:
            save_file(tensors, partial, {"carried": json.dumps(plain)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Carried:
        """Read what `save` wrote.

        Args:
            path: The file.

        Returns:
            What was carried, on the CPU.

        Raises:
            InputError: The file cannot be read.
        """
        try:
            with safe_open(path, framework="pt") as file:
                plain = json.loads((file.metadata() or {})["carried"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            start = "outliers/"
            return cls(
                {mode: (dict(figures), list(notes)) for mode, (figures, notes) in plain["checks"].items()},
                {name.removeprefix(start): each for name, each in tensors.items() if name.startswith(start)},
                {mode: _congruence(mode, numbers, tensors) for mode, numbers in plain["congruences"].items()},
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(
                f"{path} cannot be read ({first_line(error)}): delete it, and the probe measures without it"
            ) from None


def _numbers_of(congruence: Congruence) -> dict[str, Any]:
    names = ("shift", "kurtosis", "kurtosis_before", "products")
    blocks = [(block.start, block.count, block.rows, block.columns) for block in congruence.transform.blocks]
    return {"blocks": blocks, **{name: getattr(congruence, name) for name in names}}


def _congruence(mode: str, numbers: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Congruence:
    blocks = tuple(Block(*sizes) for sizes in numbers["blocks"])
    left, right = (tuple(tensors[f"{side}/{index}/{mode}"] for index in range(len(blocks))) for side in SIDES)
    given = {name: value for name, value in numbers.items() if name != "blocks"}
    return Congruence(KroneckerTransform(blocks, left, right), tensors.get(f"mask/{mode}"), **given)
