"""Append-only files of JSON lines: strict JSON, safe against a crash in the middle of a line, cheap to read again."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


def plain(value: Any) -> Any:
    """The value in types that strict JSON has. Numbers that are not finite become None; paths and the like, text."""
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
    """One JSON object a line.

    What a crash left of a last line is skipped on reading, and closed with a newline before the next one is written,
    so that the next line is not glued to it. Nothing written is ever removed.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lines: list[dict[str, Any]] = []
        self._offset = 0

    def append(self, fields: dict[str, Any]) -> None:
        """Write one line and have it on the disk on return."""
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
        """Every whole line so far, in order. Only what was added since the last call is read and parsed."""
        if not self.path.exists():
            return []
        with open(self.path, "rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:  # another file took the place of the one read before
                self._lines, self._offset = [], 0
            file.seek(self._offset)
            new = file.read()
        complete = new[: new.rfind(b"\n") + 1]
        self._offset += len(complete)
        self._lines += [fields for line in complete.split(b"\n") if (fields := _parse(line)) is not None]
        last = _parse(new[len(complete) :])  # whole but for its newline, or the remains of a line
        return self._lines + ([last] if last is not None else [])


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line, or None for an empty line or the remains of one: no start of a JSON object is one."""
    try:
        fields = json.loads(line)
    except ValueError:
        return None
    return fields if isinstance(fields, dict) else None
