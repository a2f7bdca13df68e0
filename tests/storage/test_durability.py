# SPDX-License-Identifier: Apache-2.0
"""Data, counter and key survive stops, crashes and failures."""

from __future__ import annotations

import os
import shutil
import stat
import sys
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.rig import make_image
from tests.support.store import KIB, A, B, Open, in_killed_process, state_of
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import MAX_PENDING, Store
from vhost_rpmb.storage.paths import Paths


def test_new_device_has_counter_0_no_key_and_zeros(opened: Open, flash: Path) -> None:
    store = opened()
    assert (store.counter, store.key) == (0, None)
    assert bytes(store.image) == bytes(128 * KIB)
    assert not any(store.damaged)
    assert stat.S_IMODE(state_of(flash).stat().st_mode) == 0o600


def test_data_counter_and_key_survive_a_stop(opened: Open, flash: Path) -> None:
    store = opened()
    assert store.commit(0, [], KEY)
    assert store.commit(2, [(3, A), (511, B)], None)
    store.close()
    assert flash.read_bytes() == bytes(3 * 256) + A + bytes(507 * 256) + B
    assert sorted(os.listdir(flash.parent)) == ["flash.img", "flash.img.state"]
    store = opened()
    assert (store.counter, store.key) == (2, KEY)
    assert bytes(store.image) == flash.read_bytes()


