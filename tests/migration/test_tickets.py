# SPDX-License-Identifier: Apache-2.0
"""A device in a shared store: a ticket lets one daemon follow the owner that gave it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.storage.fleet.story import block
from tests.storage.fleet.test_tenancy import Moves
from tests.support.fake_engine import Cluster, Crash, Fault, Kind
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import Fenced
from vhost_rpmb.migration.note import Note
from vhost_rpmb.migration.tickets import Tickets
from vhost_rpmb.storage.fleet.tenancy import Tenancy


class Host:
    """A daemon and the connection of its machine."""

    def __init__(
        self,
        moves: Moves,
        engine: Engine,
        name: str,
        *,
        incoming: bool = False,
        note: Note | None = None,
    ) -> None:
        self.name = name
        self.store: Tenancy = moves.start(name)
        self.note = note or Note()
        self.device = engine.RpmbDevice(self.store)
        self.tickets = Tickets(self.store, self.device, self.note, incoming=incoming)

    def runs(self) -> bool:
        """Start the ring, as the server does; whether it runs."""
        if self.tickets.start() or not self.store.begin():
            return False
        self.device.reload()
        assert self.tickets.start() == ""
        return True

    def write(self) -> None:
        assert self.store.commit(self.store.counter + 1, [(1, block(1))], None)

    def leave(self) -> bytes:
        self.store.end()
        return self.tickets.save()


@pytest.fixture
def moves(tmp_path: Path) -> Iterator[Moves]:
    moves = Moves(Cluster(), tmp_path)
    moves.create()
    yield moves
    moves.end()


@pytest.fixture
def source(moves: Moves, engine: Engine) -> Host:
    host = Host(moves, engine, "source")
    assert host.runs()
    host.write()
    return host


@pytest.fixture
def destination(source: Host, moves: Moves, engine: Engine) -> Host:
    return Host(moves, engine, "destination", incoming=True)


def test_device_moves_and_returns(source: Host, destination: Host) -> None:
    source.device.register = b"\x03\0\0\0\0\1\0\0\0\1"
    ticket = source.leave()
    assert not destination.runs()  # nothing arrived yet
    destination.tickets.load(ticket)
    assert destination.runs()
    assert destination.store.counter == 1
    assert destination.device.register == source.device.register
    destination.write()
    assert not source.runs()
    back = destination.leave()
    source.tickets.connected()  # another machine
    source.tickets.load(back)
    assert source.runs()
    assert source.store.counter == 2


def test_source_takes_it_back_first(source: Host, destination: Host) -> None:
    ticket = source.leave()
    destination.tickets.load(ticket)
    assert source.runs()
    source.write()
    assert not destination.runs()
    source.store.end()
    assert not destination.runs()
    with pytest.raises(ValueError, match="a snapshot cannot be restored"):
        destination.tickets.load(ticket)
    assert source.runs()  # after a pause
    assert source.store.counter == 2


def test_snapshot_is_refused_later(source: Host, destination: Host) -> None:
    snapshot = source.leave()
    assert source.runs()
    source.store.end()
    for host in (source, destination):
        with pytest.raises(ValueError, match="a snapshot cannot be restored"):
            host.tickets.load(snapshot)


def test_owner_that_comes_between_wins(source: Host, destination: Host, moves: Moves) -> None:
    """After the look at the owner, and before the take-over."""
    destination.tickets.load(source.leave())
    assert destination.tickets.start() == ""
    assert source.runs()
    source.store.end()
    with pytest.raises(Fenced, match="is superseded"):
        destination.store.begin()


def test_device_of_another_owner_is_not_given(source: Host, moves: Moves, engine: Engine) -> None:
    other = Host(moves, engine, "other")
    with pytest.raises(ValueError, match="another daemon owns the device"):
        other.tickets.save()
    source.write()


def test_machine_that_never_ran_can_leave(source: Host, destination: Host) -> None:
    destination.tickets.load(source.leave())
    onward = destination.tickets.save()
    assert not source.runs()
    source.tickets.connected()
    source.tickets.load(onward)
    assert source.runs()


# Kills


Kill = Callable[[Host], Host]


@pytest.fixture
def kill(moves: Moves, engine: Engine, kind: Kind, step: int) -> Kill:
    """Kill a daemon at a request of its take-over; return the one that continues its connection.

    Beyond the last request: before the next turn of its loop.
    """

    def crash(host: Host) -> Host:
        moves.cluster.plan[moves.cluster.count + step] = Fault(kind)
        with suppress(Crash):
            assert host.tickets.start() == ""
            assert host.store.begin()
        moves.cluster.plan.clear()
        return Host(moves, engine, host.name, note=host.note)

    return crash


@pytest.mark.parametrize("step", range(6))
@pytest.mark.parametrize("kind", [Kind.CRASH_BEFORE, Kind.CRASH_AFTER])
class TestKill:
    """At each request of a take-over; whoever is first has the device."""

    def test_arrived_device_continues(self, source: Host, destination: Host, kill: Kill) -> None:
        destination.tickets.load(source.leave())
        destination = kill(destination)
        destination = kill(destination)
        assert destination.runs()
        destination.write()
        assert destination.store.counter == 2
        assert not source.runs()

    def test_returned_device_continues(self, source: Host, destination: Host, kill: Kill) -> None:
        destination.tickets.load(source.leave())
        source = kill(source)
        source = kill(source)
        assert source.runs()
        source.write()
        assert source.store.counter == 2
        assert not destination.runs()

    def test_one_of_two_has_it(self, source: Host, destination: Host, kill: Kill) -> None:
        """The other one is asked before the daemon is started again."""
        destination.tickets.load(source.leave())
        destination = kill(destination)
        first = source.runs()
        assert destination.runs() is not first
        (source if first else destination).write()
