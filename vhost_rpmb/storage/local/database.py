# SPDX-License-Identifier: Apache-2.0
"""The state database: schema, statements and checks of its content; no decisions."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator
from contextlib import suppress

from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.interface import (
    ACTIVE,
    EXPORTED,
    IMPORTED,
    SUPERSEDED,
    VACANT,
    Possession,
)
from vhost_rpmb.storage.local.files import sync_folder, write_all
from vhost_rpmb.storage.local.image import digest
from vhost_rpmb.storage.local.statefile import (
    APPLICATION_ID,
    AWAY,
    FORMAT,
    STARTS_MASK,
    check_format,
    check_header,
    damage,
    has_log,
    is_away,
    user_version,
)
from vhost_rpmb.storage.paths import log_of
from vhost_rpmb.typed import NamedTuple

__all__ = [
    "NO_DIGESTS",
    "SCHEMA",
    "SET_DIGEST",
    "STOPPED",
    "Database",
    "DeviceRow",
    "Mark",
    "StateReader",
    "put_mark",
    "uri",
]

_PAGE_SIZE = 4096  # bytes
_ADDRESS_SIZE = 2  # bytes
_DIGEST_SIZE = 32  # bytes
_LOG_SIZE = 1 << 20  # bytes of the write-ahead log before SQLite moves them into the database file
_LOG_PART = 1 << 16  # bytes
_STATEMENTS = 16  # kept compiled: those of commits and checkpoints; a start has as many others
_CACHE_SIZE = 256  # KiB of pages; a commit uses a few, a start each of them once
STOPPED, _RUNNING, _STARTING = 0, 1, 2
_MARK_SIZE = 8  # bytes of a digest that recognise an earlier version of a block
_MARKS = 8  # earlier versions of a block that are recognised
# Columns of later formats; the default is what earlier ones meant.
_REPLAY = "replay BLOB NOT NULL DEFAULT x''"  # since format 2
_POSSESSION = (  # since format 3
    "state TEXT NOT NULL DEFAULT 'active'",
    "generation INTEGER NOT NULL DEFAULT 0",
    "token BLOB NOT NULL DEFAULT x''",
    "claim BLOB NOT NULL DEFAULT x''",
)
_ADDED = {"device": (_REPLAY, *_POSSESSION), "pending": (_REPLAY,)}
# One transaction, which the caller commits; the file is synced as a whole before it is published.
SCHEMA = f"""
PRAGMA page_size = {_PAGE_SIZE};
PRAGMA journal_mode = OFF;
PRAGMA synchronous = OFF;
PRAGMA cache_size = -{_CACHE_SIZE};
BEGIN;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE device (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    name TEXT NOT NULL,         -- random, tells devices apart
    size INTEGER NOT NULL,      -- of the image, bytes
    counter INTEGER NOT NULL,   -- write counter before the first pending commit
    key BLOB,                   -- the key, where no key file keeps it
    fingerprint BLOB,           -- of the key, where a key file keeps it
    starts INTEGER NOT NULL,    -- how often it was started
    stamped INTEGER NOT NULL,   -- 1 if the image was stamped with name and starts
    running INTEGER NOT NULL,   -- not 0 while the write-ahead log belongs to the state; 2 at first
    {_REPLAY},                  -- record of the last commit that is not pending
    {_POSSESSION[0]},           -- whether the device may answer
    {_POSSESSION[1]},           -- number of hand-overs
    {_POSSESSION[2]},           -- of the last hand-over
    {_POSSESSION[3]}            -- by which this host claims the generation
) STRICT;
CREATE TABLE pending (          -- commits whose blocks the image need not hold yet, latest last
    id INTEGER PRIMARY KEY,
    counter INTEGER NOT NULL,   -- write counter after it
    blocks BLOB NOT NULL,       -- address (2 bytes, big-endian) and data of each
    {_REPLAY}                   -- record of the answers that it owes
) STRICT;
CREATE TABLE digest (           -- blocks of the image; without a row: all zeros, always so
    address INTEGER PRIMARY KEY,
    sha256 BLOB NOT NULL,       -- empty: all zeros
    earlier BLOB NOT NULL       -- first {_MARK_SIZE} bytes each of earlier SHA-256, newest first
) STRICT;
"""
SET_DIGEST = f"""
INSERT INTO digest VALUES (?, ?, x'') ON CONFLICT (address) DO UPDATE SET
    earlier = CASE sha256 WHEN x'' THEN earlier ELSE
        substr(CAST(substr(sha256, 1, {_MARK_SIZE}) || earlier AS BLOB), 1, {_MARK_SIZE * _MARKS})
    END,
    sha256 = excluded.sha256
