"""Append-only files of JSON lines: strict JSON, safe against a crash in the middle of a line, cheap to read again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """Turn a value into types that strict JSON has.

    Args:
        value: Anything. Arrays, tensors and objects with `to_dict` are written as lists and objects.

    Returns:
        None, bool, str, int, float, list or dict. A number that is not finite becomes None, any other object its text.

    Example:
        >>> plain({"loss": float("nan"), "shape": (2, 3)})
        {'loss': None, 'shape': [2, 3]}
    """
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # numpy arrays and scalars, tensors
        return plain(value.tolist())
    if isinstance(value, int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "to_dict"):
        return plain(value.to_dict())
    return str(value)


class JsonLines:
    """A file with one JSON object on each line.

    A crash may leave part of a last line. Reading skips it, and the next write ends it with a newline first, so that
    the two do not run together. Nothing written is ever removed.

    Args:
        path: The file; it need not be there yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[dict[str, Any]] = []
        self._offset = 0

    def append(self, fields: dict[str, Any]) -> None:
        """Write one line; it is on the disk when the call returns.

        Args:
            fields: The object, see `plain`.
        """
        line = json.dumps(plain(fields), allow_nan=False, ensure_ascii=False).encode() + b"\n"
        with open(self.path, "ab+") as file:
            if file.tell() > 0:
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    line = b"\n" + line
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """Read the file; only what was added since the last call is read and parsed.

        Returns:
            The object of every whole line so far, in order.
        """
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:  # the file was replaced since the last call
                self._lines, self._offset = [], 0
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        self._lines += [fields for line in complete.split(b"\n") if (fields := _parse(line)) is not None]
        last = _parse(new[len(complete) :])  # a line without its newline, or part of one
        return self._lines + ([last] if last is not None else [])


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None for an empty line or part of one, since no part of a JSON object is valid JSON."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
