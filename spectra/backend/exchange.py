"""Ranks that compute alone and ask each other for data on the way, in any order."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from spectra.backend import ranks

T = TypeVar("T")
DONE, FAILED = -1, -2  # in place of a request
READY = 0


class Data(Protocol):
    """What ranks exchange. A request is a whole number from 0 on."""

    def prepare(self, request: int, payload: Any) -> Any:
        """Allocate what a request needs on this rank, and communicate nothing.

        Args:
            request: The request.
            payload: What the asking rank sends; None on a rank that asked for something else.

        Returns:
            What `transfer` is given.
        """
        ...

    def transfer(self, request: int, prepared: Any) -> Any:
        """Exchange the data of a request. All ranks call this together.

        Args:
            request: The request.
            prepared: What `prepare` returned.

        Returns:
            The answer.
        """
        ...


class _OtherRankFailed(Exception):
    """Another rank has an error, which all ranks are about to raise."""


class Exchange:
    """Lets each rank run a task of its own, in which it asks for data that lies over all ranks.

    At every request the ranks tell each other what they ask for, in host memory. What most ask for comes first, and
    all take part in that. A rank that is done serves the others. So ranks may ask in different orders and for different
    things, and an error on one of them ends the tasks of all.

    Args:
        data: What is exchanged.
    """

    def __init__(self, data: Data):
        self._data = data
        self._group = ranks.host_group()
        self._stopped = True

    def run(self, task: Callable[[], T]) -> T:
        """Run the task of this rank, and serve the others until all are done. All ranks call this together.

        Args:
            task: What this rank does; it may call `ask`.

        Returns:
            What the task returns.
        """
        error: Exception | None = None
        results: list[T] = []
        self._stopped = False
        try:
            results.append(task())
            while self._serve_others():
                pass
        except (_OtherRankFailed, ranks.RankError) as caught:
            if isinstance(caught, ranks.RankError):
                raise
        except Exception as caught:  # whatever it is, the other ranks have to know
            error = caught
            if not self._stopped:
                ranks.all_gather_number(FAILED, self._group)
                self._stopped = True
        if self._stopped:
            ranks.raise_for_all(error)
        self._stopped = True
        return results[0]

    def ask(self, request: int, payload: Any = None) -> Any:
        """The answer to a request, when its turn comes. Called within a task.

        Args:
            request: A number from 0 on.
            payload: What this rank sends; None for nothing.

        Returns:
            The answer.
        """
        prepared = None
        while True:
            if self._stopped:
                raise _OtherRankFailed
            prepared = self._data.prepare(request, payload) if prepared is None else prepared
            chosen, alone = self._choose(request)
            if chosen == request:
                if alone:
                    self._confirm()
                return self._data.transfer(request, prepared)
            self._serve(chosen)

    def _serve_others(self) -> bool:
        """Take part in a request of other ranks; False when all are done."""
        chosen, _ = self._choose(DONE)
        if chosen == DONE:
            return False
        self._serve(chosen)
        return True

    def _serve(self, request: int) -> None:
        prepared = self._data.prepare(request, None)
        self._confirm()
        self._data.transfer(request, prepared)

    def _choose(self, mine: int) -> tuple[int, bool]:
        """What is exchanged next, and whether any rank did not ask for it."""
        asked = ranks.all_gather_number(mine, self._group)
        self._stop_if_failed(asked)
        waiting = Counter(request for request in asked if request != DONE)
        if not waiting:
            return DONE, False
        chosen = waiting.most_common(1)[0][0]
        return chosen, waiting[chosen] < len(asked)

    def _confirm(self) -> None:
        """Wait until the ranks that did not ask have allocated what they need."""
        self._stop_if_failed(ranks.all_gather_number(READY, self._group))

    def _stop_if_failed(self, found: list[int]) -> None:
        if FAILED in found:
            self._stopped = True
            raise _OtherRankFailed
