# SPDX-License-Identifier: Apache-2.0
"""The durable state: what lasts, and every file that is refused at the start."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.rig import KEY, make_image, resolved, write_key
from vhost_rpmb.errors import OperatorError, StateError, UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local import image, statefile
from vhost_rpmb.storage.local.opening import open_store, verify
from vhost_rpmb.storage.local.store import MAX_PENDING, Store
from vhost_rpmb.storage.paths import Paths

A, B = b"A" * 256, b"B" * 256
OTHER_KEY = bytes(32)
KIB = 1024

Open = Callable[..., Store]


@pytest.fixture
def warnings() -> list[str]:
    return []


@pytest.fixture
def opened(flash: Path, warnings: list[str]) -> Iterator[Open]:
    """Open stores that are closed at the end."""
    stores: list[Store] = []

    def open_(path: Path = flash, **options: object) -> Store:
        paths = resolved(path, options)
        stores.append(open_store(paths, warn=warnings.append, **options))  # type: ignore[arg-type]
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


def state_of(flash: Path) -> Path:
    return flash.with_name(flash.name + ".state")


def in_a_killed_process(work: Callable[[], None]) -> None:
    """Run ``work`` in a process that ends without a chance to clean up."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)


# What lasts


def test_a_new_device_has_counter_0_no_key_and_zeros(opened: Open, flash: Path) -> None:
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


def test_data_counter_and_key_survive_a_kill(opened: Open, flash: Path) -> None:
    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        store.commit(0, [], KEY)
        for counter in range(1, 50):
            store.commit(counter, [(counter, bytes([counter]) * 256)], None)

    in_a_killed_process(work)
    store = opened()
    assert (store.counter, store.key) == (49, KEY)
    for counter in range(1, 50):
        assert store.image[counter * 256] == counter
    assert flash.read_bytes() == bytes(store.image)


def test_a_block_may_become_zeros_and_something_else_again(opened: Open, flash: Path) -> None:
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


