# SPDX-License-Identifier: Apache-2.0
"""Where the files of a device stand, and which paths are refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.rig import make_image
from vhost_rpmb.errors import UsageError
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths


def test_state_stands_beside_the_image(flash: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = Paths(str(flash), f"{flash}.state", None)
    assert Paths.resolve(str(flash)) == expected
    monkeypatch.chdir(flash.parent)
    assert Paths.resolve(flash.name) == expected


def test_symbolic_link_leads_to_the_state_of_the_image(flash: Path, tmp_path: Path) -> None:
    """Through a link in another folder the device is the same, not a new one."""
    store = open_store(Paths.resolve(str(flash)))
    assert store.commit(0, [], KEY)
    assert store.commit(1, [(3, b"A" * 256)], None)
    store.close()
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    link = folder / "link.img"
    link.symlink_to(flash)
    paths = Paths.resolve(str(link))
    assert verify(paths).counter == 1
    store = open_store(paths)
    assert (store.counter, store.key) == (1, KEY)
    store.close()
    assert os.listdir(folder) == ["link.img"]


def test_links_to_state_and_key_file_are_followed(tmp_path: Path) -> None:
    """SQLite puts the log beside the file itself, and so do we."""
    real = tmp_path / "real"
    real.mkdir()
    for name in ("state", "key"):
        (real / name).touch()
        (tmp_path / name).symlink_to(real / name)
    paths = Paths.resolve(
        str(make_image(tmp_path / "flash.img")), str(tmp_path / "state"), str(tmp_path / "key")
    )
    assert (paths.state, paths.key) == (str(real / "state"), str(real / "key"))


def test_dangling_link_is_not_followed(tmp_path: Path) -> None:
    link = tmp_path / "state"
    link.symlink_to("nowhere")
    assert Paths.resolve(str(tmp_path / "flash.img"), str(link)).state == str(link)


@pytest.mark.parametrize(
    ("flash", "state", "key"),
    [
        ("a", "a", None),
        ("a", "b", "a"),
        ("a", "b", "b"),
        ("k.new", "b", "k"),
        ("a", "k.new", "k"),
        ("a", "b", "b.new"),
        ("a", "b", "b-wal"),
        ("a", "b", "b-journal"),
        ("a", "b", "b.new-journal"),
        ("b-wal", "b", None),
        ("b.new", "b", None),
    ],
)
def test_paths_that_collide_are_refused(flash: str, state: str, key: str | None) -> None:
    with pytest.raises(UsageError, match=r"are the same file, .*: name two files"):
        Paths.resolve(flash, state, key)
