# SPDX-License-Identifier: Apache-2.0
"""A device in files that both hosts see: a ticket moves, and the lock decides."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.migration.conftest import Hosts
from tests.migration.test_copy import holds, is_fenced
from tests.support.hosts import SETUP, Host, StateRefusedError, give_device, leave, resume
from tests.support.oracle import KEY


@pytest.fixture
def source(hosts: Hosts, tmp_path: Path) -> Host:
    """A host with a device, see `give_device`."""
    host = hosts("source", "--migration=shared")
    give_device(host)
    return host


@pytest.fixture
def destination(hosts: Hosts, source: Host, tmp_path: Path) -> Host:
    """A host that waits for the device of the source."""
    folder = tmp_path / "destination"
    folder.mkdir()
    (folder / "rpmb.img").symlink_to(source.flash_path)
    return hosts("destination", "--migration=shared", incoming=True)


@pytest.mark.parametrize("through_socket", [False, True], ids=["pipe", "socket"])
def test_device_moves(source: Host, destination: Host, through_socket: bool) -> None:
    with source.machine(KEY, through_socket=through_socket) as machine:
        holds(machine)
        ticket = leave(machine)
    assert len(ticket) < 400
    with destination.machine(KEY, ticket, through_socket=through_socket) as arrived:
        holds(arrived)
        assert arrived.write(4, b"c" * 256) == 3
        with source.machine(KEY) as machine:
            is_fenced(machine)
    destination.stop()
    with source.machine(KEY) as machine:  # it is nowhere else: a machine that starts here has it
        assert machine.read(4, 1) == b"c" * 256


def test_device_returns(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        ticket = leave(machine)
    with destination.machine(KEY, ticket) as machine:
        assert machine.write(4, b"c" * 256) == 3
        back = leave(machine)
    with source.machine(KEY, back) as machine:
        assert machine.read(4, 1) == b"c" * 256
        assert machine.write(4, b"d" * 256) == 4


def test_failed_migration_resumes(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        ticket = leave(machine)
        arrived = destination.connect()
        arrived.handshake(SETUP.protocol_features)
        arrived.load(ticket)
        resume(machine)
        arrived.close()  # the source waits for it
        holds(machine)
        assert machine.write(4, b"c" * 256) == 3
        with pytest.raises(StateRefusedError):
            destination.machine(KEY, ticket)
        assert machine.read_counter() == 3


def test_source_is_refused_while_the_destination_runs(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        ticket = leave(machine)
        with destination.machine(KEY, ticket) as arrived:
            assert arrived.write(4, b"c" * 256) == 3
            resume(machine)
            is_fenced(machine)
        destination.kill()
        resume(machine)
        is_fenced(machine)  # the other machine has used it
    assert "is superseded: another host is active in generation 1" in source.log


def test_snapshot_is_refused_later(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        snapshot = leave(machine)
        resume(machine)
        assert machine.write(3, b"z" * 256) == 3
    source.stop()
    with pytest.raises(StateRefusedError):
        destination.machine(KEY, snapshot)
    source.start()
    with pytest.raises(StateRefusedError):
        source.machine(KEY, snapshot)
    with source.machine(KEY) as machine:
        assert machine.read(3, 1) == b"z" * 256


def test_local_migration(source: Host) -> None:
    with source.machine(KEY) as machine:
        ticket = leave(machine)
    with source.machine(KEY, ticket) as machine:
        holds(machine)
        assert machine.write(4, b"c" * 256) == 3
    with source.machine(KEY) as machine:
        assert machine.read_counter() == 3


def test_nothing_is_served_before_the_device_arrives(source: Host, destination: Host) -> None:
    with destination.machine() as machine:
        is_fenced(machine)
    with source.machine(KEY) as machine:
        holds(machine)
    assert "did not arrive" in destination.log


def test_other_files_are_refused(source: Host, hosts: Hosts) -> None:
    hosts("other", "--migration=shared").stop()
    other = hosts("other", "--migration=shared", incoming=True)
    with source.machine(KEY) as machine:
        ticket = leave(machine)
        with pytest.raises(StateRefusedError):
            other.machine(KEY, ticket)
        resume(machine)
        holds(machine)
    assert "expected device" in other.log
