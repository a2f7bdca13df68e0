# SPDX-License-Identifier: Apache-2.0
"""The replay record belongs to the last commit, whatever happens to it; each format."""

from __future__ import annotations

import os
import resource
import signal
import sqlite3
import sys
import tarfile
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.store import A, B, Open, in_killed_process, state_of
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.interface import Possession
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.statefile import FORMAT
from vhost_rpmb.storage.local.store import MAX_PENDING, Store
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths

DATA = Path(__file__).parents[1] / "data"
BACK = Possession(generation=1, claim=bytes(range(16)))


def record(asked: int, key_programmed: bool = False) -> Replay:
    """The record of a batch of one write; its MAC tells it from others."""
    return Replay(1, asked.to_bytes(4, "big") + bytes([asked % 251]) * 32, key_programmed)


def commit(store: Store, *blocks: tuple[int, bytes]) -> None:
    asked = store.counter
    assert store.commit(asked + 1, list(blocks), None, record(asked))


def killed(flash: Path, *work: object) -> None:
    """Run steps (functions of a store) in a process that is killed."""

    def run() -> None:
        store = open_store(Paths.resolve(str(flash)))
        for step in work:
            step(store)  # type: ignore[operator]

    in_killed_process(run)


def test_record_of_the_last_commit_survives_a_kill(opened: Open, flash: Path) -> None:
    killed(flash, *[lambda store: commit(store, (1, A))] * 3)
    for _ in range(2):  # the start itself keeps it, whether it makes a checkpoint or not
        store = opened()
        assert (store.counter, store.replay) == (3, record(2))
        assert store.checkpoint()
        store.close()
    assert verify(Paths.resolve(str(flash))).clean


def test_record_is_durable_with_the_key(opened: Open, flash: Path) -> None:
    killed(flash, lambda store: store.commit(0, [], KEY, Replay(1, b"", True)))
    store = opened()
    assert (store.key, store.replay) == (KEY, Replay(1, b"", True))


def test_checkpoint_inside_a_commit_keeps_the_record(opened: Open, flash: Path) -> None:
    def work(store: Store) -> None:
        commit(store, *((0, A) for _ in range(MAX_PENDING - 1)))
        assert store.checkpoint_due
        commit(store, (1, B))
        assert not store.checkpoint_due

    killed(flash, work)
    assert verify(Paths.resolve(str(flash))).pending == []
    store = opened()
    assert (store.counter, store.replay) == (2, record(1))


