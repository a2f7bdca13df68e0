# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import secrets
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.storage.fleet.story import MemoryStory
from tests.support.etcd import EtcdCluster
from tests.support.fake_engine import Cluster


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder for the witness, in memory: campaigns write thousands of files."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def story(folder: Path) -> Iterator[MemoryStory]:
    """A device that was created."""
    made = MemoryStory(Cluster(), folder)
    made.create()
    yield made
    made.end()


@pytest.fixture
def etcd(members: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members of a real etcd that all tests share; each uses a prefix of its own."""
    yield members
    members.disconnect()


@pytest.fixture
def prefix() -> bytes:
    return b"/%s/" % secrets.token_hex(8).encode()