WHERE sha256 <> excluded.sha256
"""


class DeviceRow(NamedTuple):
    """The row of the device in the database."""

    name: str
    size: int
    counter: int
    key: bytes | None
    fingerprint: bytes | None
    starts: int
    stamped: int
    running: int
    replay: Replay
    possession: Possession


_FIXED = DeviceRow._fields[:-2]  # columns of every format
_STATES = (ACTIVE, VACANT, EXPORTED, IMPORTED, SUPERSEDED)


class Mark(NamedTuple):
    """Why a device is not here: the row of a table that exists in the format `AWAY` only."""

    state: str
    place: str
    device: str
    record: bytes


_MARK_TABLE = """
CREATE TABLE mark (
    state TEXT NOT NULL,        -- of the move
    place TEXT NOT NULL,        -- the store
    device TEXT NOT NULL,       -- the name of the device there
    record BLOB NOT NULL        -- what a repetition of the move needs
) STRICT;
"""


class Digests(NamedTuple):
    """Of one block: SHA-256 (empty: zeros), and marks of its earlier versions."""

    sha256: bytes
    earlier: bytes

    def had(self, sha256: bytes) -> bool:
        """Whether this is the digest of an earlier version that is still recorded."""
        mark = sha256[:_MARK_SIZE]
        marks = range(0, len(self.earlier), _MARK_SIZE)
        return any(self.earlier[i : i + _MARK_SIZE] == mark for i in marks)


NO_DIGESTS = Digests(b"", b"")  # of a block that was always zeros


class StateReader:
    """Read access to a state database; ``name`` is its name in messages.

    Raises sqlite3.Error, and StateError for content that this version does not write.
    """

    def __init__(self, connection: sqlite3.Connection, name: str, *, away: bool) -> None:
        self._connection = connection
        self._name = name
        self._away = away  # a device that has moved is accepted

    def _execute(self, statement: str, values: tuple[object, ...] = ()) -> sqlite3.Cursor:
        return self._connection.execute(statement, values)

    def _damaged(self, what: str) -> StateError:
        return StateError(damage(self._name, what))

    def _check(self, starts: int, log: bool) -> DeviceRow:
        """Refuse damage, and a log that is missing or of another time.

        ``starts``: as the file records it without its log; ``log``: whether there is a log.
        """
        (verdict,) = self._execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise self._damaged(verdict)
        (version,) = self._execute("PRAGMA user_version").fetchone()  # the log may have a newer one
        check_format(self._name, version, away=self._away)
        row = self.device()
        if row.running != STOPPED and not log:
            raise StateError(
                f"{self._name} was not closed, and its log {log_of(self._name)} is missing, with"
                " the writes in it: restore the two together"
            )
        if starts != row.starts & STARTS_MASK and row.running != _STARTING:
            raise StateError(
                f"{self._name} and its log {log_of(self._name)} are from different times:"
                " restore two that belong together, or a state file that was closed, without a log"
            )
        return row

    def _columns(self, table: str) -> set[str]:
        """The columns that a table has; the header may be of an older format than the log."""
        found = self._execute(f"SELECT name FROM pragma_table_info('{table}')")
        return {name for (name,) in found}

    def device(self) -> DeviceRow:
        """The row of the device, with write counter and replay record of the latest commit."""
        present = self._columns("device")
        replay = "replay" if "replay" in present else "x''"
        columns = ", ".join((*_FIXED, replay))
        found = self._execute(f"SELECT {columns} FROM device").fetchone()
        if found is None:
            raise self._damaged("it has no device")
        row = DeviceRow._make((*found[:-1], NO_REPLAY, Possession()))
        if "state" in present:
            row = row._replace(possession=self._possession())
        latest = f"SELECT counter, {replay} FROM pending ORDER BY id DESC LIMIT 1"
        counter, packed = self._execute(latest).fetchone() or (row.counter, found[-1])
        if not 0 <= row.counter <= counter <= spec.MAX_WRITE_COUNTER:
            raise self._damaged(f"write counter {counter} after {row.counter}")
        for secret in (row.key, row.fingerprint):
            if secret is not None and len(secret) != spec.KEY_SIZE:
                raise self._damaged("a key of the wrong length")
        try:
            return row._replace(counter=counter, replay=Replay.unpack(packed))
        except ValueError as error:
            raise self._damaged(str(error)) from error

    def _possession(self) -> Possession:
        found = self._execute(f"SELECT {', '.join(Possession._fields)} FROM device").fetchone()
        possession = Possession._make(found)
        if possession.state not in _STATES or possession.generation < 0:
            raise self._damaged(f"state {possession.state!r}, generation {possession.generation}")
        return possession

    def mark(self) -> Mark | None:
        """Why the device is not here; None for one that is."""
        (version,) = self._execute("PRAGMA user_version").fetchone()
        if not is_away(version):
            return None
        found = self._execute(f"SELECT {', '.join(Mark._fields)} FROM mark").fetchone()
        if found is None:
            raise self._damaged("its device moved to an unknown place")
        return Mark._make(found)

    def pending(self, blocks: int) -> Iterator[tuple[int, bytes]]:
        """Blocks (address, data) that may not be in the image, which has ``blocks``, yet.

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

    def digests(self, blocks: int) -> Iterator[tuple[int, Digests]]:
        """Digests with their addresses, ascending, of an image that has ``blocks``."""
        rows = self._execute("SELECT address, sha256, earlier FROM digest ORDER BY address")
        for address, sha256, earlier in rows:
            if not 0 <= address < blocks:
                raise self._damaged(f"digest of block {address}")
            yield address, Digests(sha256, earlier)


