# SPDX-License-Identifier: Apache-2.0
"""Files that do not belong together."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.rig import make_image
from tests.support.store import KIB, A, B, Open, backup, check_refused, state_of, write_and_crash
from vhost_rpmb.errors import StateError


def test_complete_backup_is_accepted(opened: Open, written: Path) -> None:
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
def test_image_from_another_day_is_refused(
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
def test_state_from_another_day_is_refused(
    opened: Open, written: Path, tmp_path: Path, day: int
) -> None:
    shutil.copy2(state_of(backup(written, day)), state_of(written))
    check_refused(
        opened,
        StateError,
        "state file .* from an earlier time than the image|do not belong together",
        tmp_path,
    )


@pytest.mark.parametrize("stamped", [True, False])
def test_image_of_another_device_is_refused(
    opened: Open, written: Path, tmp_path: Path, stamped: bool
) -> None:
    other = make_image(tmp_path / "other.img")
    store = opened(other)
    store.commit(1, [(3, A), (40, B)], None)
    store.close()
    (shutil.copy2 if stamped else shutil.copyfile)(other, tmp_path / "new")
    os.replace(tmp_path / "new", written)
    check_refused(opened, StateError, "another device|not the file|belong together", tmp_path)


def test_new_image_for_an_old_state_is_refused(opened: Open, written: Path, tmp_path: Path) -> None:
    written.write_bytes(bytes(128 * KIB))
    check_refused(opened, StateError, "is empty, but the state", tmp_path)


def test_few_damaged_blocks_are_accepted(opened: Open, written: Path) -> None:
    with written.open("r+b") as image:
        for address in (5, 20, 21):
            image.seek(address * 256)
            image.write(os.urandom(256))
    store = opened(written)
    assert [address for address, mark in enumerate(store.damaged) if mark] == [5, 20, 21]
    assert store.counter == 12


def test_wrong_state_path_can_be_corrected(opened: Open, written: Path, tmp_path: Path) -> None:
    wrong = str(tmp_path / "mistake")
    check_refused(opened, StateError, "found none", tmp_path, path=written, state_path=wrong)
    assert opened(written).counter == 12


def test_state_from_another_day_than_its_log_is_refused(
    opened: Open, written: Path, tmp_path: Path
) -> None:
    write_and_crash(written)
    log = state_of(written).with_name(state_of(written).name + "-wal")
    assert log.exists()
    state_of(written).write_bytes(state_of(backup(written, 3)).read_bytes())
    check_refused(opened, StateError, "state-wal are from different times", tmp_path)
    log.unlink()
    written.write_bytes(backup(written, 1).read_bytes())
    check_refused(opened, StateError, "earlier time", tmp_path)


def test_crashed_device_survives_a_refused_start(opened: Open, written: Path) -> None:
    write_and_crash(written)
    os.truncate(written, 256 * KIB)
    with pytest.raises(StateError, match="262144 bytes"):
        opened(written)
    os.truncate(written, 128 * KIB)
    store = opened(written)
    assert (store.counter, bytes(store.image[9 * 256 : 10 * 256])) == (13, A)
