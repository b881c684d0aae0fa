"""Files that are written atomically, and a lock between processes."""

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import socket
import stat
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from .kinds import kind_of

if sys.platform == "win32":
    import msvcrt
else:
    import fcntl

log = logging.getLogger("context_forcing")

UNSUPPORTED = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # the file system has no locks
HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # another process has the lock
MAX_TENSORS = 20_000
"""Tensors of a safetensors file that is read whole. The largest students have about 3,000."""
MAX_TEXT = 2**25
"""Bytes of a text file that is read whole; a device such as /dev/zero never ends."""
LOCKED_BYTE = 2**30  # far after the text, because Windows forbids to read a locked byte
MAX_NAME = 255
"""Bytes of a file name, on most file systems."""
OURS = ".context_forcing"
"""A part of the names of locks and of unfinished files: no file of anybody else is written over or deleted."""


class HeldError(OSError):
    """Another process has the lock; its id, host and start."""

    def __init__(self, holder: str):
        super().__init__(errno.EBUSY, f"another process writes it: {holder}")
        self.holder = holder

    def __str__(self) -> str:
        return self.holder


def of_disk(error: OSError) -> str:
    """What a user reads of an error of the system that nothing else explains."""
    return f"{error.filename or 'file'}: {error.strerror or error}; check the name and the disk"


def read_text(
    path: Path, encoding: str = "utf-8", most: int = MAX_TEXT, instead: Mapping[str, str] | None = None
) -> str:
    """The text of a file. Raises ValueError, one line, for other files, and for one of more than `most` bytes.

    `instead` has remedies for kinds of files (kinds.py) that a user may confuse with this one.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(most + 1)
        if kind := kind_of(data):
            raise ValueError(f"{path}: is {kind}; {(instead or {}).get(kind, 'give a text file')}")
        if len(data) > most:
            raise ValueError(f"{path}: has more than {most // 2**20} MiB of text; make it smaller")
        return io.TextIOWrapper(io.BytesIO(data), encoding=encoding).read()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8 text; save it as UTF-8") from None


@contextlib.contextmanager
def lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file that names this process. The file is deleted at the end.

    The lock ends with the process. After SIGKILL the file stays, unlocked. Raises HeldError if another process has the
    lock, and OSError if the file cannot be created.
    """
    fd = _open_locked(path)
    try:
        os.ftruncate(fd, 0)
        holder = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%Y-%m-%d %H:%M:%S')}"
        os.write(fd, holder.encode())
        yield
    finally:
        # Windows cannot delete an open file. Elsewhere it is deleted while locked, which _open_locked detects.
        if sys.platform == "win32":
            os.close(fd)
        with contextlib.suppress(OSError):
            if sys.platform == "win32" or _is_at(fd, path):
                path.unlink()
        if sys.platform != "win32":
            os.close(fd)


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A path beside `path` to write to. At the end the file is flushed to the disk and renamed to `path`.

    The file has the permissions of a new file, also if its writer gives it others (safetensors: 0600). After an error
    `path` is unchanged and the new file is deleted. Raises OSError, also while another process writes `path`.
    """
    part = _part_name(path)
    with lock(lock_name(path)):
        try:
            part.unlink(missing_ok=True)
            part.touch()
            mode = stat.S_IMODE(part.stat().st_mode)
            yield part
            os.chmod(part, mode)
            settle(part, path)
        finally:
            part.unlink(missing_ok=True)


@contextlib.contextmanager
def hold_folder(option: str, folder: Path) -> Iterator[None]:
    """Create a folder that a command writes to, and reserve it for this process. It is deleted again if it stays empty.

    Raises ValueError, one line that begins with `option`, if another process writes there or the folder cannot be made.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
    with contextlib.ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.callback(_remove_empty, created)
            stack.enter_context(lock(folder / f"{OURS}.lock"))
            stack.callback(_remove_locks, folder)
        except OSError as error:
            raise ValueError(f"{option}: {folder} cannot be written ({error.strerror}); give another folder") from None
        yield


def _remove_locks(folder: Path) -> None:
    """Delete locks of files that a killed process left."""
    for path in folder.rglob(lock_name(Path("*")).name):
        with contextlib.suppress(OSError), lock(path):
            pass


def _remove_empty(folders: list[Path]) -> None:
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()


def beside(path: Path, ending: str) -> Path:
    """A name of ours for what belongs to a file: with the file's name, or its digest where that would be too long."""
    if len(os.fsencode(f".{path.name}{OURS}{ending}")) > MAX_NAME:
        path = path.with_name(hashlib.sha256(os.fsencode(path.name)).hexdigest()[:32])
    return path.with_name(f".{path.name}{OURS}{ending}")


def lock_name(path: Path) -> Path:
    """The lock of a file."""
    return beside(path, ".lock")


def _part_name(path: Path) -> Path:
    """The name of a file until it is whole."""
    return beside(path, ".part")


def check_writable(option: str, path: Path) -> None:
    """Raises ValueError, one line that begins with `option`, unless a file can be written to `path`; leaves nothing."""
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option}: {path}: its folder does not exist; create it first")
    if path.is_dir():
        raise ValueError(f"{option}: {path} is a folder; give a file name")
    part = _part_name(path)
    try:
        with lock(lock_name(path)):
            part.touch()
            part.unlink()
    except OSError as error:
        raise ValueError(f"{option}: {path} cannot be written ({error.strerror}); give another folder") from None


def settle(part: Path, path: Path) -> None:
    """Flush a finished file to the disk, then rename it to `path`."""
    with open(part, "rb+") as file:
        os.fsync(file.fileno())
    os.replace(part, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to the disk, if the system can."""
    # Windows does not open folders; some network file systems do not sync them.
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _open_locked(path: Path) -> int:
    while True:
        with contextlib.ExitStack() as opened:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            opened.callback(os.close, fd)
            if not _try_lock(fd, path):
                os.lseek(fd, 0, os.SEEK_SET)
                raise HeldError(os.read(fd, 200).decode(errors="replace"))
            if _is_at(fd, path):  # else another process deleted the file between opening and locking
                opened.pop_all()
                return fd


def _try_lock(fd: int, path: Path) -> bool:
    try:
        if sys.platform == "win32":
            os.lseek(fd, LOCKED_BYTE, os.SEEK_SET)
            msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)
            os.lseek(fd, 0, os.SEEK_SET)
        else:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in HELD:
            return False
        if error.errno not in UNSUPPORTED:
            raise
        _warn_of_no_locks(path.parent)
    return True


@functools.cache
def _warn_of_no_locks(folder: Path) -> None:
    log.warning("%s: this file system has no locks; no other process may write there", folder)


def _is_at(fd: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(fd), os.stat(path))
    except FileNotFoundError:
        return False
