# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.fleet.story import Story
from tests.support.fake_engine import Cluster


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the witness, in memory: campaigns write thousands of files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def story(folder: Path) -> Story:
    """A device that was created."""
    made = Story(Cluster(), folder)
    made.create()
    return made
