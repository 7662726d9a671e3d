"""The cache folder, which keeps trained tokenizers and full-precision models for the next run."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1  # part of every key; raise it when what is cached changes


def cache_folder() -> Path:
    """The folder of the cache: `QAT_CACHE`, else `qat` in `XDG_CACHE_HOME`, else `~/.cache/qat`."""
    if folder := os.environ.get("QAT_CACHE"):
        return Path(folder).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "qat"


def cache_key(texts: Iterable[str], settings: dict[str, Any]) -> str:
    """A name for what is made of these texts with these settings.

    Args:
        texts: The texts, in an order that matters.
        settings: Everything else that the result depends on.

    Returns:
        16 hexadecimal digits of a SHA-256 hash.
    """
    digest = hashlib.sha256(json.dumps([FORMAT, settings], sort_keys=True, default=str).encode())
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        digest.update(len(encoded).to_bytes(8, "big") + encoded)
    return digest.hexdigest()[:16]


def cached_folder(name: str, make: Callable[[Path], None]) -> Path:
    """A folder in the cache, made if it is not there.

    A new folder is filled under another name and then renamed. So it is complete or absent after any interrupt, also if
    several processes make it at once. What a killed process left is removed.

    Args:
        name: The folder's name in the cache.
        make: Called as make(folder) to fill a new one.

    Returns:
        The folder's path.

    Raises:
        InputError: The cache cannot be written.
    """
    target = cache_folder() / name
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{target.name}-*"):
            _remove_if_abandoned(left)
        work, lock = _new_folder(target)
    except OSError as error:
        raise InputError(
            f"cannot write the cache folder {cache_folder()} ({error.strerror}): "
            "set QAT_CACHE to a folder that can be written"
        ) from error
    try:
        make(work)
        try:
            work.rename(target)
        except OSError:
            if not target.is_dir():  # if it is there, another process has made the same folder
                raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
        _close(lock)
    return target


def _new_folder(target: Path) -> tuple[Path, int | None]:
    """An empty folder beside the target, and its lock, which ends with this process."""
    while True:
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        lock = _lock(work, wait=True)
        if work.is_dir():  # it had no lock for a moment, in which another process may have taken it for abandoned
            return work, lock
        _close(lock)


def _remove_if_abandoned(folder: Path) -> None:
    """Remove a folder that no living process fills."""
    with contextlib.suppress(OSError):
        lock = _lock(folder, wait=False)
        if lock is not None:
            shutil.rmtree(folder, ignore_errors=True)
            _close(lock)


def _lock(folder: Path, *, wait: bool) -> int | None:
    """The folder, opened and locked; None where another process has the lock or the system has none for folders."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _close(lock: int | None) -> None:
    if lock is not None:
        os.close(lock)
