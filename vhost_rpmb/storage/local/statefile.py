# SPDX-License-Identifier: Apache-2.0
"""The state file and its log as files: the checks before SQLite opens them, and error texts.

SQLite changes a file when it opens it, waits for a FIFO and takes a failed lock for a file in use;
so these checks come first.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from contextlib import suppress

from vhost_rpmb.errors import StateError
from vhost_rpmb.storage.local.files import cannot_lock, open_regular
from vhost_rpmb.storage.paths import journal_of, log_of
from vhost_rpmb.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import BinaryIO

__all__ = [
    "APPLICATION_ID",
    "AWAY",
    "FORMAT",
    "STARTS_MASK",
    "check_format",
    "check_header",
    "check_neighbours",
    "damage",
    "has_log",
    "in_use",
    "is_away",
    "is_marked",
    "lock_readers",
    "trouble",
    "user_version",
]

APPLICATION_ID = 0x52504D42  # "RPMB"
FORMAT = 3
_FORMATS = (1, 2, FORMAT)  # that this version can load
# In place of a format: the device is not here, so that no version serves it. `moving` has the rest.
AWAY = 255
# The header of an SQLite database: its magic, and the offsets of user_version and application_id.
_HEADER_MAGIC = b"SQLite format 3\0"
_HEADER_NUMBERS = (60, 68)
_HEADER_SIZE = 100
# user_version is the format, and above it the low bits of the number of starts: the only
# place that can be read without the write-ahead log, and that no torn write can tear.
_FORMAT_BITS = 8
STARTS_MASK = (1 << 23) - 1
# The range that SQLite's readers lock; an exclusive writer locks all of it.
_LOCK_FIRST, _LOCK_SIZE = 0x40000002, 510


def user_version(starts: int, number: int = FORMAT) -> int:
    """Return the header field of a state file: its format and the number of starts."""
    return (starts & STARTS_MASK) << _FORMAT_BITS | number


def is_away(version: int) -> bool:
    """Tell whether a user_version says that the device is not here."""
    return version & ((1 << _FORMAT_BITS) - 1) == AWAY


def check_header(path: str, *, away: bool = False) -> int:
    """Refuse a file that vhost-rpmb did not write, before SQLite opens and changes it.

    Return the low bits of the number of starts that the file records without its log.
    """
    version = _read_version(path)
    check_format(path, version, away=away)
    return version >> _FORMAT_BITS


def is_marked(path: str) -> bool:
    """Tell whether a state file says, without its log, that the device is not here."""
    return is_away(_read_version(path))


def _read_version(path: str) -> int:
    try:
        with open(path, "rb", opener=open_regular) as file:
            header = file.read(_HEADER_SIZE)
            with suppress(BlockingIOError, PermissionError):  # SQLite reports that it is in use
                lock_readers(file, path)
    except OSError as error:
        raise StateError(f"the state file {path} cannot be read: {error.strerror}") from error
    if not header:
        raise StateError(
            f"the state file {path} is empty, which vhost-rpmb never leaves: restore it from a"
            " backup; a start without it would set the write counter back"
        )
    version, application = (
        int.from_bytes(header[offset : offset + 4], "big") for offset in _HEADER_NUMBERS
    )
    if not header.startswith(_HEADER_MAGIC) or application != APPLICATION_ID:
        raise StateError(
            f"{path} is not a vhost-rpmb state file: restore the right one, or name another with"
            " --state-path"
        )
    return version


def check_format(path: str, version: int, *, away: bool = False) -> None:
    """Refuse the format in a user_version that this version cannot load.

    ``away``: the device may have moved.
    """
    if is_away(version):
        if away:
            return
        raise StateError(
            f"the device of {path}: expected one that is here, found one that moved to or from a"
            " store that hosts share: use it there; if the import or export was interrupted,"
            " repeat it"
        )
    number = version & ((1 << _FORMAT_BITS) - 1)
    if number not in _FORMATS:
        raise StateError(
            f"the state file {path} has format {number}, this version knows {_FORMATS[0]} to"
            f" {FORMAT}: use the version of vhost-rpmb that wrote it"
        )


def has_log(path: str) -> bool:
    """Whether a state file has a write-ahead log: it was not closed, or is in use."""
    return os.path.exists(log_of(path))


def lock_readers(file: BinaryIO, path: str) -> None:
    """Lock a state file as SQLite's readers do, until it is closed.

    Raises BlockingIOError or PermissionError if a daemon uses it, StateError if the file system has
    no locks, which SQLite would report as a file in use.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, _LOCK_SIZE, _LOCK_FIRST)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        raise StateError(cannot_lock(f"the state file {path}", error)) from error


def check_neighbours(path: str) -> None:
    """Refuse special files at the names of SQLite's log and journal: it would wait for a FIFO."""
    for beside in (log_of(path), journal_of(path)):
        try:
            mode = os.lstat(beside).st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            raise StateError(
                f"{beside}: expected a regular file or none, found another kind of file: remove it"
            )


def trouble(path: str, error: sqlite3.Error) -> str:
    """Return the error text for a failure of SQLite."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        return in_use(path)
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return damage(path, str(error))
    if code == sqlite3.SQLITE_FULL:
        return f"the file system of the state file {path} is full: make room on it"
    if code == sqlite3.SQLITE_READONLY:
        return f"the state file {path} cannot be written: check its permissions and mount options"
    return f"the state file {path} cannot be used: {error}"


def in_use(path: str) -> str:
    """Return the error text for a state file that another process has locked."""
    return f"the state file {path} is in use by another process: end that process first"


def damage(path: str, what: str) -> str:
    """Return the error text for a state file with invalid content."""
    return (
        f"the state file {path} is damaged ({' '.join(what.split())}): restore it from a backup"
        " together with its image and key file"
    )
