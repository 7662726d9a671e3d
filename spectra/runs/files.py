"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

PARTIAL = ".partial"  # the ending of a file that is being written


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it is there whole or not at all, also after a loss of power.

    It is written under another name, brought to the disk and then renamed. The other name is always the same one, so
    that what a writer that was killed leaves is overwritten by the next.

    Args:
        path: The file; one that is there is replaced.
        content: What it will hold.

    Raises:
        OSError: It cannot be written; a file that was there is as it was.
    """
    with written_whole(path) as partial:
        partial.write_bytes(content)


@contextlib.contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """The other name of `write_whole`, for a function that writes a file by its name.

    Args:
        path: The file; one that is there is replaced at the end of the context.

    Yields:
        The path to write to.

    Raises:
        OSError: It cannot be written; a file that was there is as it was.
    """
    partial = path.with_name(path.name + PARTIAL)
    try:
        yield partial
        sync(partial)
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync(path: Path) -> None:
    """Bring a file to the disk."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    with contextlib.suppress(OSError):  # Windows opens no folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