class Database(StateReader):
    """The state database, locked for this process while open."""

    def __init__(self, path: str, *, away: bool = False) -> None:
        self._log = log_of(path)
        starts = check_header(path, away=away)
        self._owns_log = log = has_log(path)
        super().__init__(
            sqlite3.connect(
                uri(path),
                uri=True,
                isolation_level=None,
                timeout=0,
                cached_statements=_STATEMENTS,
            ),
            path,
            away=away,
        )
        try:
            self._lock()
            self._owns_log = self._check(starts, log).running != STOPPED
        except BaseException:
            self._close_connection()
            raise

    def _lock(self) -> None:
        """Lock the database: the first statement fails if another process has the lock."""
        # Exclusive before the first access to the log: then there is no shared-memory file.
        self._execute("PRAGMA locking_mode = EXCLUSIVE")
        (mode,) = self._execute("PRAGMA journal_mode = WAL").fetchone()
        if mode != "wal":  # how SQLite reports that the change failed
            raise sqlite3.OperationalError("a write-ahead log is not possible here")
        self._execute("PRAGMA synchronous = FULL")  # each transaction is synced
        self._execute(f"PRAGMA wal_autocheckpoint = {_LOG_SIZE // _PAGE_SIZE}")
        self._execute(f"PRAGMA cache_size = -{_CACHE_SIZE}")
        self._execute("BEGIN EXCLUSIVE")
        self._execute("COMMIT")

    def transaction(self) -> _Transaction:
        """Make the statements of a with-block, and those before it that wait, durable together."""
        return _Transaction(self._connection)

    def waiting(self) -> _Transaction:
        """Make the statements of a with-block wait for the next durable transaction, as part of it.

        They are undone with it if it fails. A transaction of their own without a sync would stay in
        the log, as SQLite sees it; if the next sync fails, it may not be there, and the rest of the
        log does not count either.
        """
        return _Transaction(self._connection, waits=True)

    @property
    def has_waiting(self) -> bool:
        """Whether statements wait for the next durable transaction."""
        return self._connection.in_transaction

    def undo_waiting(self) -> None:
        """Undo the statements that wait for the next durable transaction."""
        if self.has_waiting:
            self._execute("ROLLBACK")

    def program(self, key: bytes | None, fingerprint: bytes | None) -> None:
        """Store a key or the fingerprint of one; without either, no key is programmed."""
        self._execute("UPDATE device SET key = ?, fingerprint = ?", (key, fingerprint))

    def add_pending(
        self, counter: int, blocks: Iterable[tuple[int, bytes]], replay: Replay
    ) -> None:
        """Set counter and replay record, and store blocks (address, data) for the image.

        One row for any number of blocks: every write of the guest waits for this statement.
        """
        packed = b"".join(
            [
                part
                for address, data in blocks
                for part in (address.to_bytes(_ADDRESS_SIZE, "big"), data)
            ]
        )
        self._execute(
            "INSERT INTO pending (counter, blocks, replay) VALUES (?, ?, ?)",
            (counter, packed, replay.pack()),
        )

    def clear_pending(self, counter: int, replay: Replay, last: int | None = None) -> None:
        """Set counter and replay record, and delete all pending blocks, or those up to a commit."""
        self._execute("UPDATE device SET counter = ?, replay = ?", (counter, replay.pack()))
        if last is None:
            self._execute("DELETE FROM pending")
        else:
            self._execute("DELETE FROM pending WHERE id <= ?", (last,))

    def last_pending(self) -> int:
        """The number of the last pending commit; 0 if there is none."""
        (number,) = self._execute("SELECT ifnull(max(id), 0) FROM pending").fetchone()
        return int(number)

    def clear_oldest(self, last: int, count: int) -> bool:
        """Delete so many of the oldest pending commits, if one up to ``last`` is left then."""
        found = "SELECT id FROM pending WHERE id < ? ORDER BY id LIMIT 1 OFFSET ?"
        row = self._execute(found, (last, count)).fetchone()
        if row is None:
            return False
        self._execute("DELETE FROM pending WHERE id < ?", row)
        return True

    def clear_replay(self) -> None:
        """Make the replay record empty, where it was kept last."""
        self._execute("UPDATE device SET replay = x''")
        self._execute("UPDATE pending SET replay = x'' WHERE id = (SELECT max(id) FROM pending)")

    def possess(self, possession: Possession) -> None:
        """Store whether the device may answer."""
        names = ", ".join(f"{name} = ?" for name in Possession._fields)
        self._execute(f"UPDATE device SET {names}", possession)

    def rename(self, name: str) -> None:
        """Store the name of a device that was received."""
        self._execute("UPDATE device SET name = ?", (name,))

    def mark_damaged(self, addresses: Iterable[int]) -> None:
        """Store that blocks cannot be served: no content has the digest that they get."""
        rows = ((address, os.urandom(_DIGEST_SIZE)) for address in addresses)
        self._connection.executemany(SET_DIGEST, rows)

    def set_digests(self, blocks: Iterable[tuple[int, bytes]]) -> None:
        """Store the digests of blocks (address, data) of the image, and mark earlier versions."""
        self._connection.executemany(SET_DIGEST, ((a, digest(data)) for a, data in blocks))

    def set_stamped(self, stamped: bool) -> None:
        """Store whether the image could be stamped."""
        self._execute("UPDATE device SET stamped = ?", (stamped,))

    def warm_log(self) -> None:
        """Extend the log to its usual size, so that commits overwrite it in place.

        A commit that extends a file also waits for the file system's own journal. SQLite ignores
        zeros after the frames: they do not continue the checksum of the frames before.
        """
        fd = os.open(self._log, os.O_WRONLY | os.O_CLOEXEC)
        try:
            size = _LOG_SIZE + _LOG_SIZE // 32  # with the headers of the frames
            missing = max(size - os.lseek(fd, 0, os.SEEK_END), 0)
            # In parts: once a large block was freed, the C library keeps as much of later ones.
            while missing:
                part = bytes(min(missing, _LOG_PART))
                write_all(fd, part)
                missing -= len(part)
        finally:
            os.close(fd)

    def mark_running(self, starts: int, possession: Possession | None = None) -> None:
        """Record in the database file itself that its write-ahead log now belongs to it.

        Until then the device is starting: the file may record fewer starts than its log, and an
        older format, which is upgraded in the same transaction. ``possession`` replaces the present
        one in it.
        """
        self._owns_log = True
        with self.transaction():
            for table, columns in _ADDED.items():
                present = self._columns(table)
                for column in columns:
                    if column.split()[0] not in present:
                        self._execute(f"ALTER TABLE {table} ADD COLUMN {column}")
            self._execute("UPDATE device SET running = ?, starts = ?", (_STARTING, starts))
            if possession is not None:
                self.possess(possession)
            self._execute(f"PRAGMA user_version = {user_version(starts)}")
        # The name of the log has to be durable before the file refers to it. SQLite syncs the
        # folder too, but does not report a failure.
        sync_folder(self._log)
        self._empty_log()
        self._execute("UPDATE device SET running = ?", (_RUNNING,))

    def set_mark(self, mark: Mark | None) -> None:
        """Record durably, also in the database file itself, where a stopped device is; None: here.

        Until then the log has the mark, or the file is as before.
        """
        starts = self.device().starts
        with self.transaction():
            put_mark(self._connection, starts, mark)
        sync_folder(self._log)
        self._empty_log()

    def _empty_log(self) -> None:
        """Move the content of the log into the database file, and restart the log."""
        self._execute("PRAGMA wal_checkpoint(RESTART)").fetchone()

    def close(self) -> None:
        """Leave one complete file; if it cannot be marked as stopped, a log stays beside it.

        Raises sqlite3.Error or OSError in the latter case; the database is closed in any case.
        """
        try:
            if self._owns_log:
                try:
                    self._mark_stopped()
                except sqlite3.Error:
                    # Retried once: if the disk failed for a moment only, SQLite removes the log
                    # below, whatever the file says of it.
                    self._mark_stopped()
        finally:
            self._close_connection()

    def _mark_stopped(self) -> None:
        self._empty_log()  # gives a full disk room, and the file records this start
        self._execute("UPDATE device SET running = ?", (STOPPED,))
        self._owns_log = False

    def _close_connection(self) -> None:
        # SQLite removes the log when all of it is in the file. The file then is complete, but may
        # still refer to a log: an empty one is equivalent.
        self._connection.close()
        if self._owns_log and not os.path.exists(self._log):
            os.mknod(self._log, 0o600)  # in the sandbox it cannot be opened
            sync_folder(self._log)


