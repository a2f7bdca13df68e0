# SPDX-License-Identifier: Apache-2.0
"""What is read of a write-ahead log is what SQLite itself makes of it."""

from __future__ import annotations

import random
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from vhost_rpmb.storage.local.wal import apply_log


def rows(connection: sqlite3.Connection) -> list[tuple[int, bytes]]:
    """Everything in it, which has to be sound."""
    assert connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
    return connection.execute("SELECT id, data FROM t ORDER BY id").fetchall()


def by_sqlite(database: bytes, log: bytes, folder: Path) -> list[tuple[int, bytes]]:
    path = folder / "copy"
    path.write_bytes(database)
    path.with_name("copy-wal").write_bytes(log)
    with closing(sqlite3.connect(path)) as connection:
        return rows(connection)


def by_us(database: bytes, log: bytes) -> list[tuple[int, bytes]]:
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.deserialize(apply_log(database, log))
        return rows(connection)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    """A database and its log: transactions of all sizes, one rolled back, a vacuum, a restart."""
    path = tmp_path_factory.mktemp("wal") / "db"
    source = random.Random(1)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        execute = connection.execute
        execute("PRAGMA journal_mode = WAL")
        execute("PRAGMA wal_autocheckpoint = 0")
        execute("CREATE TABLE t (id INTEGER PRIMARY KEY, data BLOB)")
        for number in range(60):
            execute("BEGIN")
            for _ in range(source.choice([1, 1, 3, 40])):
                size = source.choice([10, 300, 9000])
                execute("INSERT INTO t (data) VALUES (?)", (source.randbytes(size),))
            execute("DELETE FROM t WHERE id % 7 = ?", (number % 7,))
            execute("ROLLBACK" if number % 9 == 4 else "COMMIT")
            if number == 20:
                execute("PRAGMA wal_checkpoint(RESTART)")
            if number == 40:
                execute("DELETE FROM t WHERE id % 2")
                execute("VACUUM")
        result = path.read_bytes(), path.with_name("db-wal").read_bytes()
    assert len(result[1]) > 100_000
    return result


def test_complete_log(written: tuple[bytes, bytes], tmp_path: Path) -> None:
    database, log = written
    assert by_us(database, log) == by_sqlite(database, log, tmp_path)
    assert by_us(database, log) != by_us(database, b"")


@pytest.mark.parametrize("seed", range(60))
def test_torn_or_changed_log(written: tuple[bytes, bytes], tmp_path: Path, seed: int) -> None:
    database, log = written
    source = random.Random(seed)
    damaged = bytearray(log)
    if seed % 3 == 0:
        del damaged[source.randrange(len(log)) :]
    elif seed % 3 == 1:
        damaged[source.randrange(len(log))] ^= 1 << source.randrange(8)
    else:
        first = source.randrange(len(log) // 512) * 512
        damaged[first : first + 512] = bytes(512)
    assert by_us(database, bytes(damaged)) == by_sqlite(database, bytes(damaged), tmp_path)


@pytest.mark.parametrize("length", [0, 1, 31, 32, 33, 56])
def test_log_without_a_frame(written: tuple[bytes, bytes], tmp_path: Path, length: int) -> None:
    database, log = written
    for content in (log[:length], bytes(length)):
        assert by_us(database, content) == by_sqlite(database, content, tmp_path)


def test_log_of_another_page_size(written: tuple[bytes, bytes], tmp_path: Path) -> None:
    other = tmp_path / "other"
    with closing(sqlite3.connect(other, isolation_level=None)) as connection:
        connection.execute("PRAGMA page_size = 1024")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE t (id)")
        log = other.with_name("other-wal").read_bytes()
    with pytest.raises(ValueError, match="of another format"):
        apply_log(written[0], log)
