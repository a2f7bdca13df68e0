# SPDX-License-Identifier: Apache-2.0
"""A daemon on a shared store is killed or restarted under its running virtual machine."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX
from tests.support.etcd import EtcdCluster
from tests.support.faulty import SAVING, Faults
from tests.support.fleet import Host, create_device, describe
from tests.support.hosts import leave, resume
from tests.support.oracle import FRAME_SIZE, KEY, OK, split
from tests.support.sides import Side
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import QueueError
from vhost_rpmb.engine import Engine

pytestmark = pytest.mark.etcd
WRITES = 16  # in flight


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Host]:
    """A host with a device on three members."""
    with EtcdCluster() as cluster:
        # A process that is killed is not waited for until its lease ends.
        made = Host(tmp_path / "host", cluster, "/test/", lease=3600)
        create_device(made)
        yield made


def block(number: int) -> bytes:
    return bytes([number + 1]) * 256


def test_every_write_happens_exactly_once(host: Host, tmp_path: Path, engine: Engine) -> None:
    """Ends at random instants, and between a commit and its answers: the replay record has them."""
    faults = Faults(tmp_path)
    command = faults.command("--fd=3", host.store, "--device=vm-1", "-v", *SANDBOX)
    with (
        Supervised(tmp_path, engine=engine.name, command=command) as supervised,
        supervised.client() as guest,
    ):
        guest.program_key(KEY)
        first = describe(host)
        counter = 0
        for end in (signal.SIGTERM, None, signal.SIGKILL, signal.SIGTERM):
            starts = supervised.manager.starts
            tokens = []
            for number in range(counter, counter + WRITES):
                request = guest.write_request(number % 64, block(number), number)
                tokens.append(guest.submit(request, FRAME_SIZE))
            if end is None:
                faults.arm("committed")
            guest.flush()
            if end is not None:
                supervised.manager.send(end)
            found: dict[int, bytes] = {}
            while len(found) < WRITES:
                for answer in guest.answers():
                    assert answer.token not in found
                    found[answer.token] = answer.data
            for index, token in enumerate(tokens):
                (frame,) = split(found[token])
                assert (frame.result, frame.write_counter) == (OK, counter + index + 1)
            counter += WRITES
            supervised.manager.wait_ready(starts + 1)
        assert guest.read_counter() == counter
        for number in range(counter - 64, counter):
            assert guest.read(number % 64, 1) == block(number)
        last = describe(host)
        assert last["epoch"] == first["epoch"] + 4
        assert last["counter"] == counter
        assert "front-end disconnected" not in supervised.manager.log
    assert "Traceback" not in supervised.manager.log


@pytest.fixture
def source(host: Host, tmp_path: Path, engine: Engine) -> Iterator[Side]:
    """A daemon with the device."""
    options = (host.store, "--device=vm-1", "--migration=shared")
    with Side(tmp_path / "source", engine, *options) as side:
        yield side


@pytest.fixture
def destination(host: Host, source: Side, tmp_path: Path, engine: Engine) -> Iterator[Side]:
    """A daemon that waits for the device."""
    options = (host.store, "--device=vm-1", "--migration=shared", "--incoming")
    with Side(tmp_path / "destination", engine, *options) as side:
        yield side


def test_device_that_moved_survives_a_kill_after_its_take_over(
    source: Side, destination: Side
) -> None:
    """The daemon is the owner in the store, and has not noted it yet: at the destination, and at
    a source that takes the device back."""
    faults = destination.faults
    with source.machine() as here:
        here.program_key(KEY)
        assert here.write(0, block(0)) == 1
        ticket = leave(here)
        faults.arm("taken")
        with destination.machine(KEY, ticket) as there:
            assert there.read(0, 1) == block(0)
            assert not faults.armed
            assert there.write(0, block(1)) == 2
            leave(there)
            faults.arm("taken")
            resume(there)
            assert there.read(0, 1) == block(1)
            assert not faults.armed
            assert destination.manager.starts == 3
            resume(here)
            with pytest.raises(QueueError):
                here.read_counter()
            assert "is superseded: it was taken over by" in source.manager.log
        assert "superseded" not in destination.manager.log


@pytest.mark.parametrize("point", ["giving", "given", "loading", "loaded"])
def test_interrupted_ticket_is_repeated(source: Side, destination: Side, point: str) -> None:
    faults = (source if point in SAVING else destination).faults
    with source.machine(arming=partial(faults.arm, point)) as here:
        here.program_key(KEY)
        assert here.write(0, block(0)) == 1
        ticket = leave(here)
        with destination.machine(KEY, ticket) as there:
            assert not faults.armed
            assert there.read(0, 1) == block(0)
            resume(here)
            with pytest.raises(QueueError):
                here.read_counter()
