# SPDX-License-Identifier: Apache-2.0
"""Stores that crash, are copied, and have to be refused."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from vhost_rpmb.errors import OperatorError
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import Store
from vhost_rpmb.storage.paths import Paths

A, B = b"A" * 256, b"B" * 256
OTHER_KEY = bytes(32)
KIB = 1024
Open = Callable[..., Store]


def state_of(flash: Path) -> Path:
    """The state file that belongs to an image unless another one is given."""
    return flash.with_name(flash.name + ".state")


def in_killed_process(work: Callable[[], None]) -> None:
    """Run ``work`` in a process that ends without a chance to clean up."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os.kill(os.getpid(), 9)
    os.waitpid(child, 0)


def snapshot(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of modification of every file."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def check_refused(
    opened: Open, kind: type[OperatorError], text: str, folder: Path, **options: object
) -> None:
    """Check that a start fails with one line that names no key, and changes no file."""
    before = snapshot(folder)
    with pytest.raises(kind, match=text) as refusal:
        opened(**options)
    assert "\n" not in str(refusal.value)
    assert snapshot(folder) == before
    assert KEY.hex() not in str(refusal.value)


def backup(flash: Path, day: int) -> Path:
    """The image as it was on a day of the fixture `written`."""
    return flash.parent / f"day{day}" / flash.name


def write_and_crash(flash: Path) -> None:
    """Write block 9 in a process that is killed."""

    def work() -> None:
        store = open_store(Paths.resolve(str(flash)))
        store.commit(store.counter + 1, [(9, A)], None)

    in_killed_process(work)