def test_error_of_our_own_during_the_stop_leaves_a_state_that_starts(
    opened: Open, flash: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = opened()
    assert store.commit(1, [(3, A)], KEY)

    def fail() -> bool:
        raise RuntimeError

    monkeypatch.setattr(store, "checkpoint", fail)
    with pytest.raises(RuntimeError):
        store.close()
    assert not Path(f"{state_of(flash)}-wal").exists()
    store = opened()
    assert (store.counter, bytes(store.image[768:1024])) == (1, A)


def test_data_counter_and_key_survive_a_kill(opened: Open, flash: Path) -> None:
    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        store.commit(0, [], KEY)
        for counter in range(1, 50):
            store.commit(counter, [(counter, bytes([counter]) * 256)], None)

    in_killed_process(work)
    store = opened()
    assert (store.counter, store.key) == (49, KEY)
    for counter in range(1, 50):
        assert store.image[counter * 256] == counter
    assert flash.read_bytes() == bytes(128 * KIB)  # a start serves first
    assert store.checkpoint_due
    assert store.checkpoint()
    assert flash.read_bytes() == bytes(store.image)


def test_pending_blocks_are_bounded_over_kills(opened: Open, flash: Path) -> None:
    """One block, written again and again by processes that are never idle."""

    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        assert store.commit(store.counter + 1, [(7, A)] * (MAX_PENDING // 2 - 1), None)

    for _ in range(2):
        in_killed_process(work)
    store = opened()
    assert (store.counter, store.checkpoint_due) == (2, True)
    assert store.commit(3, [(7, B)] * 2, None)
    assert not store.checkpoint_due


def test_block_may_be_zeroed_and_written_again(opened: Open, flash: Path) -> None:
    store = opened()
    zeros = bytes(256)
    for counter, data in enumerate((A, zeros, B, zeros, zeros, A), 1):
        assert store.commit(counter, [(7, data)], None)
        assert store.checkpoint()
        store.close()
        store = opened()
        assert store.image[7 * 256 : 8 * 256] == data
        assert not any(store.damaged)


def test_pending_blocks_are_bounded(opened: Open, tmp_path: Path) -> None:
    flash = make_image(tmp_path / "large", 16)
    store = opened(flash)
    store.commit(1, [(address, A) for address in range(MAX_PENDING - 1)], None)
    due = store.checkpoint_due
    store.commit(2, [(MAX_PENDING, B)], None)
    assert (due, store.checkpoint_due) == (True, False)
    assert flash.read_bytes()[:256] == A


def test_database_does_not_grow_with_the_number_of_commits(opened: Open, flash: Path) -> None:
    store = opened()
    sizes = []
    for counter in range(1, 3001):
        store.commit(counter, [(counter % 512, A)], None)
        if not counter % 1000:
            store.checkpoint()
            log = flash.with_name(flash.name + ".state-wal").stat().st_size
            sizes.append(state_of(flash).stat().st_size + log)
    assert sizes[2] <= sizes[0] * 1.1


@pytest.mark.parametrize("image_fails", [False, True])
def test_database_does_not_grow_when_one_block_is_rewritten(
    opened: Open, flash: Path, image_fails: bool, caplog: pytest.LogCaptureFixture
) -> None:
    store = opened()
    if image_fails:
        flash_fd = store._image_file._fd
        read_only = os.open(flash, os.O_RDONLY)
        os.dup2(read_only, flash_fd)  # every write into the image fails from now on
        os.close(read_only)
    sizes = []
    for counter in range(1, 6 * MAX_PENDING // 64 + 1):
        assert store.commit(counter, [(7, A if counter % 2 else B)] * 64, None)
        if not counter % (MAX_PENDING // 64):
            log = flash.with_name(flash.name + ".state-wal").stat().st_size
            sizes.append(state_of(flash).stat().st_size + log)
    assert sizes[5] <= sizes[1] * 1.1
    assert store.checkpoint_due == image_fails
    assert ("could not be written into" in caplog.text) == image_fails


@pytest.mark.parametrize("counter", [0, 7])
def test_image_with_content_is_adopted_with_an_explicit_counter(
    opened: Open, flash: Path, counter: int
) -> None:
    flash.write_bytes(bytes(256) + A + bytes(510 * 256))
    store = opened(initial_counter=counter)
    assert store.counter == counter
    assert store.image[256:512] == A
    assert not any(store.damaged)
    store.close()
    store = opened()
    assert store.counter == counter
    assert not any(store.damaged)


@pytest.mark.parametrize(
    ("before", "after"), [(A, B), (A, bytes(256)), (bytes(256), A), (A, A[:255] + b"B")]
)
def test_changed_block_is_reported_until_its_next_write(
    opened: Open,
    flash: Path,
    caplog: pytest.LogCaptureFixture,
    before: bytes,
    after: bytes,
) -> None:
    store = opened()
    store.commit(1, [(7, before), (8, A)], None)
    store.close()
    with flash.open("r+b") as image:
        image.seek(7 * 256)
        image.write(after)
    store = opened()
    assert [address for address, mark in enumerate(store.damaged) if mark] == [7]
    assert "1 blocks" in caplog.text
    assert "address 7" in caplog.text
    store.commit(2, [(7, B)], None)
    assert not any(store.damaged)
    store.close()
    assert not any(opened().damaged)


def test_pending_block_is_written_into_a_changed_image(opened: Open, flash: Path) -> None:
    def work() -> None:
        open_store(Paths.resolve(str(flash))).commit(1, [(7, A)], None)

    in_killed_process(work)
    with flash.open("r+b") as image:
        image.write(b"!" * 256 * 8)
    store = opened()
    assert store.image[7 * 256 : 8 * 256] == A
    assert [address for address, mark in enumerate(store.damaged) if mark] == list(range(7))


@pytest.mark.parametrize("counter", [0, 1, spec.MAX_WRITE_COUNTER])
def test_new_device_starts_at_the_initial_counter(opened: Open, counter: int) -> None:
    opened(initial_counter=counter).close()
    assert opened().counter == counter


def test_stored_counter_takes_precedence_over_the_initial_one(
    opened: Open, warnings: list[str]
) -> None:
    opened(initial_counter=5).close()
    opened(initial_counter=5).close()
    assert warnings == []
    store = opened(initial_counter=9)
    assert store.counter == 5
    assert len(warnings) == 1
    assert "--initial-counter=9" in warnings[0]


def test_image_over_16_mib_is_served_as_16_mib(
    opened: Open, tmp_path: Path, warnings: list[str]
) -> None:
    flash = make_image(tmp_path / "large", 256)
    assert len(opened(flash).image) == spec.MAX_CAPACITY
    assert len(warnings) == 1
    assert "first 16 MiB" in warnings[0]


def test_device_can_be_moved_after_a_crash(opened: Open, flash: Path, tmp_path: Path) -> None:
    def work() -> None:
        open_store(Paths.resolve(str(flash))).commit(1, [(7, A)], None)

    in_killed_process(work)
    moved = tmp_path / "moved"
    shutil.copytree(flash.parent, moved)
    assert opened(moved / flash.name).counter == 1


def test_interrupted_creation_is_repeated(opened: Open, flash: Path) -> None:
    new = state_of(flash).with_name("flash.img.state.new")
    new.write_bytes(b"half a database")
    assert opened().counter == 0
    assert not new.exists()


@pytest.mark.parametrize("content", [bytes(256), A])
@pytest.mark.parametrize("work", range(16))
def test_creation_is_atomic_and_can_be_repeated(
    opened: Open, flash: Path, work: int, content: bytes
) -> None:
    """Killed at any system call of the creation, the same command works at the next start."""
    with flash.open("r+b") as image:
        image.write(content)

    def creation() -> None:
        calls = 0

        def count(event: str, _: object) -> None:
            nonlocal calls
            if event.startswith(("os.", "sqlite3.", "open")):
                calls += 1
                if calls == 3 * work + 1:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(count)
        open_store(Paths.resolve(str(flash)), initial_counter=3)

    in_killed_process(creation)
    if "user.vhost-rpmb" in os.listxattr(flash):
        assert state_of(flash).exists()
    store = opened(initial_counter=3)
    assert (store.counter, store.key) == (3, None)
    assert store.image[:256] == content


def test_commit_without_memory_fails_and_keeps_the_state(opened: Open, flash: Path) -> None:
    reader, writer = os.pipe()

    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        for limit in range(2_000_000, 0, -10_000):  # SQLite's for the process; it only goes down
            store._database._execute(f"PRAGMA hard_heap_limit = {limit}")
            done = store.commit(store.counter + 1, [(n, bytes([n]) * 256) for n in range(99)], None)
            os.write(writer, b"1" if done else b"0")
            if not done:
                return

    in_killed_process(work)
    answers = os.read(reader, 1000)
    assert answers.endswith(b"10")
    store = opened()
    assert store.counter == len(answers) - 1
    assert store.image[98 * 256] == 98


def write_some(store: Store, first: int, count: int) -> None:
    for number in range(first, first + count):
        assert store.commit(number, [(number, bytes([number % 251 + 1]) * 256)], None)


def test_checkpoint_in_slices(opened: Open, flash: Path) -> None:
    """Commits between slices stay pending, those before are moved."""
    store = opened()
    write_some(store, 1, 100)
    slices = 1
    between = {3: 40, 9: 7, 12: 300}  # by slice: a block, the first two for the second time
    while store.checkpoint_slice() is None:
        slices += 1
        if slices in between:
            address = between[slices]
            assert store.commit(store.counter + 1, [(address, A)], None)
    assert slices > 15
    assert store.checkpoint_due == any(number <= slices for number in between)
    before = bytes(store.image)
    counter = store.counter
    store.close()
    assert flash.read_bytes() == before
    again = opened()
    assert (bytes(again.image), again.counter, any(again.damaged)) == (before, counter, False)


@pytest.mark.parametrize("stop", range(0, 24, 3))
def test_kill_between_slices(opened: Open, flash: Path, stop: int) -> None:
    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        write_some(store, 1, 100)
        for _ in range(stop):
            store.checkpoint_slice()
        write_some(store, 90, 20)

    in_killed_process(work)
    store = opened()
    expected = bytearray(128 * KIB)
    for number in range(1, 110):
        expected[number * 256 : (number + 1) * 256] = bytes([number % 251 + 1]) * 256
    assert (bytes(store.image), store.counter) == (bytes(expected), 109)
    assert not any(store.damaged)
    assert store.checkpoint()
    assert flash.read_bytes() == expected


def test_full_checkpoint_and_close_end_one_in_slices(opened: Open, flash: Path) -> None:
    for end in (Store.checkpoint, Store.close):
        store = opened()
        write_some(store, store.counter + 1, 40)
        for _ in range(4):
            assert store.checkpoint_slice() is None
        end(store)
        assert not store.checkpoint_due
        assert flash.read_bytes() == bytes(store.image)
        store.close()
