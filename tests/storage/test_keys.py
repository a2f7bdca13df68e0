# SPDX-License-Identifier: Apache-2.0
"""The key in the state file or in a key file."""

from __future__ import annotations

import stat
import subprocess
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.rig import write_key
from tests.support.store import OTHER_KEY, Open, check_refused, state_of
from vhost_rpmb.errors import StateError, UsageError


def test_state_file_keeps_the_key_without_a_key_path(opened: Open) -> None:
    store = opened()
    store.commit(0, [], KEY)
    store.close()
    assert opened().key == KEY


def test_only_the_key_file_keeps_the_key_with_a_key_path(
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


def test_key_file_alone_does_not_program_the_device(
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


def test_key_set_programs_the_device_permanently(opened: Open, tmp_path: Path) -> None:
    path = tmp_path / "key"
    write_key(path, KEY)
    opened(key_path=str(path), key_set=True).close()
    assert opened(key_path=str(path)).key == KEY


def test_key_set_programs_an_existing_device(opened: Open, tmp_path: Path) -> None:
    opened().close()
    path = tmp_path / "key"
    write_key(path, KEY)
    opened(key_path=str(path), key_set=True).close()
    assert opened(key_path=str(path)).key == KEY


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o644, 0o602, 0o620])
def test_key_file_accessible_to_others_is_a_warning(
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
def test_command_in_the_error_for_a_missing_or_short_key_file_works(
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


def test_long_key_file_is_a_warning(opened: Open, tmp_path: Path, warnings: list[str]) -> None:
    path = tmp_path / "key"
    write_key(path, KEY + b"\n")
    assert opened(key_path=str(path), key_set=True).key == KEY
    assert len(warnings) == 1
    assert "more than 32 bytes" in warnings[0]


def test_key_file_equal_to_the_key_in_the_state_is_accepted(opened: Open, tmp_path: Path) -> None:
    store = opened()
    store.commit(0, [], KEY)
    store.close()
    path = tmp_path / "key"
    write_key(path, KEY)
    opened(key_path=str(path)).close()
    assert opened().key == KEY


def test_key_set_without_a_key_file_is_refused(opened: Open, tmp_path: Path) -> None:
    check_refused(
        opened,
        UsageError,
        "--key-set needs.*does not exist",
        tmp_path,
        key_path=str(tmp_path / "key"),
        key_set=True,
    )


@pytest.mark.parametrize("length", [0, 1, 31])
def test_key_set_with_a_short_key_file_is_refused(
    opened: Open, tmp_path: Path, length: int
) -> None:
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


def test_folder_as_key_file_is_refused(opened: Open, tmp_path: Path) -> None:
    check_refused(opened, UsageError, "cannot be read", tmp_path, key_path=str(tmp_path))


@pytest.mark.parametrize("key_set", [False, True])
def test_other_key_file_of_a_programmed_device_is_refused(
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


def test_programmed_device_without_its_key_path_is_refused(
    opened: Open, key_path: Path, tmp_path: Path
) -> None:
    check_refused(opened, StateError, "name it with --key-path", tmp_path)


def test_other_key_file_for_a_key_in_the_state_is_refused(opened: Open, tmp_path: Path) -> None:
    store = opened()
    store.commit(0, [], KEY)
    store.close()
    path = tmp_path / "key"
    check_refused(opened, StateError, "leave out --key-path", tmp_path, key_path=str(path))
    write_key(path, OTHER_KEY)
    check_refused(opened, StateError, "another key", tmp_path, key_path=str(path), key_set=True)
