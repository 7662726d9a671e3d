"""The progress of a measurement, counted in products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Callback = Callable[[int, int], Any]  # (products done, products in total)


class Progress:
    """Counts products toward a total and reports them to a callback, if there is one.

    The total is an estimate where the number of products depends on the operator. It grows when it turns out too
    small, and `finish` sets it to what was done, so that a bar ends full.

    Args:
        callback: Called as callback(products done, products in total).
        total: How many products are expected.

    Attributes:
        done: Products so far.
        total: Products expected in all.
    """

    def __init__(self, callback: Callback | None, total: int):
        self._callback, self.total, self.done = callback, total, 0

    def add(self, products: int) -> None:
        """Count more products."""
        self.reach(self.done + products)

    def reach(self, done: int) -> None:
        """Set the number of products done, which never decreases."""
        if done > self.done:
            self.done, self.total = done, max(self.total, done)
            self._report()

    def finish(self) -> None:
        """Report the end: the total becomes what was done."""
        if self.done != self.total:
            self.total = self.done
            self._report()

    def part(self, remaining: int) -> Callback:
        """A callback for the next part of the measurement, with `remaining` products to do after it."""
        before = self.done

        def report(done: int, total: int) -> None:
            self.total = before + total + remaining
            self.done = before + done
            self._report()

        return report

    def _report(self) -> None:
        """Call the callback, if there is one and a product is done."""
        if self._callback is not None and self.done:
            self._callback(self.done, self.total)