def test_failed_commit_keeps_the_record_of_the_last_one(opened: Open, flash: Path) -> None:
    """A commit in its place, without blocks, makes sure that it stays undone."""
    reader, writer = os.pipe()

    def fail(store: Store) -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        _, limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limit))  # every write fails
        done = store.commit(2, [(1, B)], None, record(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        store._rewrite_uncertain_commit()
        os.write(writer, repr((done, store.replay, store._commit_uncertain)).encode())

    killed(flash, lambda store: commit(store, (1, A)), fail)
    assert os.read(reader, 1000).decode() == repr((False, record(0), False))
    os.close(reader)
    os.close(writer)
    store = opened()
    assert (store.counter, store.replay, bytes(store.image[256:512])) == (1, record(0), A)


def test_failed_checkpoint_keeps_the_record(opened: Open, flash: Path) -> None:
    def work(store: Store) -> None:
        commit(store, (1, A))
        commit(store, (1, B))
        read_only = os.open(flash, os.O_RDONLY)
        os.dup2(read_only, store._image_file._fd)
        assert not store.checkpoint()

    killed(flash, work)
    store = opened()
    assert (store.counter, store.replay) == (2, record(1))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_clean_stop_empties_the_record_if_no_answer_is_owed(
    opened: Open, flash: Path, checkpointed: bool
) -> None:
    store = opened()
    commit(store, (1, A))
    store.settle()
    if checkpointed:
        assert store.checkpoint()
    store.close()
    store = opened()
    assert (store.counter, store.replay) == (1, NO_REPLAY)


def test_clean_stop_keeps_the_record_while_answers_are_owed(opened: Open, flash: Path) -> None:
    """Killed after a commit; the next process is stopped before it served anything."""
    killed(flash, lambda store: commit(store, (1, A)))
    opened().close()
    store = opened()
    assert store.replay == record(0)
    store.settle()
    commit(store, (2, A))  # owes its own answers again
    store.close()
    store = opened()
    assert store.replay == record(1)
    store.settle()
    store.close()
    assert opened().replay == NO_REPLAY


def test_clean_stop_empties_the_record_of_blocks_that_cannot_be_written(
    opened: Open, flash: Path
) -> None:
    store = opened()
    commit(store, (1, A))
    store.settle()
    read_only = os.open(flash, os.O_RDONLY)
    os.dup2(read_only, store._image_file._fd)
    os.close(read_only)
    store.close()
    assert flash.read_bytes()[256:512] == bytes(256)  # A is in the database only
    store = opened()
    assert (bytes(store.image[256:512]), store.replay) == (A, NO_REPLAY)


# Formats


def unpack(kind: str, folder: Path) -> Path:
    """Lay out a fixture; return its image."""
    with tarfile.open(DATA / f"{kind}.tar.gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            (folder / member.name).write_bytes(content.read())
    return folder / "flash.img"


def format_of(flash: Path) -> int:
    """The format in the header of the state file."""
    return state_of(flash).read_bytes()[63]


@pytest.mark.parametrize("number", [1, 2, FORMAT])
@pytest.mark.parametrize("kind", ["stopped", "killed"])
def test_state_of_every_format_is_loaded(
    opened: Open, tmp_path: Path, number: int, kind: str
) -> None:
    """Counter 3; key KEY; block 2 was A, then zeros, then B, block 5 is A."""
    flash = unpack(f"format-{number}-{kind}", tmp_path)
    report = verify(Paths.resolve(str(flash)))
    assert (report.clean, report.pending) == ((True, []) if kind == "stopped" else (False, [2]))
    assert format_of(flash) == number
    store = opened(flash)
    assert format_of(flash) == FORMAT
    assert (store.counter, store.key, any(store.damaged)) == (3, KEY, False)
    assert bytes(store.image[: 6 * 256]) == bytes(512) + B + bytes(512) + A
    # The fixtures since format 2 owe the answer of the last write, also the one that was stopped.
    assert store.replay == (record(2) if number > 1 else NO_REPLAY)
    # Those of format 3 came back after a hand-over that failed.
    assert store.possession == (BACK if number == FORMAT else Possession())
    commit(store, (7, A))
    store.close()
    store = opened(flash)
    assert (store.counter, store.replay) == (4, record(3))


@pytest.mark.parametrize("kind", ["stopped", "killed"])
@pytest.mark.parametrize("call", range(12))
def test_upgrade_is_atomic_and_can_be_repeated(
    opened: Open, tmp_path: Path, kind: str, call: int
) -> None:
    """Killed at any system call of the first start, the state can be checked and started."""
    flash = unpack(f"format-1-{kind}", tmp_path)

    def upgrade() -> None:
        calls = 0

        def count(event: str, arguments: tuple[object, ...]) -> None:
            nonlocal calls
            if event.startswith(("os.", "sqlite3.", "open")):
                calls += 1
                if calls == 3 * call + 1:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(count)
        commit(open_store(Paths.resolve(str(flash))), (7, A))

    in_killed_process(upgrade)
    report = verify(Paths.resolve(str(flash)))
    assert report.counter in (3, 4)
    store = opened(flash)
    assert (store.counter, store.key, any(store.damaged)) == (report.counter, KEY, False)
    assert store.replay == (record(3) if store.counter == 4 else NO_REPLAY)
    commit(store, (8, B))
    store.close()
    assert opened(flash).replay == record(report.counter)


@pytest.mark.parametrize("statement", range(36))
def test_upgrade_is_atomic_at_every_statement(opened: Open, tmp_path: Path, statement: int) -> None:
    """Killed before any statement of the first start."""
    flash = unpack("format-1-killed", tmp_path)

    def upgrade() -> None:
        calls = 0

        def count(_code: object) -> None:
            nonlocal calls
            calls += 1
            if calls == statement + 1:
                os.kill(os.getpid(), 9)

        real = sqlite3.connect

        def connect(*arguments: object, **options: object) -> sqlite3.Connection:
            connection: sqlite3.Connection = real(*arguments, **options)  # type: ignore[call-overload]
            connection.set_trace_callback(count)
            return connection

        sqlite3.connect = connect  # type: ignore[assignment]
        commit(open_store(Paths.resolve(str(flash))), (7, A))

    in_killed_process(upgrade)
    assert verify(Paths.resolve(str(flash))).counter in (3, 4)
    store = opened(flash)
    assert store.replay == (record(3) if store.counter == 4 else NO_REPLAY)
    assert (format_of(flash), store.key) == (FORMAT, KEY)
