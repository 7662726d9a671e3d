"""Append-only files of JSON lines: strict JSON, lines written whole or not at all, cheap to read again."""

from __future__ import annotations

import errno
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

BINARY = getattr(os, "O_BINARY", 0)  # Windows would write other ends of lines


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


def encoded(value: Any, *, indent: int | None = None) -> bytes:
    """Strict JSON in UTF-8.

    Args:
        value: Anything, see `plain`.
        indent: As in `json.dumps`.

    Returns:
        The JSON. A letter that UTF-8 lacks, as in a file name in another encoding, is written as its escape.
    """
    text = json.dumps(plain(value), indent=indent, allow_nan=False, ensure_ascii=False)
    return text.encode(errors="backslashreplace")


class JsonLines:
    """A file with one JSON object on each line, each written whole or not at all.

    A loss of power may leave part of a last line all the same. Reading leaves it out, with one warning, and the next
    write ends it with a newline first, so that the two do not run together. Nothing written is ever removed.

    Args:
        path: The file; it need not be there yet.
        report: Whether a line that is not whole is reported by a warning.
    """

    def __init__(self, path: Path, *, report: bool = True) -> None:
        self.path = path
        self._lines: list[dict[str, Any]] = []
        self._offset = 0
        self._report = report

    def append(self, fields: dict[str, Any]) -> None:
        """Write one line; it is on the disk when the call returns.

        Args:
            fields: The object, see `plain`.

        Raises:
            OSError: If it cannot be written; the file is then as it was.
        """
        line = encoded(fields) + b"\n"
        handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | BINARY, 0o666)
        try:
            size = os.fstat(handle).st_size
            if size > 0 and _last_byte(handle, size) != b"\n":
                line = b"\n" + line
            try:
                _write_all(handle, line)
                os.fsync(handle)
            except BaseException:  # a full disk, an interrupt
                os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)

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
        self._lines += self._parsed(complete.split(b"\n"))
        return self._lines + self._parsed([new[len(complete) :]])  # a line without its newline, or part of one

    def _parsed(self, lines: list[bytes]) -> list[dict[str, Any]]:
        """The objects of the lines that are whole; the first that is not is reported."""
        objects = [_parse(line) for line in lines]
        if self._report and any(line.strip() and found is None for line, found in zip(lines, objects, strict=True)):
            self._report = False
            warnings.warn(
                f"{self.path} holds a line that is not whole, as a crash leaves it: it is left out, all others count",
                stacklevel=3,
            )
        return [found for found in objects if found is not None]


def _last_byte(handle: int, size: int) -> bytes:
    """The last byte of an open file; the place to write is the end in any case."""
    os.lseek(handle, size - 1, os.SEEK_SET)
    return os.read(handle, 1)


def _write_all(handle: int, line: bytes) -> None:
    """Write a line with a single call; an OSError where the system takes a part of it only, as on a full disk."""
    if os.write(handle, line) != len(line):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _parse(line: bytes) -> dict[str, Any] | None:
    """The object on a line; None for an empty line or part of one, since no part of a JSON object is valid JSON."""
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return fields if isinstance(fields, dict) else None