def test_the_database_does_not_grow_with_the_number_of_commits(opened: Open, flash: Path) -> None:
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
def test_the_database_does_not_grow_when_one_block_is_written_over_and_over(
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
def test_an_image_with_content_is_adopted_with_an_explicit_counter(
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
def test_a_block_that_changed_is_noticed(
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


def test_a_block_that_waits_in_the_database_heals_the_image(opened: Open, flash: Path) -> None:
    def work() -> None:
        open_store(Paths.resolve(str(flash))).commit(1, [(7, A)], None)

    in_a_killed_process(work)
    with flash.open("r+b") as image:
        image.write(b"!" * 256 * 8)
    store = opened()
    assert store.image[7 * 256 : 8 * 256] == A
    assert [address for address, mark in enumerate(store.damaged) if mark] == list(range(7))


# The write counter


@pytest.mark.parametrize("counter", [0, 1, spec.MAX_WRITE_COUNTER])
def test_a_new_device_starts_at_the_initial_counter(opened: Open, counter: int) -> None:
    opened(initial_counter=counter).close()
    assert opened().counter == counter


def test_a_stored_counter_wins_and_the_difference_is_reported(
    opened: Open, warnings: list[str]
) -> None:
    opened(initial_counter=5).close()
    opened(initial_counter=5).close()
    assert warnings == []
    store = opened(initial_counter=9)
    assert store.counter == 5
    assert len(warnings) == 1
    assert "--initial-counter=9" in warnings[0]


# Keys


def test_without_a_key_path_the_state_keeps_the_key(opened: Open) -> None:
    store = opened()
    store.commit(0, [], KEY)
    store.close()
    assert opened().key == KEY


def test_with_a_key_path_the_file_keeps_the_key_and_the_state_does_not(
    opened: Open, flash: Path, tmp_path: Path
) -> None:
    path = tmp_path / "key"
    store = opened(key_path=str(path))
    store.commit(0, [], KEY)
    assert path.read_bytes() == KEY
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    files = [state_of(flash), flash.with_name(flash.name + ".state-wal"), flash]
    assert all(KEY not in file.read_bytes() for file in files)
    store.close()
    assert opened(key_path=str(path)).key == KEY


def test_a_key_file_does_not_count_as_set_by_itself(
    opened: Open, tmp_path: Path, warnings: list[str]
) -> None:
    path = tmp_path / "key"
    write_key(path, OTHER_KEY)
    store = opened(key_path=str(path))
    assert store.key is None
    assert len(warnings) == 1
    assert "replace" in warnings[0]
    store.commit(0, [], KEY)
    assert path.read_bytes() == KEY


def test_key_set_makes_it_count_for_ever(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(path, KEY)
    opened(key_path=str(path), key_set=True).close()
    assert opened(key_path=str(path)).key == KEY


def test_key_set_on_an_existing_device_without_a_key(opened: Open, tmp_path: Path) -> None:
    opened().close()
    path = tmp_path / "key"
    write_key(path, KEY)
    opened(key_path=str(path), key_set=True).close()
    assert opened(key_path=str(path)).key == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o602, 0o620])
def test_a_key_file_that_others_can_use_is_a_warning(
    opened: Open, tmp_path: Path, warnings: list[str], mode: int
) -> None:
    path = tmp_path / "key"
    write_key(path, KEY)
    path.chmod(mode)
    assert opened(key_path=str(path), key_set=True).key == KEY
    assert len(warnings) == 1
    for text in (str(path), f"mode {mode:04o}", f"chmod 600 {path}"):
        assert text in warnings[0]


@pytest.mark.parametrize("length", [None, 31])
def test_the_advice_for_a_missing_or_short_key_file_works(
    opened: Open, tmp_path: Path, warnings: list[str], length: int | None
) -> None:
    """The command in it, run as it is, makes a key file that only its owner can read."""
    path = tmp_path / "key"
    if length is not None:
        path.write_bytes(KEY[:length])
        path.chmod(0o644)
    with pytest.raises(UsageError) as refusal:
        opened(key_path=str(path), key_set=True)
    command = str(refusal.value).rpartition(" with ")[2]
    subprocess.run(["sh", "-c", command], check=True, umask=0)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    warnings.clear()
    assert opened(key_path=str(path), key_set=True).key == path.read_bytes()
    assert warnings == []


def test_a_long_key_file_is_a_warning(opened: Open, tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "key"
    write_key(path, KEY + b"\n")
    assert opened(key_path=str(path), key_set=True).key == KEY
    assert len(warnings) == 1
    assert "more than 32 bytes" in warnings[0]


def test_a_key_file_may_be_given_for_a_key_that_the_state_keeps(
    opened: Open, tmp_path: Path
) -> None:
    store = opened()
    store.commit(0, [], KEY)
    store.close()
    path = tmp_path / "key"
    write_key(path, KEY)
    opened(key_path=str(path)).close()
    assert opened().key == KEY


# Refusals: each says which file disagrees, and changes nothing.


def check_refused(
    opened: Open, kind: type[OperatorError], text: str, folder: Path, **options: object
) -> None:
    def snapshot() -> dict[str, bytes]:
        return {
            str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
        }

    before = snapshot()
    with pytest.raises(kind, match=text) as refusal:
        opened(**options)
    assert "\n" not in str(refusal.value)
    assert snapshot() == before
    assert KEY.hex() not in str(refusal.value)


@pytest.mark.parametrize("size", [0, 1, 64 * KIB, 129 * KIB, 128 * KIB - 1, 33 * KIB * KIB])
def test_an_image_of_a_wrong_size(opened: Open, flash: Path, tmp_path: Path, size: int) -> None:
    os.truncate(flash, size)
    check_refused(opened, UsageError, f"has {size} bytes.*truncate -s 128K", tmp_path)


def test_an_image_over_16_mib_is_served_as_16_mib(
    opened: Open, tmp_path: Path, warnings: list[str]
) -> None:
    flash = make_image(tmp_path / "large", 256)
    assert len(opened(flash).image) == spec.MAX_CAPACITY
    assert len(warnings) == 1
    assert "first 16 MiB" in warnings[0]


def test_an_image_that_does_not_exist(opened: Open, flash: Path, tmp_path: Path) -> None:
    flash.unlink()
    check_refused(opened, UsageError, "does not exist.*truncate -s 128K", tmp_path)
    assert os.listdir(tmp_path) == []


def test_an_image_that_is_a_folder(opened: Open, flash: Path, tmp_path: Path) -> None:
    flash.unlink()
    flash.mkdir()
    check_refused(opened, UsageError, "cannot be opened|regular file", tmp_path)


def test_an_image_that_is_a_device(opened: Open, tmp_path: Path) -> None:
    check_refused(opened, UsageError, "regular file", tmp_path, path=Path("/dev/null"))


def test_an_image_of_another_size_than_recorded(opened: Open, flash: Path, tmp_path: Path) -> None:
    opened().close()
    os.truncate(flash, 256 * KIB)
    check_refused(opened, StateError, "262144 bytes.*131072 bytes", tmp_path)


def test_an_image_in_use(opened: Open, tmp_path: Path) -> None:
    opened()
    with pytest.raises(StateError, match="in use"):
        opened()
    with pytest.raises(StateError, match="in use"):
        opened(state_path=str(tmp_path / "other.state"))
    assert not (tmp_path / "other.state").exists()


def test_a_state_in_use(opened: Open, tmp_path: Path, flash: Path) -> None:
    opened()
    other = make_image(tmp_path / "other")
    with pytest.raises(StateError, match="in use"):
        opened(other, state_path=str(state_of(flash)))


def test_an_empty_state_file(opened: Open, flash: Path, tmp_path: Path) -> None:
    state_of(flash).touch()
    check_refused(opened, StateError, "is empty", tmp_path)


@pytest.mark.parametrize("content", [b"x", b"not a database" * 1000, bytes(4096)])
def test_a_state_file_that_is_no_database(
    opened: Open, flash: Path, tmp_path: Path, content: bytes
) -> None:
    state_of(flash).write_bytes(content)
    check_refused(opened, StateError, "not a vhost-rpmb state file", tmp_path)


def test_a_state_file_that_is_a_folder(opened: Open, flash: Path, tmp_path: Path) -> None:
    state_of(flash).mkdir()
    check_refused(opened, StateError, "not a regular file", tmp_path)


def test_a_state_file_that_points_nowhere(opened: Open, flash: Path, tmp_path: Path) -> None:
    state_of(flash).symlink_to("nowhere")
    check_refused(opened, StateError, "cannot be read", tmp_path)


def test_another_database_as_state_file(opened: Open, flash: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(state_of(flash))) as database:
        database.execute("CREATE TABLE t (x)")
    check_refused(opened, StateError, "not a vhost-rpmb state file", tmp_path)


def change_state(flash: Path, *statements: str) -> None:
    with closing(sqlite3.connect(state_of(flash))) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def test_a_state_file_of_a_later_format(opened: Open, flash: Path) -> None:
    opened().close()
    change_state(flash, "PRAGMA user_version = 99")
    with pytest.raises(StateError, match="format 99"):
        opened()


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM device",
        "UPDATE device SET counter = -1",
        "UPDATE device SET counter = 4294967296",
        "UPDATE device SET key = x'00'",
        "INSERT INTO pending VALUES (1, 0, CAST(x'0200' || zeroblob(256) AS BLOB))",
        "INSERT INTO pending VALUES (1, 0, zeroblob(257))",
        "INSERT INTO pending VALUES (1, 4294967296, x'')",
        "INSERT INTO pending VALUES (1, -1, x'')",
    ],
)
def test_a_state_file_with_impossible_content(opened: Open, flash: Path, statement: str) -> None:
    opened().close()
    change_state(flash, statement)
    with pytest.raises(StateError, match="damaged"):
        opened()


def test_a_damaged_state_file(opened: Open, flash: Path) -> None:
    store = opened()
    store.commit(1, [(address, os.urandom(256)) for address in range(512)], None)
    store.close()
    content = bytearray(state_of(flash).read_bytes())
    assert len(content) > 16 * KIB
    content[4 * KIB :] = b"\xa5" * (len(content) - 4 * KIB)
    state_of(flash).write_bytes(content)
    with pytest.raises(StateError, match="damaged"):
        opened()


def test_a_log_without_its_state_file(opened: Open, flash: Path, tmp_path: Path) -> None:
    flash.with_name(flash.name + ".state-wal").write_bytes(b"log")
    check_refused(opened, StateError, "state-wal: expected its state file", tmp_path)


# Locks


class NoLocks:
    """fcntl on a file system without locks, as NFS is without its lock manager."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> object:
        if name != self._name:
            return getattr(fcntl, name)

        def fail(*_: object) -> None:
            raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

        return fail


@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize(("call", "module"), [("flock", image), ("lockf", statefile)])
def test_a_file_system_without_locks(
    opened: Open,
    flash: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    module: ModuleType,
    offline: bool,
) -> None:
    opened().close()
    monkeypatch.setattr(module, "fcntl", NoLocks(call))
    name = f"the image {flash}" if call == "flock" else f"the state file {state_of(flash)}"
    text = f"{name} cannot be locked .No locks available.: keep it on .* with locks, or start"
    check = partial(verify, Paths.resolve(str(flash))) if offline else opened
    with pytest.raises(StateError, match=text):
        check()


# FIFOs: nothing waits for their other end.


@pytest.mark.timeout(60)
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("suffix", ["", ".state", ".state-wal", ".state-journal", ".key"])
def test_a_fifo_in_place_of_a_file(
    opened: Open, flash: Path, tmp_path: Path, suffix: str, offline: bool
) -> None:
    key = tmp_path / "flash.img.key"
    write_key(key, KEY)
    store = opened(key_path=str(key), key_set=True)
    store.close()
    path = tmp_path / f"flash.img{suffix}"
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    check: Callable[[], object] = partial(opened, key_path=str(key))
    if offline:
        check = partial(verify, Paths.resolve(str(flash), key_path=str(key)))
    with pytest.raises(OperatorError, match="regular file") as refusal:
        check()
    assert str(path) in str(refusal.value)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("suffix", [".state.new", ".key.new"])
def test_a_fifo_in_place_of_a_temporary_file(
    opened: Open, flash: Path, tmp_path: Path, suffix: str
) -> None:
    os.mkfifo(tmp_path / f"flash.img{suffix}")
    store = opened(key_path=str(tmp_path / "flash.img.key"))
    assert store.commit(0, [], KEY)


# A lost or hidden state file: starting without it would be a rollback.


def key_set_options(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "given.key"
    write_key(path, KEY)
    return {"key_path": str(path), "key_set": True}


LOST = "expected the state file of device [0-9a-f]{16} at .*flash.img.state, found none"


@pytest.mark.parametrize("initial_counter", [None, 0, 5])
@pytest.mark.parametrize("key_set", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_a_stamped_image_without_its_state(
    opened: Open,
    flash: Path,
    tmp_path: Path,
    written: bool,
    key_set: bool,
    initial_counter: int | None,
) -> None:
    options = key_set_options(tmp_path) if key_set else {}
    store = opened(**dict(options))
    if written:
        assert store.commit(0, [], None if key_set else KEY)
        assert store.commit(1, [(3, A)], None)
    store.close()
    kept = state_of(flash).rename(tmp_path / "kept")
    options["initial_counter"] = initial_counter
    check_refused(opened, StateError, LOST, tmp_path, **options)
    check_refused(
        opened,
        StateError,
        "found none",
        tmp_path,
        **options,
        state_path=str(tmp_path / "other.state"),
    )
    kept.rename(state_of(flash))
    assert opened(**options).counter == int(written)


def test_a_stamped_image_that_was_made_blank(opened: Open, flash: Path, tmp_path: Path) -> None:
    """The same file is no new image: it keeps the stamp."""
    store = opened()
    store.commit(1, [(3, A)], None)
    store.close()
    flash.write_bytes(bytes(128 * KIB))
    state_of(flash).unlink()
    check_refused(opened, StateError, LOST, tmp_path)
    flash.unlink()
    assert opened(make_image(flash)).counter == 0


@pytest.mark.parametrize("stamp", [b"", b"x", b"0123456789abcdef 1 more", b"\xff\n \xff"])
def test_a_stamp_of_any_content_is_a_stamp(
    opened: Open, flash: Path, tmp_path: Path, stamp: bytes
) -> None:
    os.setxattr(flash, "user.vhost-rpmb", stamp)
    check_refused(opened, StateError, "expected the state file of", tmp_path)


@pytest.mark.parametrize("key_set", [False, True])
@pytest.mark.parametrize("place", [0, 128 * KIB - 1])
def test_an_image_with_content_but_neither_stamp_nor_state(
    opened: Open, flash: Path, tmp_path: Path, place: int, key_set: bool
) -> None:
    with flash.open("r+b") as image:
        image.seek(place)
        image.write(b"\1")
    options = key_set_options(tmp_path) if key_set else {}
    text = "expected a state file at .*flash.img.state or a blank image, found data.*--initial-c"
    check_refused(opened, StateError, text, tmp_path, **options)
    assert opened(**options, initial_counter=3).counter == 3


def test_content_behind_the_last_address_counts(opened: Open, tmp_path: Path) -> None:
    flash = make_image(tmp_path / "large", 256)
    with flash.open("r+b") as image:
        image.seek(-1, os.SEEK_END)
        image.write(b"\1")
    with pytest.raises(StateError, match="found data"):
        opened(flash)


def test_a_copy_without_its_stamp_and_state(opened: Open, flash: Path, tmp_path: Path) -> None:
    store = opened()
    store.commit(1, [(3, A)], None)
    store.close()
    copy = tmp_path / "copy.img"
    shutil.copyfile(flash, copy)
    check_refused(opened, StateError, "found data", tmp_path, path=copy)


def test_a_state_file_without_its_log(opened: Open, flash: Path, tmp_path: Path) -> None:
    def work() -> None:
        open_store(Paths.resolve(str(flash))).commit(1, [(7, A)], None)

    in_a_killed_process(work)
    flash.with_name(flash.name + ".state-wal").unlink()
    check_refused(opened, StateError, "-wal is missing", tmp_path)


def test_a_killed_device_can_be_moved_whole(opened: Open, flash: Path, tmp_path: Path) -> None:
    def work() -> None:
        open_store(Paths.resolve(str(flash))).commit(1, [(7, A)], None)

    in_a_killed_process(work)
    moved = tmp_path / "moved"
    shutil.copytree(flash.parent, moved)
    assert opened(moved / flash.name).counter == 1


def test_two_names_of_one_file(opened: Open, flash: Path, tmp_path: Path) -> None:
    check_refused(opened, UsageError, "same file", tmp_path, state_path=str(flash))
    check_refused(opened, UsageError, "same file", tmp_path, key_path=str(flash))
    check_refused(
        opened, UsageError, "same file", tmp_path, key_path="k", state_path=os.path.abspath("k")
    )


@pytest.mark.parametrize("name", ["state_path", "key_path"])
def test_a_folder_that_does_not_exist(opened: Open, tmp_path: Path, name: str) -> None:
    check_refused(
        opened, UsageError, "folder.*does not exist", tmp_path, **{name: str(tmp_path / "no/file")}
    )


def test_key_set_without_a_key_file(opened: Open, tmp_path: Path) -> None:
    check_refused(
        opened,
        UsageError,
        "--key-set needs.*does not exist",
        tmp_path,
        key_path=str(tmp_path / "key"),
        key_set=True,
    )


@pytest.mark.parametrize("length", [0, 1, 31])
def test_key_set_with_a_short_key_file(opened: Open, tmp_path: Path, length: int) -> None:
    path = tmp_path / "key"
    write_key(path, KEY[:length])
    check_refused(
        opened,
        UsageError,
        f"has {length} bytes, a key has 32",
        tmp_path,
        key_path=str(path),
        key_set=True,
    )


def test_a_key_file_that_is_a_folder(opened: Open, tmp_path: Path) -> None:
    check_refused(opened, UsageError, "cannot be read", tmp_path, key_path=str(tmp_path))


@pytest.fixture(params=["by the guest", "by --key-set"])
def key_path(request: pytest.FixtureRequest, opened: Open, tmp_path: Path) -> Path:
    """The key file of a device that was programmed."""
    path = tmp_path / "key"
    if request.param == "by --key-set":
        write_key(path, KEY)
        opened(key_path=str(path), key_set=True).close()
    else:
        store = opened(key_path=str(path))
        store.commit(0, [], KEY)
        store.close()
    return path


@pytest.mark.parametrize("key_set", [False, True])
def test_a_programmed_device_with_another_key_file(
    opened: Open, key_path: Path, tmp_path: Path, key_set: bool
) -> None:
    options = {"key_path": str(key_path), "key_set": key_set}
    write_key(key_path, OTHER_KEY)
    check_refused(opened, StateError, "another key", tmp_path, **options)
    write_key(key_path, KEY[:31])
    check_refused(opened, StateError, "31 bytes instead of 32", tmp_path, **options)
    key_path.unlink()
    check_refused(opened, StateError, "does not exist", tmp_path, **options)
    write_key(key_path, KEY)
    assert opened(**options).key == KEY


def test_a_programmed_device_without_its_key_path(
    opened: Open, key_path: Path, tmp_path: Path
) -> None:
    check_refused(opened, StateError, "name it with --key-path", tmp_path)


def test_a_device_that_keeps_its_key_with_a_wrong_key_file(opened: Open, tmp_path: Path) -> None:
    store = opened()
    store.commit(0, [], KEY)
    store.close()
    path = tmp_path / "key"
    check_refused(opened, StateError, "leave out --key-path", tmp_path, key_path=str(path))
    write_key(path, OTHER_KEY)
    check_refused(opened, StateError, "another key", tmp_path, key_path=str(path), key_set=True)


def test_a_crashed_creation_is_made_again(opened: Open, flash: Path) -> None:
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

    in_a_killed_process(creation)
    if "user.vhost-rpmb" in os.listxattr(flash):
        assert state_of(flash).exists()
    store = opened(initial_counter=3)
    assert (store.counter, store.key) == (3, None)
    assert store.image[:256] == content


# Files that do not belong together


@pytest.fixture
def written(opened: Open, flash: Path) -> Path:
    """A device with a history: blocks 0 to 63, written on three days and backed up on each."""
    for day in range(1, 4):
        store = opened(flash)
        for address in range(0, 64, 16):
            data = [(address + n, bytes([day, address, n, 7]) * 64) for n in range(16)]
            count = 1 if address == 48 and day > 1 else 16
            assert store.commit(store.counter + 1, data[:count], None)
        store.close()
        folder = flash.parent / f"day{day}"
        folder.mkdir()
        for path in (flash, state_of(flash)):
            shutil.copy2(path, folder)
    return flash


def backup(flash: Path, day: int) -> Path:
    return flash.parent / f"day{day}" / flash.name


def test_a_backup_restored_whole_is_accepted(opened: Open, written: Path) -> None:
    for day in (1, 3, 2):
        for path in (backup(written, day), state_of(backup(written, day))):
            # In place: what the file system knows of the file stays that of the later day.
            (written.parent / path.name).write_bytes(path.read_bytes())
        store = opened(written)
        assert store.counter == 4 * day
        assert not any(store.damaged)
        store.close()


@pytest.mark.parametrize("day", [1, 2])
@pytest.mark.parametrize("kind", ["in place", "as a new file", "with its attributes"])
def test_an_image_from_another_day(
    opened: Open, written: Path, tmp_path: Path, day: int, kind: str
) -> None:
    source = backup(written, day)
    if kind == "in place":
        written.write_bytes(source.read_bytes())
    elif kind == "as a new file":
        shutil.copyfile(source, written.with_name("new"))
        os.replace(written.with_name("new"), written)
    else:
        shutil.copy2(source, written)
    check_refused(opened, StateError, "image .* from an earlier time than the state", tmp_path)


@pytest.mark.parametrize("day", [1, 2])
def test_a_state_from_another_day(opened: Open, written: Path, tmp_path: Path, day: int) -> None:
    shutil.copy2(state_of(backup(written, day)), state_of(written))
    check_refused(
        opened,
        StateError,
        "state file .* from an earlier time than the image|do not belong together",
        tmp_path,
    )


@pytest.mark.parametrize("stamped", [True, False])
def test_an_image_of_another_device(
    opened: Open, written: Path, tmp_path: Path, stamped: bool
) -> None:
    other = make_image(tmp_path / "other.img")
    store = opened(other)
    store.commit(1, [(3, A), (40, B)], None)
    store.close()
    (shutil.copy2 if stamped else shutil.copyfile)(other, tmp_path / "new")
    os.replace(tmp_path / "new", written)
    check_refused(opened, StateError, "another device|not the file|belong together", tmp_path)


def test_a_new_image_for_an_old_state(opened: Open, written: Path, tmp_path: Path) -> None:
    written.write_bytes(bytes(128 * KIB))
    check_refused(opened, StateError, "is empty, but the state", tmp_path)


def test_a_few_rotten_blocks_are_no_exchange(opened: Open, written: Path) -> None:
    with written.open("r+b") as image:
        for address in (5, 20, 21):
            image.seek(address * 256)
            image.write(os.urandom(256))
    store = opened(written)
    assert [address for address, mark in enumerate(store.damaged) if mark] == [5, 20, 21]
    assert store.counter == 12


def test_a_wrong_state_path_can_be_put_right(opened: Open, written: Path, tmp_path: Path) -> None:
    wrong = str(tmp_path / "mistake")
    check_refused(opened, StateError, "found none", tmp_path, path=written, state_path=wrong)
    assert opened(written).counter == 12


def killed(flash: Path) -> None:
    """Write on in a process that is killed."""

    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        store.commit(store.counter + 1, [(9, A)], None)

    in_a_killed_process(work)


def test_a_state_from_another_day_under_a_log(opened: Open, written: Path, tmp_path: Path) -> None:
    killed(written)
    log = state_of(written).with_name(state_of(written).name + "-wal")
    assert log.exists()
    state_of(written).write_bytes(state_of(backup(written, 3)).read_bytes())
    check_refused(opened, StateError, "state-wal are from different times", tmp_path)
    log.unlink()
    written.write_bytes(backup(written, 1).read_bytes())
    check_refused(opened, StateError, "earlier time", tmp_path)


def test_a_killed_device_survives_a_refused_start(opened: Open, written: Path) -> None:
    killed(written)
    os.truncate(written, 256 * KIB)
    with pytest.raises(StateError, match="262144 bytes"):
        opened(written)
    os.truncate(written, 128 * KIB)
    store = opened(written)
    assert (store.counter, bytes(store.image[9 * 256 : 10 * 256])) == (13, A)


# The offline check


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_verify_reports_and_changes_nothing(written: Path, tmp_path: Path) -> None:
    killed(written)
    with written.open("r+b") as image:
        for address in (9, 30, 31):  # 9 waits in the state file, so nothing is lost there
            image.seek(address * 256)
            image.write(os.urandom(256))
    before = snapshot(tmp_path)
    report = verify(Paths.resolve(str(written)))
    assert snapshot(tmp_path) == before
    assert (report.counter, report.pending, report.damaged) == (13, [9], [30, 31])
    assert (report.clean, report.programmed, report.disagreement) == (False, False, "")


def test_verify_names_an_exchanged_image_and_all_its_damage(written: Path, tmp_path: Path) -> None:
    written.write_bytes(backup(written, 1).read_bytes())
    before = snapshot(tmp_path)
    report = verify(Paths.resolve(str(written)))
    assert "earlier time" in report.disagreement
    assert report.damaged == list(range(49))
    assert report.clean
    assert snapshot(tmp_path) == before


def test_verify_checks_the_key_file_if_it_is_named(
    opened: Open, flash: Path, key_path: Path
) -> None:
    report = verify(Paths.resolve(str(flash)))
    assert (report.programmed, report.key_in_file) == (True, True)
    assert verify(Paths.resolve(str(flash), key_path=str(key_path))).programmed
    write_key(key_path, OTHER_KEY)
    with pytest.raises(StateError, match="another key"):
        verify(Paths.resolve(str(flash), key_path=str(key_path)))


@pytest.mark.parametrize("check", [verify, open_store])
def test_no_copy_of_the_state_is_written(
    written: Path, tmp_path: Path, check: Callable[[Paths], object]
) -> None:
    """So none can survive a SIGKILL: nothing is created but the files of the device."""
    killed(written)
    created: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else os.O_CREAT
        if event in ("os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.copyfile"):
            created.append(str(arguments[0]))
        elif event == "open" and isinstance(flags, int) and flags & os.O_CREAT:
            created.append(os.fsdecode(arguments[0]))  # type: ignore[arg-type]

    def work() -> None:
        sys.addaudithook(note)
        result = check(Paths.resolve(str(written)))
        (tmp_path / "created").write_text("\n".join(created))
        del result

    in_a_killed_process(work)
    assert (tmp_path / "created").read_text() == ""


def test_verify_refuses_a_device_in_use_or_without_state(opened: Open, flash: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        verify(Paths.resolve(str(flash)))

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _store = open_store(Paths.resolve(str(flash)))
        os.write(writer, b"1")
        signal.pause()
    try:
        os.read(reader, 1)
        with pytest.raises(StateError, match=r"image .* in use"):
            verify(Paths.resolve(str(flash)))
        other = make_image(flash.with_name("other"))
        with pytest.raises(StateError, match=r"state file .* in use"):
            verify(Paths.resolve(str(other), state_path=str(state_of(flash))))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)


# Memory that runs out


def test_a_commit_without_memory_fails(opened: Open, flash: Path) -> None:
    reader, writer = os.pipe()

    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        for limit in range(2_000_000, 0, -10_000):  # SQLite's for the process; it only goes down
            store._database._execute(f"PRAGMA hard_heap_limit = {limit}")
            done = store.commit(store.counter + 1, [(n, bytes([n]) * 256) for n in range(99)], None)
            os.write(writer, b"1" if done else b"0")
            if not done:
                return

    in_a_killed_process(work)
    answers = os.read(reader, 1000)
    assert answers.endswith(b"10")
    store = opened()
    assert store.counter == len(answers) - 1
    assert store.image[98 * 256] == 98


# Every format that was released stays loadable


@pytest.mark.parametrize("kind", ["stopped", "killed"])
def test_a_state_of_format_1_is_loaded(opened: Open, tmp_path: Path, kind: str) -> None:
    """Counter 3; key KEY; block 2 was A, then zeros, then B, block 5 is A."""
    with tarfile.open(Path(__file__).parents[1] / "data" / f"format-1-{kind}.tar.gz") as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            (tmp_path / member.name).write_bytes(content.read())
    flash = tmp_path / "flash.img"
    report = verify(Paths.resolve(str(flash)))
    assert (report.clean, report.pending) == ((True, []) if kind == "stopped" else (False, [2]))
    store = opened(flash)
    assert (store.counter, store.key, any(store.damaged)) == (3, KEY, False)
    assert bytes(store.image[: 6 * 256]) == bytes(512) + B + bytes(512) + A
