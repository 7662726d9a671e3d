"""One measurement after another over the diagonal blocks of an operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from spectra.algorithms.progress import Callback, Progress
from spectra.operators.base import LinearOperator
from spectra.operators.blocks import Blocks, blocks_of

T = TypeVar("T")


def each_block(
    op: LinearOperator, blocks: Blocks, measure: Callable[..., T], progress: Callback | None
) -> dict[str, T]:
    """Measure the diagonal blocks of an operator, whose graphs they share.

    Args:
        op: The operator of a model.
        blocks: Which blocks, see `spectra.blocks_of`.
        measure: Called as measure(block, progress=...) with each block as an operator.
        progress: Called as progress(products done, products in total). The blocks to come are expected to take as many
            as the first.

    Returns:
        What `measure` returned, by the name of the block.
    """
    found: dict[str, T] = {}
    operators, count = blocks_of(op, blocks), Progress(progress, 0)
    for left, (name, block) in zip(reversed(range(len(operators))), operators.items(), strict=True):
        expected = count.done // len(found) if found else 0
        found[name] = measure(block, progress=count.part(left * expected))
    count.finish()
    return found
