"""Files that two processes must not write at once, and that must outlive a power cut once they have their name."""

import contextlib
import errno
import logging
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

log = logging.getLogger("context_forcing")

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""

HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)
"""Errors where another has the lock."""

LOCKED_BYTE = 2**30
"""Windows keeps others from reading what is locked: a byte far behind the text."""


class HeldError(Exception):
    """Another process has the lock; says which, since when."""


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold the lock of a file, which says who holds it and is deleted at the end.

    The lock goes with its process, however that ends; after SIGKILL the file stays and is in nobody's way. Raises
    HeldError where another has the lock, OSError where the file cannot be made.
    """
    fd = _take(path)
    try:
        os.ftruncate(fd, 0)
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        os.write(fd, f"pid {os.getpid()} on {socket.gethostname()}, since {since}".encode())
        yield
    finally:
        # Deleted while it is locked: whoever opened it before finds that it is gone (_take). Windows deletes no file
        # that is open, here or in another process.
        with contextlib.suppress(OSError):
            if fcntl and _stands_at(fd, path):
                path.unlink()
        os.close(fd)
        with contextlib.suppress(OSError):
            if not fcntl:
                path.unlink()


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. At the end the file is flushed to the disk and renamed to `path`.

    After an error `path` is unchanged and the new file is deleted. Raises OSError.
    """
    part = path.with_name(path.name + ".part")
    try:
        yield part
        settle(part, path)
    finally:
        part.unlink(missing_ok=True)


def settle(part: Path, path: Path) -> None:
    """Flush a finished file to the disk, then rename it to `path`."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Bring the names in a folder to the disk, where the system can."""
    # Windows does not open folders; some file systems over a network do not sync them.
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _take(path: Path) -> int:
    while True:
        with contextlib.ExitStack() as opened:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, fd)
            if not _locked(fd, path):
                os.lseek(fd, 0, os.SEEK_SET)
                raise HeldError(os.read(fd, 200).decode(errors="replace"))
            if _stands_at(fd, path):
                opened.pop_all()
                return fd


def _locked(fd: int, path: Path) -> bool:
    """Whether the lock is ours now."""
    try:
        if fcntl:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in UNSUPPORTED:
            raise
        log.warning("%s: this file system has no locks; let no other process write there meanwhile", path.parent)
    return True


def _stands_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
