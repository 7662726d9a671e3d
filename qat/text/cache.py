"""The cache folder, which keeps trained tokenizers and full-precision models for the next run."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spectra.backend.errors import InputError

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
    several processes make it at once.

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
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
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
    return target