class _Transaction:
    """A with-block in a transaction, which is committed at its end unless it ``waits``.

    Rolled back on an exception, as a whole.
    """

    def __init__(self, connection: sqlite3.Connection, *, waits: bool = False) -> None:
        self._connection = connection
        self._waits = waits

    def __enter__(self) -> None:
        if not self._connection.in_transaction:
            self._connection.execute("BEGIN IMMEDIATE")

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        done = kind is None
        try:
            if done and not self._waits:
                done = False
                self._connection.execute("COMMIT")
        finally:
            if not done and self._connection.in_transaction:
                with suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")


def put_mark(connection: sqlite3.Connection, starts: int, mark: Mark | None) -> None:
    """Write where a device is, None: here; the caller commits."""
    connection.execute("DROP TABLE IF EXISTS mark")
    if mark is not None:
        connection.execute(_MARK_TABLE)
        connection.execute("INSERT INTO mark VALUES (?, ?, ?, ?)", mark)
    connection.execute(f"PRAGMA user_version = {user_version(starts, AWAY if mark else FORMAT)}")


def uri(path: str) -> str:
    """Return the URI by which SQLite opens a file, without creating it."""
    escaped = os.path.abspath(path).replace("%", "%25").replace("?", "%3f").replace("#", "%23")
    return f"file:{escaped}?mode=rw"
