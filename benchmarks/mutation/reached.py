"""Which tests reach which lines, and how long they take: a mutant is run against those that reach its statement."""

from __future__ import annotations

import ast
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from types import FrameType
from typing import Any

import pytest


class Tracer:
    """A pytest plugin that notes for each test its seconds, and for each line of some files the tests that run it.

    What runs while a test file is imported is noted under the name of the file.

    Args:
        root: The folder of the project.
        files: Source files, relative to it.
        test_file: The file whose tests are run.
    """

    def __init__(self, root: str, files: Iterable[str], test_file: str):
        self.seconds = {test_file: 0.0}
        self.lines: dict[str, dict[int, set[str]]] = {file: defaultdict(set) for file in files}
        self.failed: list[str] = []
        self._names = {f"{root}/{file}": file for file in files}
        self._test = self._test_file = test_file

    def __enter__(self) -> Tracer:
        sys.settrace(self._frame)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _frame(self, frame: FrameType, event: str, _: Any) -> Any:
        file = self._names.get(frame.f_code.co_filename)
        if file is None:
            return None
        lines = self.lines[file]

        def local(frame: FrameType, event: str, _: Any) -> Any:
            lines[frame.f_lineno].add(self._test)
            return local

        return local(frame, event, None)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self._test, started = item.nodeid, time.perf_counter()
        result = yield
        self.seconds[item.nodeid] = time.perf_counter() - started
        self.seconds[self._test_file] += self.seconds[item.nodeid]
        self._test = self._test_file
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.failed.append(report.nodeid)


def lines_of_statement(source: str, line: int) -> set[int]:
    """The lines whose tests can see a change in a line.

    Those of the statement it belongs to; of the whole function where the line belongs to its signature or decorators;
    all lines of the file for what runs when the module is imported.
    """
    found: ast.stmt | None = None
    inside_function = False
    for node in ast.walk(ast.parse(source)):  # from the outside in
        if isinstance(node, ast.stmt) and _first(node) <= line <= node.end_lineno:
            found = node
            header = isinstance(node, ast.FunctionDef) and line < node.body[0].lineno
            inside_function |= isinstance(node, ast.FunctionDef)
            if header:
                return set(range(node.body[0].lineno, node.end_lineno + 1))
    if found is None or not inside_function:
        return set(range(1, len(source.splitlines()) + 1))
    body = getattr(found, "body", None)
    end = found.end_lineno if not body else max(found.lineno, body[0].lineno - 1)
    return set(range(found.lineno, end + 1)) | {line}


def _first(node: ast.stmt) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
