# SPDX-License-Identifier: Apache-2.0
"""Stores that are closed at the end, and devices with a history."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.rig import resolved, write_key
from tests.support.store import Open, state_of
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import Store


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
