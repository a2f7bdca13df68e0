# SPDX-License-Identifier: Apache-2.0
"""The state database on the disk: statements and the checks of a file, no decisions."""

from __future__ import annotations

import fcntl
import os
import sqlite3
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import BinaryIO, NamedTuple

from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.image import ImageFile, cannot_lock, digest, sync_folder, write_all
from vhost_rpmb.storage.local.keyfile import open_regular
from vhost_rpmb.storage.local.wal import apply_log
from vhost_rpmb.storage.paths import journal_of, log_of, new_of

__all__ = [
    "NO_DIGESTS",
    "Database",
    "DeviceRow",
    "Snapshot",
    "StateReader",
    "check_surroundings",
    "create_database",
    "has_log",
    "trouble",
]

_APPLICATION_ID = 0x52504D42  # "RPMB"
_FORMAT = 1
# The header of an SQLite database: its magic, and where user_version and application_id stand.
_HEADER_MAGIC = b"SQLite format 3\0"
_HEADER_NUMBERS = (60, 68)
_HEADER_SIZE = 100
# user_version is the format, and above it the low bits of the number of starts: the one place that
# can be read without the write-ahead log, and that no torn write can tear.
_FORMAT_BITS = 8
_STARTS_MASK = (1 << 23) - 1
_PAGE_SIZE = 4096  # bytes
_ADDRESS_SIZE = 2  # bytes
_LOG_SIZE = 1 << 20  # bytes of the write-ahead log before SQLite moves them into the database file
# What SQLite locks for readers: a writer that is alone holds all of it.
_LOCK_FIRST, _LOCK_SIZE = 0x40000002, 510
_STOPPED, _RUNNING, _STARTING = 0, 1, 2
_MARK_SIZE = 8  # bytes of a digest that recognise an earlier version of a block
_MARKS = 8  # earlier versions of a block that are recognised
# One transaction, ended by who executes it; the file is synced as a whole before it gets its name.
_SCHEMA = f"""
PRAGMA page_size = {_PAGE_SIZE};
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
BEGIN;
PRAGMA application_id = {_APPLICATION_ID};
PRAGMA user_version = {_FORMAT};
CREATE TABLE device (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    name TEXT NOT NULL,         -- random, tells devices apart
    size INTEGER NOT NULL,      -- of the image, bytes
    counter INTEGER NOT NULL,   -- write counter before the first pending commit
    key BLOB,                   -- the key, where no key file keeps it
    fingerprint BLOB,           -- of the key, where a key file keeps it
    starts INTEGER NOT NULL,    -- how often it was started
    stamped INTEGER NOT NULL,   -- 1 if the image was stamped with name and starts
    running INTEGER NOT NULL    -- not 0 while the write-ahead log belongs to the state; 2 at first
) STRICT;
CREATE TABLE pending (          -- commits whose blocks the image need not hold yet, latest last
    id INTEGER PRIMARY KEY,
    counter INTEGER NOT NULL,   -- write counter after it
    blocks BLOB NOT NULL        -- address (2 bytes, big-endian) and data of each
) STRICT;
CREATE TABLE digest (           -- blocks of the image; without a row: all zeros, always so
    address INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL,       -- empty: all zeros
    earlier BLOB NOT NULL       -- first {_MARK_SIZE} bytes each of earlier SHA-256, newest first
) STRICT;
"""
_SET_DIGEST = f"""
INSERT INTO digest VALUES (?, ?, x'') ON CONFLICT (address) DO UPDATE SET
    earlier = CASE sha256 WHEN x'' THEN earlier ELSE
        substr(CAST(substr(sha256, 1, {_MARK_SIZE}) || earlier AS BLOB), 1, {_MARK_SIZE * _MARKS})
    END,
    sha256 = excluded.sha256
WHERE sha256 <> excluded.sha256
"""


class DeviceRow(NamedTuple):
    """What the database keeps of the device."""

    name: str
    size: int
    counter: int
    key: bytes | None
    fingerprint: bytes | None
    starts: int
    stamped: int
    running: int


class Digests(NamedTuple):
    """Of one block: SHA-256 (empty: zeros), and the marks of versions it had before."""

    sha256: bytes
    earlier: bytes

    def had(self, sha256: bytes) -> bool:
        """Whether this was an earlier version's digest, as far as that is remembered."""
        mark = sha256[:_MARK_SIZE]
        marks = range(0, len(self.earlier), _MARK_SIZE)
        return any(self.earlier[i : i + _MARK_SIZE] == mark for i in marks)


