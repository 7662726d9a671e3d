"""How much a perturbation of each layer may raise the loss: a ranking, with intervals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spectra.estimates.estimate import Estimate


@dataclass(frozen=True)
class BlockSensitivity:
    """How sensitive the loss is to a perturbation of one diagonal block.

    Attributes:
        name: The name of the block.
        dimension: The number of perturbed parameters in it, n_b.
        squared_error: ||d_b||^2, the squared norm of the perturbation.
        trace: tr(H_bb).
        sensitivity: tr(H_bb) / n_b ||d_b||^2, twice the mean rise of the loss over perturbations of this norm.
        rise: d_b . H_bb d_b / 2, the second-order term of the loss along the perturbation itself.
    """

    name: str
    dimension: int
    squared_error: float
    trace: Estimate
    sensitivity: Estimate
    rise: float

    def to_dict(self) -> dict[str, Any]:
        """The fields in plain types for JSON."""
        fields = {name: getattr(self, name) for name in ("name", "dimension", "squared_error", "rise")}
        return {**fields, "trace": self.trace.to_dict(), "sensitivity": self.sensitivity.to_dict()}


@dataclass(frozen=True)
class SensitivityRanking:
    """The blocks of a model, the most sensitive first. `print` shows a table.

    Attributes:
        blocks: The blocks, in descending order of their sensitivity.
    """

    blocks: tuple[BlockSensitivity, ...]

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, name: str) -> BlockSensitivity:
        return {block.name: block for block in self.blocks}[name]

    def is_ranked(self, position: int) -> bool:
        """Whether a block is known to be more sensitive than the next: whether their intervals do not overlap.

        Args:
            position: The place of the block, from 0.

        Returns:
            Whether it is known; True for the last.
        """
        if position + 1 >= len(self.blocks):
            return True
        return self.blocks[position].sensitivity.low > self.blocks[position + 1].sensitivity.high

    def to_dict(self) -> dict[str, Any]:
        """The blocks in plain types for JSON, and after which of them the order is known."""
        return {"blocks": [block.to_dict() | {"ranked": self.is_ranked(i)} for i, block in enumerate(self.blocks)]}

    def __str__(self) -> str:
        rows = [("", "block", "parameters", "trace", "squared error", "sensitivity", "rise")]
        for i, block in enumerate(self.blocks):
            numbers = (f"{block.squared_error:.3g}", str(block.sensitivity), f"{block.rise:.3g}")
            mark = "" if self.is_ranked(i) else "~"
            rows.append((f"{i + 1}{mark}", block.name, f"{block.dimension:,}", str(block.trace), *numbers))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        unclear = any(not self.is_ranked(i) for i in range(len(self.blocks)))
        return "\n".join(lines + (["~: its interval overlaps that of the next block"] if unclear else []))
