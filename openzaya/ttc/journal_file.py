"""The file under a journal: opened for one writer or many readers, with SQLite's errors in words for a user.

One process writes at a time. It holds a lock of the operating system on a file beside the journal, which ends with the
process, so that one that was killed is no obstacle; a clean end removes the lock file. The journal itself is not
locked like this: closing any descriptor of it would drop the locks that SQLite holds on it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from openzaya.errors import RSAError

try:
    import fcntl
except ImportError:  # not on Windows; there the file is not guarded against a second process
    fcntl = None  # type: ignore[assignment]

BUSY_TIMEOUT_S = 10.0


def connect(path: Path) -> tuple[sqlite3.Connection, int | None]:
    """A connection that writes, each statement a transaction of its own, and the lock that goes with it."""
    if path.is_dir():
        raise RSAError(f"{path} is a directory; name a file for the journal")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_descriptor = take_lock(path)
    except OSError as error:
        raise RSAError(f"the journal {path} cannot be written: {error.strerror}; name another file") from None
    try:
        with explained(path):
            connection = sqlite3.connect(path, BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    except BaseException:
        release_lock(path, lock_descriptor)
        raise
    return connection, lock_descriptor


def connect_read_only(path: Path) -> sqlite3.Connection:
    """A connection that reads, also while another process writes."""
    # In a directory that cannot be written SQLite opens a log only if it is told that nobody changes the file.
    options = "mode=ro" if os.access(path.parent, os.W_OK) or _log_path(path).exists() else "immutable=1"
    with explained(path):
        return sqlite3.connect(
            f"{path.as_uri()}?{options}", BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False, uri=True
        )


def _log_path(path: Path) -> Path:
    return path.with_name(path.name + "-wal")


def _lock_path(path: Path) -> Path:
    return path.with_name(path.name + ".lock")


def release_lock(path: Path, descriptor: int | None) -> None:
    """The end of :func:`take_lock`."""
    if descriptor is not None:
        _lock_path(path).unlink(missing_ok=True)  # while it is held: the next process makes a file of its own
        os.close(descriptor)


def take_lock(path: Path) -> int | None:
    """Descriptor of the lock file, locked. Raises ``RSAError`` where another holds it, ``OSError`` without a file."""
    if fcntl is None:
        return None
    while True:
        descriptor = os.open(_lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 32).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise RSAError(
                f"the journal {path} is in use by process {holder}; wait for it, or name another file"
            ) from None
        except OSError:
            os.close(descriptor)
            raise
        if _is_same_file(descriptor, _lock_path(path)):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, str(os.getpid()).encode())
            return descriptor
        os.close(descriptor)  # its holder removed it between our two calls


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


@contextlib.contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors in words for a user."""
    try:
        yield
    except sqlite3.ProgrammingError as error:
        raise RSAError(f"the journal {path} is closed: {error}") from None
    except sqlite3.DatabaseError as error:
        message = str(error)
        if "full" in message:
            what = "the disk is full; make room and resume, all that was finished is kept"
        elif "not a database" in message:
            what = "it is no RSA journal; name another file"
        elif "malformed" in message:
            what = "it is damaged; name another file, or restore it"
        elif "locked" in message:
            what = "another program holds it; close that program"
        else:
            what = f"{message}; check the file and its directory, or name another file"
        raise RSAError(f"the journal {path} cannot be used: {what}") from None