NO_DIGESTS = Digests(b"", b"")  # of a block that was always zeros


class StateReader:
    """What can be read of a state database; ``name`` is what messages call it.

    Raises sqlite3.Error, and StateError where it does not hold what this version writes.
    """

    def __init__(self, connection: sqlite3.Connection, name: str) -> None:
        self._connection = connection
        self._name = name

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _damaged(self, what: str) -> StateError:
        return StateError(_damage(self._name, what))

    def _check(self, starts: int, log: bool) -> DeviceRow:
        """Refuse damage, and a log that is missing or does not fit.

        ``starts``: what the file itself, without its log, knows of; ``log``: whether there is one.
        """
        (verdict,) = self._execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)
        row = self.device()
        if row.running != _STOPPED and not log:
            raise StateError(
                f"{self._name} was not closed, and its log {log_of(self._name)} is missing: what"
                " the log holds is lost with it; bring the two back together"
            )
        if starts != row.starts & _STARTS_MASK and row.running != _STARTING:
            raise StateError(
                f"{self._name} and its log {log_of(self._name)} are from different times: bring"
                " back the two that belong together, or a state file that was closed, without"
                " a log"
            )
        return row

    def device(self) -> DeviceRow:
        """What is kept of the device."""
        columns = ", ".join(DeviceRow._fields)
        found = self._execute(f"SELECT {columns} FROM device").fetchone()
        if found is None:
            raise self._damaged("no device in it")
        row = DeviceRow(*found)
        last = self._execute("SELECT counter FROM pending ORDER BY id DESC LIMIT 1").fetchone()
        counter = row.counter if last is None else last[0]
        if not 0 <= row.counter <= counter <= spec.MAX_WRITE_COUNTER:
            raise self._damaged(f"write counter {counter} after {row.counter}")
        for secret in (row.key, row.fingerprint):
            if secret is not None and len(secret) != spec.KEY_SIZE:
                raise self._damaged("a key of the wrong length")
        return row._replace(counter=counter)

    def pending(self, blocks: int) -> Iterator[tuple[int, bytes]]:
        """Blocks (address, data) that the image, of so many ``blocks``, need not hold yet.

        Of those with the same address the last one counts.
        """
        size = _ADDRESS_SIZE + spec.BLOCK_SIZE
        for number, packed in self._execute("SELECT id, blocks FROM pending ORDER BY id"):
            if len(packed) % size:
                raise self._damaged(f"pending commit {number}")
            for start in range(0, len(packed), size):
                data = start + _ADDRESS_SIZE
                address = int.from_bytes(packed[start:data], "big")
                if address >= blocks:
                    raise self._damaged(f"pending block {address}")
                yield address, packed[data : start + size]

    def digests(self, blocks: int) -> dict[int, Digests]:
        """Digests by address, of an image of so many ``blocks``."""
        rows = self._execute("SELECT address, sha256, earlier FROM digest")
        digests = {address: Digests(sha256, earlier) for address, sha256, earlier in rows}
        for address in digests:
            if not 0 <= address < blocks:
                raise self._damaged(f"digest of block {address}")
        return digests


