# SPDX-License-Identifier: Apache-2.0
"""Files that are refused at the start: each error names the file, and nothing is changed."""

from __future__ import annotations

import errno
import fcntl
import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from tests.support.oracle import KEY
from tests.support.rig import make_image, write_key
from tests.support.store import KIB, Open, check_refused, in_killed_process, state_of
from vhost_rpmb.errors import OperatorError, StateError, UsageError
from vhost_rpmb.storage.local import image, statefile
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths


@pytest.mark.parametrize("size", [0, 1, 64 * KIB, 129 * KIB, 128 * KIB - 1, 33 * KIB * KIB])
def test_image_of_a_wrong_size_is_refused(
    opened: Open, flash: Path, tmp_path: Path, size: int
) -> None:
    os.truncate(flash, size)
    check_refused(opened, UsageError, f"has {size} bytes.*truncate -s 128K", tmp_path)


def test_missing_image_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    flash.unlink()
    check_refused(opened, UsageError, "does not exist.*truncate -s 128K", tmp_path)
    assert os.listdir(tmp_path) == []


def test_folder_as_image_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    flash.unlink()
    flash.mkdir()
    check_refused(opened, UsageError, "cannot be opened|regular file", tmp_path)


def test_device_file_as_image_is_refused(opened: Open, tmp_path: Path) -> None:
    check_refused(opened, UsageError, "regular file", tmp_path, path=Path("/dev/null"))


def test_image_of_another_size_than_recorded_is_refused(
    opened: Open, flash: Path, tmp_path: Path
) -> None:
    opened().close()
    os.truncate(flash, 256 * KIB)
    check_refused(opened, StateError, "262144 bytes.*131072 bytes", tmp_path)


def test_image_in_use_is_refused(opened: Open, tmp_path: Path) -> None:
    opened()
    with pytest.raises(StateError, match="in use"):
        opened()
    with pytest.raises(StateError, match="in use"):
        opened(state_path=str(tmp_path / "other.state"))
    assert not (tmp_path / "other.state").exists()


def test_state_file_in_use_is_refused(opened: Open, tmp_path: Path, flash: Path) -> None:
    opened()
    other = make_image(tmp_path / "other")
    with pytest.raises(StateError, match="in use"):
        opened(other, state_path=str(state_of(flash)))


def test_empty_state_file_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    state_of(flash).touch()
    check_refused(opened, StateError, "is empty", tmp_path)


@pytest.mark.parametrize("content", [b"x", b"not a database" * 1000, bytes(4096)])
def test_state_file_that_is_no_database_is_refused(
    opened: Open, flash: Path, tmp_path: Path, content: bytes
) -> None:
    state_of(flash).write_bytes(content)
    check_refused(opened, StateError, "not a vhost-rpmb state file", tmp_path)


def test_folder_as_state_file_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    state_of(flash).mkdir()
    check_refused(opened, StateError, "not a regular file", tmp_path)


def test_dangling_state_file_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    state_of(flash).symlink_to("nowhere")
    check_refused(opened, StateError, "cannot be read", tmp_path)


def test_other_database_as_state_file_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(state_of(flash))) as database:
        database.execute("CREATE TABLE t (x)")
    check_refused(opened, StateError, "not a vhost-rpmb state file", tmp_path)


def change_state(flash: Path, *statements: str) -> None:
    with closing(sqlite3.connect(state_of(flash))) as database:
        for statement in statements:
            database.execute(statement)
        database.commit()


def test_state_file_of_a_later_format_is_refused(opened: Open, flash: Path) -> None:
    opened().close()
    change_state(flash, "PRAGMA user_version = 99")
    with pytest.raises(StateError, match="has format 99, this version knows 1 to 3: use the"):
        opened()


def test_state_of_a_later_format_in_the_log_is_refused(
    opened: Open, flash: Path, tmp_path: Path
) -> None:
    """A later version was killed while it upgraded: the file's own header is not written yet."""
    opened().close()

    def work() -> None:
        database = sqlite3.connect(state_of(flash), isolation_level=None)
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA user_version = 4")
        os.unlink(f"{state_of(flash)}-shm")

    in_killed_process(work)
    check_refused(opened, StateError, "has format 4, this version knows 1 to 3", tmp_path)


@pytest.mark.parametrize(
    "statement",
    [
        "DELETE FROM device",
        "UPDATE device SET counter = -1",
        "UPDATE device SET counter = 4294967296",
        "UPDATE device SET key = x'00'",
        "INSERT INTO pending VALUES (1, 0, CAST(x'0200' || zeroblob(256) AS BLOB), x'')",
        "INSERT INTO pending VALUES (1, 0, zeroblob(257), x'')",
        "INSERT INTO pending VALUES (1, 4294967296, x'', x'')",
        "INSERT INTO pending VALUES (1, -1, x'', x'')",
        "INSERT INTO pending VALUES (1, 0, x'', x'00000001')",
        "UPDATE device SET replay = x'00000001'",
        "UPDATE device SET replay = x'0000000000'",
        "UPDATE device SET replay = x'0000000102'",
        "UPDATE device SET replay = CAST(x'0000000100' || zeroblob(35) AS BLOB)",
    ],
)
def test_state_file_with_impossible_content_is_refused(
    opened: Open, flash: Path, statement: str
) -> None:
    opened().close()
    change_state(flash, statement)
    with pytest.raises(StateError, match="damaged"):
        opened()


def test_damaged_state_file_is_refused(opened: Open, flash: Path) -> None:
    store = opened()
    store.commit(1, [(address, os.urandom(256)) for address in range(512)], None)
    store.close()
    content = bytearray(state_of(flash).read_bytes())
    assert len(content) > 16 * KIB
    content[4 * KIB :] = b"\xa5" * (len(content) - 4 * KIB)
    state_of(flash).write_bytes(content)
    with pytest.raises(StateError, match="damaged"):
        opened()


def test_log_without_its_state_file_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    flash.with_name(flash.name + ".state-wal").write_bytes(b"log")
    check_refused(opened, StateError, "state-wal: expected its state file", tmp_path)


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
def test_file_system_without_locks_is_refused(
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


@pytest.mark.timeout(60)
@pytest.mark.parametrize("offline", [False, True])
@pytest.mark.parametrize("suffix", ["", ".state", ".state-wal", ".state-journal", ".key"])
def test_fifo_in_place_of_a_file_is_refused(
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
def test_fifo_in_place_of_a_temporary_file_is_replaced(
    opened: Open, flash: Path, tmp_path: Path, suffix: str
) -> None:
    os.mkfifo(tmp_path / f"flash.img{suffix}")
    store = opened(key_path=str(tmp_path / "flash.img.key"))
    assert store.commit(0, [], KEY)


def test_two_options_for_one_file_are_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    check_refused(opened, UsageError, "same file", tmp_path, state_path=str(flash))
    check_refused(opened, UsageError, "same file", tmp_path, key_path=str(flash))
    check_refused(
        opened, UsageError, "same file", tmp_path, key_path="k", state_path=os.path.abspath("k")
    )


@pytest.mark.parametrize("name", ["state_path", "key_path"])
def test_missing_folder_is_refused(opened: Open, tmp_path: Path, name: str) -> None:
    check_refused(
        opened, UsageError, "folder.*does not exist", tmp_path, **{name: str(tmp_path / "no/file")}
    )
