# SPDX-License-Identifier: Apache-2.0
"""A device moves as a copy: exactly one host answers, and none is behind."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.migration.conftest import Hosts
from tests.support.hosts import (
    ACCEPTED,
    SETUP,
    Host,
    MovingFrontend,
    StateRefusedError,
    copy_options,
    leave,
    resume,
)
from tests.support.oracle import KEY
from tests.support.rig import write_key
from vhost_rpmb.driver.errors import QueueError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.vhost_user.wire import StateDirection


def holds(machine: RpmbClient, counter: int = 2) -> None:
    """Check that a machine has the device of the source."""
    assert machine.read_counter() == counter
    assert machine.read(3, 3) == b"a" * 256 + bytes(256) + b"b" * 256


def is_fenced(machine: RpmbClient) -> None:
    """Check that a machine gets no answer, and learns it by the error eventfd."""
    with pytest.raises(QueueError):
        machine.read_counter()


@pytest.mark.parametrize("through_socket", [False, True], ids=["pipe", "socket"])
def test_device_moves(source: Host, destination: Host, through_socket: bool) -> None:
    with source.machine(KEY, through_socket=through_socket) as machine:
        holds(machine)
        blob = leave(machine)
    assert b"a" * 256 in blob
    assert KEY not in blob
    with destination.machine(KEY, blob, through_socket=through_socket) as arrived:
        holds(arrived)
        assert arrived.write(4, b"c" * 256) == 3
    destination.kill()
    destination.start()  # with the same options
    with destination.machine(KEY) as machine:
        assert machine.read(3, 3) == b"a" * 256 + b"c" * 256 + b"b" * 256
    with source.machine(KEY) as machine:
        is_fenced(machine)
    assert "was handed to another host (generation 1)" in source.log
    assert not [line for line in destination.log.splitlines() if "error" in line]


def test_device_returns(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        blob = leave(machine)
    with destination.machine(KEY, blob) as machine:
        assert machine.write(3, bytes(256)) == 3
        back = leave(machine)
    with source.machine(KEY, back) as machine:
        assert machine.read_counter() == 3
        assert machine.read(3, 3) == bytes(512) + b"b" * 256
        assert machine.write(3, b"d" * 256) == 4
    with destination.machine(KEY) as machine:
        is_fenced(machine)


def test_failed_migration_resumes(source: Host, destination: Host) -> None:
    """The other host then is refused for good, also with the state that it has."""
    with source.machine(KEY) as machine:
        blob = leave(machine)
        with destination.machine(KEY, blob) as arrived:
            holds(arrived)
        resume(machine)
        is_fenced(machine)
    assert "is superseded: another host is active in generation 1" in source.log
    destination.stop()


def test_source_resumes_first(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        blob = leave(machine)
        arrived = destination.connect()
        arrived.handshake(SETUP.protocol_features)
        arrived.load(blob)
        arrived.close()
        resume(machine)
        holds(machine)
        assert machine.write(4, b"c" * 256) == 3
        with destination.machine(KEY, blob) as late:
            is_fenced(late)
        assert machine.read_counter() == 3
    assert "is superseded: another host is active in generation 1" in destination.log


def test_snapshot_is_refused_later(source: Host, destination: Host, hosts: Hosts) -> None:
    """The machine goes on after its snapshot; wherever that is restored, nothing answers."""
    with source.machine(KEY) as machine:
        snapshot = leave(machine)
        resume(machine)
        assert machine.write(3, b"z" * 256) == 3
    with pytest.raises(StateRefusedError):
        source.machine(KEY, snapshot)
    assert "a state is used once, a snapshot cannot be restored" in source.log
    with source.machine(KEY) as machine:
        assert machine.read(3, 1) == b"z" * 256
    with destination.machine(KEY, snapshot) as machine:
        is_fenced(machine)


def test_snapshot_continues_in_the_same_daemon(source: Host) -> None:
    """A local migration: another connection gets the device back, once."""
    with source.machine(KEY) as machine:
        blob = leave(machine)
    with source.machine(KEY, blob) as machine:
        holds(machine)
        assert machine.write(4, b"c" * 256) == 3
    with pytest.raises(StateRefusedError):
        source.machine(KEY, blob)


def test_nothing_is_served_before_the_device_arrives(destination: Host) -> None:
    with destination.machine() as machine:
        is_fenced(machine)
    assert "the device is expected from another host, and did not arrive" in destination.log
    destination.stop()
    destination.command_line.remove("--incoming")
    with pytest.raises(RuntimeError, match="it waits for one to arrive"):
        destination.start()


def test_unused_arrival_can_be_repeated(source: Host, destination: Host) -> None:
    """The virtual machine at the destination ended before it ran, and is started again."""
    with source.machine(KEY) as machine:
        blob = leave(machine)
    for _ in range(2):
        with destination.connect() as arrived:
            arrived.handshake(SETUP.protocol_features)
            arrived.load(blob)
    destination.kill()
    destination.start()
    with destination.machine(KEY, blob) as machine:
        holds(machine)


def test_without_a_fence_the_source_waits_for_the_operator(
    hosts: Hosts, tmp_path: Path, copying: list[str]
) -> None:
    source = hosts("source", *copy_options(None))
    with source.machine() as machine:
        machine.program_key(KEY)
        blob = leave(machine)
        resume(machine)
        is_fenced(machine)
    assert "without --fence-path it cannot be taken back by itself" in source.log
    with pytest.raises(StateRefusedError):
        source.machine(KEY, blob)
    write_key(tmp_path / "rpmb.key", KEY)
    options = copy_options(None, f"--key-path={tmp_path / 'rpmb.key'}")
    with hosts("destination", *options, incoming=True).machine(KEY, blob) as machine:
        assert machine.read_counter() == 0


def test_aborted_transfer_leaves_the_device(hosts: Hosts) -> None:
    """Nobody has the whole state: no fence folder is needed to continue."""
    source = hosts("source", *copy_options(None))
    with source.machine() as machine:
        machine.program_key(KEY)
        for start in range(0, 512, 32):
            machine.write(start, b"x" * 8192)
        machine.frontend.stop_ring()
        frontend = machine.frontend
        assert isinstance(frontend, MovingFrontend)
        reading, writing = os.pipe()
        assert frontend.transfer(StateDirection.SAVE, writing) == ACCEPTED
        os.close(writing)
        assert os.read(reading, 1000)
        os.close(reading)
        assert frontend.check() == 1
        resume(machine)
        assert machine.read_counter() == 16


@pytest.mark.parametrize("known", ["nothing", "other", "key"])
def test_key_stays_at_home(hosts: Hosts, fence: Path, tmp_path: Path, known: str) -> None:
    """Without a migration key, the destination has the key already, or refuses the device."""
    options = copy_options(fence)
    with hosts("source", *options).machine() as machine:
        machine.program_key(KEY)
        blob = leave(machine)
    path = tmp_path / "rpmb.key"
    if known != "nothing":
        write_key(path, KEY if known == "key" else bytes(32))
    destination = hosts("destination", *options, f"--key-path={path}", incoming=True)
    if known == "key":
        with destination.machine(KEY, blob) as machine:
            assert machine.read_counter() == 0
        return
    with pytest.raises(StateRefusedError):
        destination.machine(KEY, blob)
    assert "expected the key of device" in destination.log


def test_files_of_a_device_that_left_are_refused(source: Host, fence: Path) -> None:
    """Where migration is off, and by their exit status to a service manager."""
    with source.machine(KEY) as machine:
        leave(machine)
    source.stop()
    source.command_line = [
        word for word in source.command_line if not word.startswith(("--migration", "--fence"))
    ]
    with pytest.raises(RuntimeError, match="was handed to another host"):
        source.start()
    assert source.status == 3


def test_restored_files_are_refused_with_the_fence(source: Host, destination: Host) -> None:
    saved = source.folder.parent / "saved"
    source.stop()
    shutil.copytree(source.folder, saved)
    source.start()
    with source.machine(KEY) as machine:
        blob = leave(machine)
    with destination.machine(KEY, blob) as machine:
        holds(machine)
    source.stop()
    shutil.copytree(saved, source.folder, dirs_exist_ok=True)
    with pytest.raises(RuntimeError, match="is superseded: another host is active"):
        source.start()
    assert source.status == 3