class Snapshot(StateReader):
    """A state database and its log as they are now, in private memory; nothing is changed."""

    def __init__(self, path: str) -> None:
        starts = _check_state_file(path)
        content, log = _read(path)
        super().__init__(sqlite3.connect(":memory:", isolation_level=None), path)
        try:
            try:
                self._connection.deserialize(apply_log(content, log or b""))
            except ValueError as error:
                raise self._damaged(str(error)) from error
            self._check(starts, log is not None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Give the memory back."""
        self._connection.close()


class Database(StateReader):
    """The state database, locked for this process while open."""

    def __init__(self, path: str) -> None:
        self._log = log_of(path)
        starts = _check_state_file(path)
        self._owns_log = log = has_log(path)
        super().__init__(
            sqlite3.connect(_uri(path), uri=True, isolation_level=None, timeout=0), path
        )
        try:
            self._lock()
            self._owns_log = self._check(starts, log).running != _STOPPED
        except BaseException:
            self._close_connection()
            raise

    def _lock(self) -> None:
        """Take the database's lock: the first statement fails if it is taken."""
        # Exclusive before the first look at the log: then there is no shared-memory file.
        self._execute("PRAGMA locking_mode = EXCLUSIVE")
        (mode,) = self._execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":  # how SQLite says that the change failed
            raise sqlite3.OperationalError("it cannot have a write-ahead log here")
        self._execute("PRAGMA synchronous = FULL")
        self._execute(f"PRAGMA wal_autocheckpoint = {_LOG_SIZE // _PAGE_SIZE}")
        self._execute("BEGIN EXCLUSIVE")
        self._execute("COMMIT")

    def transaction(self) -> _Transaction:
        """Make what a with-block does one durable step, or nothing."""
        return _Transaction(self._connection)

    def program(self, key: bytes | None, fingerprint: bytes | None) -> None:
        """Keep a key or the fingerprint of one; without either, no key is programmed."""
        self._execute("UPDATE device SET key = ?, fingerprint = ?", (key, fingerprint))

    def add_pending(self, counter: int, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Set the write counter, and keep blocks (address, data) until the image has them.

        One row, however many they are: this is what every write waits for.
        """
        packed = b"".join(
            [
                part
                for address, data in blocks
                for part in (address.to_bytes(_ADDRESS_SIZE, "big"), data)
            ]
        )
        self._execute("INSERT INTO pending (counter, blocks) VALUES (?, ?)", (counter, packed))

    def clear_pending(self, counter: int) -> None:
        """Set the write counter, and forget all pending blocks."""
        self._execute("UPDATE device SET counter = ?", (counter,))
        self._execute("DELETE FROM pending")

    def set_digests(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Note what blocks (address, data) the image has now, and mark what it had before."""
        self._connection.executemany(_SET_DIGEST, ((a, digest(data)) for a, data in blocks))

    def set_stamped(self, stamped: bool) -> None:
        """Note whether the image could be stamped."""
        self._execute("UPDATE device SET stamped = ?", (stamped,))

    def warm_log(self) -> None:
        """Let the log have its usual size, so that commits overwrite it in place.

        A commit that makes a file longer also waits for the file system's own journal. Zeros behind
        its frames are nothing to SQLite: they do not continue the checksum of those before.
        """
        fd = os.open(self._log, os.O_WRONLY | os.O_CLOEXEC)
        try:
            missing = (
                _LOG_SIZE + _LOG_SIZE // 32 - os.lseek(fd, 0, os.SEEK_END)
            )  # frame headers too
            write_all(fd, bytes(max(missing, 0)))
        finally:
            os.close(fd)

    def mark_running(self, starts: int) -> None:
        """Note, in the database file itself, that its write-ahead log belongs to it from now on.

        Until that is so the device is starting: its log may then be of a file that says less.
        """
        self._owns_log = True
        version = (starts & _STARTS_MASK) << _FORMAT_BITS | _FORMAT
        with self.transaction():
            self._execute("UPDATE device SET running = ?, starts = ?", (_STARTING, starts))
            self._execute(f"PRAGMA user_version = {version}")
        # Before the file says that there is a log, its name has to last. SQLite sees to that too,
        # but keeps a failure to itself.
        sync_folder(self._log)
        self._empty_log()
        self._execute("UPDATE device SET running = ?", (_RUNNING,))

    def _empty_log(self) -> None:
        """Move what the log holds into the database file, and begin the log anew."""
        self._execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def close(self) -> None:
        """Leave one complete file; where that cannot be noted in it, a log stays beside it.

        Raises sqlite3.Error or OSError in the latter case; the database is closed all the same.
        """
        try:
            if self._owns_log:
                try:
                    self._mark_stopped()
                except sqlite3.Error:
                    # A disk that failed once: once more, because SQLite removes the log below when
                    # the disk is back, whatever the file says of it.
                    self._mark_stopped()
        finally:
            self._close_connection()

    def _mark_stopped(self) -> None:
        self._empty_log()  # so that a full disk has room, and the file itself knows of this start
        self._execute("UPDATE device SET running = ?", (_STOPPED,))
        self._owns_log = False

    def _close_connection(self) -> None:
        # SQLite removes the log when all of it is in the file. The file then is complete, but may
        # say that a log belongs to it: an empty one holds just as much.
        self._connection.close()
        if self._owns_log and not os.path.exists(self._log):
            os.mknod(self._log, 0o600)  # in the sandbox it cannot be opened
            sync_folder(self._log)


class _Transaction:
    """A with-block that is one durable step: committed at its end, rolled back on any exception."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._connection.execute("COMMIT")
        finally:
            if self._connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")


def _uri(path: str) -> str:
    """Name a file that has to be there already, as SQLite's URIs do."""
    escaped = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return f"file:{escaped}?mode=rw"


def _check_state_file(path: str) -> int:
    """Refuse what is not a state file of ours before SQLite, which would change it, opens it.

    Return the low bits of the number of starts that the file itself, without its log, knows of.
    """
    try:
        with open(path, "rb", opener=open_regular) as file:
            header = file.read(_HEADER_SIZE)
            with suppress(BlockingIOError, PermissionError):  # SQLite says that it is in use
                _lock_readers(file, path)
    except OSError as error:
        raise StateError(f"the state file {path} cannot be read: {error.strerror}") from error
    if not header:
        raise StateError(
            f"the state file {path} is empty, and so was not left by vhost-rpmb: bring it back from"
            " a backup; starting without it would set the write counter back"
        )
    version, application = (
        int.from_bytes(header[offset : offset + 4], "big") for offset in _HEADER_NUMBERS
    )
    if not header.startswith(_HEADER_MAGIC) or application != _APPLICATION_ID:
        raise StateError(
            f"{path} is not a vhost-rpmb state file: bring back the right one, or name another with"
            " --state-path"
        )
    number = version & ((1 << _FORMAT_BITS) - 1)
    if number != _FORMAT:
        raise StateError(
            f"the state file {path} has format {number}, this version knows {_FORMAT}: use the"
            " version of vhost-rpmb that wrote it"
        )
    return version >> _FORMAT_BITS


def has_log(path: str) -> bool:
    """Whether a write-ahead log lies beside a state file: it was not closed, or is in use."""
    return os.path.exists(log_of(path))


def create_database(path: str, image: ImageFile, counter: int) -> None:
    """Make the state of a new device: whole under its name, or not at all."""
    if os.path.lexists(log_of(path)):
        raise StateError(
            f"{path}-wal is there, but {path}, whose log it is, is missing: bring back the state"
            " file from a backup; starting without it would set the write counter back"
        )
    new = new_of(path)
    leftovers = (new, journal_of(new), log_of(new))
    try:
        for leftover in leftovers:
            with suppress(FileNotFoundError):
                os.unlink(leftover)
        os.close(os.open(new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
        connection = sqlite3.connect(_uri(new), uri=True)
        try:
            connection.executescript(_SCHEMA)
            with connection:
                connection.execute(
                    "INSERT INTO device VALUES (1, ?, ?, ?, NULL, NULL, 0, 0, ?)",
                    (os.urandom(8).hex(), image.file_size, counter, _STOPPED),
                )
                digests = ((address, digest(data)) for address, data in image.blocks())
                connection.executemany(
                    _SET_DIGEST, ((a, sha256) for a, sha256 in digests if sha256)
                )
        finally:
            connection.close()
        fd = os.open(new, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        os.link(new, path)
    finally:
        for leftover in leftovers:
            with suppress(OSError):
                os.unlink(leftover)
    sync_folder(image.path)


def _read(path: str) -> tuple[bytes, bytes | None]:
    """Read a state file and its log, if there is one; no daemon runs meanwhile."""
    with open(path, "rb", opener=open_regular) as file:
        try:
            _lock_readers(file, path)
        except (BlockingIOError, PermissionError):
            raise StateError(_in_use(path)) from None
        content = file.read()
        try:
            with open(log_of(path), "rb", opener=open_regular) as log:
                return content, log.read()
        except FileNotFoundError:
            return content, None


def _lock_readers(file: BinaryIO, path: str) -> None:
    """Lock a state file as SQLite's readers do, while it is open.

    Raises BlockingIOError or PermissionError where a daemon uses it; StateError where there are no
    locks, which SQLite would take for a file in use.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB, _LOCK_SIZE, _LOCK_FIRST)
    except (BlockingIOError, PermissionError):
        raise
    except OSError as error:
        raise StateError(cannot_lock(f"the state file {path}", error)) from error


def check_surroundings(path: str) -> None:
    """Refuse anything but regular files where SQLite keeps its own: it would wait for a FIFO."""
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
    """Say for the operator why the state file cannot be used."""
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if code == sqlite3.SQLITE_BUSY:
        return _in_use(path)
    if code in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return _damage(path, str(error))
    if code == sqlite3.SQLITE_FULL:
        return f"the file system of the state file {path} is full: make room on it"
    if code == sqlite3.SQLITE_READONLY:
        return f"the state file {path} cannot be written to: see to its mode and its file system"
    return f"the state file {path} cannot be used: {error}"


def _in_use(path: str) -> str:
    return f"the state file {path} is in use by another process: end that one first"


def _damage(path: str, what: str) -> str:
    return (
        f"the state file {path} is damaged ({' '.join(what.split())}): bring it back from a backup"
        " together with its image and key file"
    )
