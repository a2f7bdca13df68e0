# SPDX-License-Identifier: Apache-2.0
"""A lost or hidden state file: a start without it would be a rollback."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.rig import make_image, write_key
from tests.support.store import KIB, A, Open, check_refused, in_killed_process, state_of
from vhost_rpmb.errors import StateError
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths


def key_set_options(tmp_path: Path) -> dict[str, object]:
    path = tmp_path / "given.key"
    write_key(path, KEY)
    return {"key_path": str(path), "key_set": True}


LOST = "expected the state file of device [0-9a-f]{16} at .*flash.img.state, found none"


@pytest.mark.parametrize("initial_counter", [None, 0, 5])
@pytest.mark.parametrize("key_set", [False, True])
@pytest.mark.parametrize("written", [False, True])
def test_stamped_image_without_its_state_is_refused(
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


def test_blanked_image_keeps_its_stamp(opened: Open, flash: Path, tmp_path: Path) -> None:
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
def test_stamp_of_any_content_is_a_stamp(
    opened: Open, flash: Path, tmp_path: Path, stamp: bytes
) -> None:
    os.setxattr(flash, "user.vhost-rpmb", stamp)
    check_refused(opened, StateError, "expected the state file of", tmp_path)


@pytest.mark.parametrize("key_set", [False, True])
@pytest.mark.parametrize("place", [0, 128 * KIB - 1])
def test_image_with_content_but_neither_stamp_nor_state_is_refused(
    opened: Open, flash: Path, tmp_path: Path, place: int, key_set: bool
) -> None:
    with flash.open("r+b") as image:
        image.seek(place)
        image.write(b"\1")
    options = key_set_options(tmp_path) if key_set else {}
    text = "expected a state file at .*flash.img.state or a blank image, found data.*--initial-c"
    check_refused(opened, StateError, text, tmp_path, **options)
    assert opened(**options, initial_counter=3).counter == 3


def test_content_behind_the_last_address_is_content(opened: Open, tmp_path: Path) -> None:
    flash = make_image(tmp_path / "large", 256)
    with flash.open("r+b") as image:
        image.seek(-1, os.SEEK_END)
        image.write(b"\1")
    with pytest.raises(StateError, match="found data"):
        opened(flash)


def test_copy_without_stamp_and_state_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    store = opened()
    store.commit(1, [(3, A)], None)
    store.close()
    copy = tmp_path / "copy.img"
    shutil.copyfile(flash, copy)
    check_refused(opened, StateError, "found data", tmp_path, path=copy)


def test_state_file_without_its_log_is_refused(opened: Open, flash: Path, tmp_path: Path) -> None:
    def work() -> None:
        open_store(Paths.resolve(str(flash))).commit(1, [(7, A)], None)

    in_killed_process(work)
    flash.with_name(flash.name + ".state-wal").unlink()
    check_refused(opened, StateError, "-wal is missing", tmp_path)
