# SPDX-License-Identifier: Apache-2.0
"""The cache of what takes long to make."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.e2e import cache
from tests.e2e.cache import Steps, cached


@pytest.fixture
def make(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Path]:
    """Make, or find, a folder of one ingredient."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    # The check is for what debootstrap needs, and nothing here needs it.
    monkeypatch.setattr(cache, "_check_machine", lambda: None)

    def fill(folder: Path, steps: Steps) -> None:
        with steps.step("all of it"):
            (folder / "made").touch()

    return lambda ingredient: cached("thing", ingredient, fill, lambda _: None)


def test_cached_folder_is_found(make: Callable[[int], Path]) -> None:
    folder = make(1)
    (folder / "mark").touch()
    assert make(1) == folder
    assert (folder / "mark").exists()
    assert make(2) != folder


def test_incomplete_and_unused_folders_are_removed(make: Callable[[int], Path]) -> None:
    half, unused, used = make(1), make(2), make(3)
    (half / cache.MARKER).unlink()
    for folder in (unused, used):
        os.utime(folder / cache.MARKER, (0, 0))
    assert make(3) == used
    make(4)
    assert not half.exists()
    assert not unused.exists()
    assert (used / "made").exists()


def test_failed_step_leaves_no_folder(make: Callable[[int], Path]) -> None:
    def fail(folder: Path, steps: Steps) -> None:
        (folder / "made").touch()
        raise KeyError

    with pytest.raises(KeyError):
        cached("failing", 1, fail, lambda _: None)
    assert not list(cache.cache_folder().glob("*failing*"))
