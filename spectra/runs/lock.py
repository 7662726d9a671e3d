"""One writer for each run folder: a lock that ends with the process that holds it. Readers need none."""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from pathlib import Path

from spectra.backend.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK = "writer.lock"
NOT_SUPPORTED = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)

_held: weakref.WeakValueDictionary[tuple[int, int], WriterLock] = weakref.WeakValueDictionary()


class WriterLock:
    """The right to write to a folder, until it is released, given to a later writer, or the process ends.

    Between processes it is a lock of the operating system (flock) on a file in the folder. Within a process the last
    one to take it has it: a run that is opened again, as in a notebook, is then written by the new object alone. Where
    the file system has no locks, processes are not kept apart.

    Args:
        folder: The folder, which is there.

    Raises:
        InputError: If another process writes to the folder.
    """

    def __init__(self, folder: Path) -> None:
        place = folder.stat()
        self._key = (place.st_dev, place.st_ino)
        earlier = _held.get(self._key)
        handle = earlier._give() if earlier is not None and earlier.is_held else _locked(folder)
        self._close = weakref.finalize(self, os.close, handle)
        self._handle: int | None = handle
        _held[self._key] = self

    @property
    def is_held(self) -> bool:
        """Whether this is the writer."""
        return self._handle is not None

    def release(self) -> None:
        """Let others write."""
        if self._handle is not None:
            self._handle = None
            self._close()

    def _give(self) -> int:
        """The locked file, for the next writer of this process."""
        handle, self._handle = self._handle, None
        self._close.detach()
        assert handle is not None
        return handle


def is_written_here(folder: Path) -> bool:
    """Whether an object of this process holds the lock of a folder, which is there."""
    place = folder.stat()
    holder = _held.get((place.st_dev, place.st_ino))
    return holder is not None and holder.is_held


def _locked(folder: Path) -> int:
    """The folder's lock file, opened and locked. It holds the number of its process, for the message below."""
    handle = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.read(handle, 20).decode(errors="replace") or "unknown"
        os.close(handle)
        raise InputError(
            f"{folder} is being written by another process ({owner}): wait until it ends, or choose another out="
        ) from None
    except OSError as error:
        if error.errno not in NOT_SUPPORTED:
            os.close(handle)
            raise
    with contextlib.suppress(OSError):  # the number is for a message alone
        os.ftruncate(handle, 0)
        os.write(handle, str(os.getpid()).encode())
    return handle


def _forget_after_fork() -> None:
    """In a forked child the lock is the parent's: close the copies, so that they do not outlive the parent."""
    for lock in list(_held.values()):
        lock.release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_after_fork)
