# SPDX-License-Identifier: Apache-2.0
"""Hosts whose daemons are started, and killed at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.hosts import Host, copy_options, give_device
from tests.support.rig import write_key
from vhost_rpmb.engine import Engine

Hosts = Callable[..., Host]


@pytest.fixture
def hosts(engine: Engine, tmp_path: Path) -> Iterator[Hosts]:
    """Start a host by its name, on one engine; see `Host`."""
    made: list[Host] = []

    def start(name: str, *options: str, incoming: bool = False) -> Host:
        host = Host(tmp_path / name, *options, engine=engine.name, incoming=incoming)
        made.append(host)
        host.start()
        return host

    yield start
    for host in made:
        host.kill()


@pytest.fixture
def fence(tmp_path: Path) -> Path:
    return tmp_path / "fence"


@pytest.fixture
def copying(fence: Path, tmp_path: Path) -> list[str]:
    """The options of a host that copies, with a fence folder and a migration key."""
    write_key(tmp_path / "migration.key", bytes(range(32)))
    return [*copy_options(fence), f"--migration-key={tmp_path / 'migration.key'}"]


@pytest.fixture
def source(hosts: Hosts, copying: list[str]) -> Host:
    """A host with a device, see `give_device`."""
    host = hosts("source", *copying)
    give_device(host)
    return host


@pytest.fixture
def destination(hosts: Hosts, copying: list[str]) -> Host:
    """A host that waits for a device."""
    return hosts("destination", *copying, incoming=True)
