# SPDX-License-Identifier: Apache-2.0
"""Front-ends and service managers that get in the way of a connection that is kept."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from tests.support.campaign import DIVISOR
from tests.support.daemon import is_asleep, until
from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES, Frontend
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MAX_FDS, MemoryRegion, ProtocolFeature, Request

MOST = 253  # descriptors in one sendmsg()
REFUSED = wire.pack_u64(1)
REGION = MemoryRegion(0, 4096, 0, 0)
KINDS = {
    Request.SET_INFLIGHT_FD: wire.InflightDescription(4096, 0, 1, 64).pack(),
    Request.ADD_MEM_REG: wire.pack_single_region(REGION),
    Request.SET_MEM_TABLE: wire.pack_memory_table([REGION]),
    Request.SET_VRING_KICK: wire.pack_u64(0),
}


@pytest.fixture
def supervised(tmp_path: Path, engine: Engine) -> Iterator[Supervised]:
    with Supervised(tmp_path, engine=engine.name) as supervised:
        yield supervised


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(MOST)]
    yield fds
    wire.close_fds(fds)


def connected(supervised: Supervised) -> Frontend:
    frontend = supervised.frontend()
    frontend.handshake(PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD)
    return frontend


def stored(supervised: Supervised) -> int:
    """How many descriptors were sent to the service manager so far."""
    return sum("FDSTORE" in each for each in supervised.manager.notifications)


def test_surplus_descriptors_are_not_stored(supervised: Supervised, eventfds: list[int]) -> None:
    with connected(supervised) as frontend:
        until(lambda: stored(supervised) == 2)  # the record and the connection
        before = stored(supervised)
        for _ in range(3):
            frontend.send(Request.SET_VRING_CALL, wire.pack_u64(0), eventfds, wire.FLAG_NEED_REPLY)
            assert frontend.receive().payload == REFUSED
        supervised.manager.kill()
        assert stored(supervised) == before
        assert frontend.get_status() == 0


def test_sockets_are_not_stored(supervised: Supervised) -> None:
    """Least of all the front-end's end of the connection."""
    with connected(supervised) as frontend:
        until(lambda: stored(supervised) == 2)  # the record and the connection
        before = stored(supervised)
        for request, payload in KINDS.items():
            frontend.send(request, payload, [frontend.fileno()], wire.FLAG_NEED_REPLY)
            assert frontend.receive().payload == REFUSED
        supervised.manager.kill()
        assert stored(supervised) == before
    supervised.becomes_empty()


def test_descriptors_with_each_byte_do_not_end_the_keeping(
    supervised: Supervised, eventfds: list[int]
) -> None:
    """They are more than the store has room for; those of one message are limited."""
    data = wire.pack_message(Request.SET_VRING_CALL, wire.FLAG_NEED_REPLY, wire.pack_u64(0))
    with connected(supervised) as frontend:
        until(lambda: stored(supervised) == 2)  # the record and the connection
        before = stored(supervised)
        for index in range(len(data)):
            socket.send_fds(frontend._sock, [data[index : index + 1]], eventfds)
        assert frontend.receive().payload == REFUSED
        supervised.manager.kill()
        assert stored(supervised) - before <= MAX_FDS
        assert frontend.get_status() == 0
    supervised.becomes_empty()
    assert "a restart will end the connection" not in supervised.manager.log


def test_front_ends_leave_no_descriptor(supervised: Supervised, eventfds: list[int]) -> None:
    """With messages that are refused, incomplete, queued, or that end the connection."""
    manager, index = supervised.manager, wire.pack_u64(0)
    kick = wire.pack_message(Request.SET_VRING_KICK, wire.FLAG_NEED_REPLY, index)
    memory = os.memfd_create("memory")
    os.ftruncate(memory, 8192)
    fds_before: set[str] = set()
    for round_ in range(1000 if DIVISOR == 1 else 20):
        frontend = connected(supervised)
        with closing(socket.socket(fileno=os.dup(frontend.fileno()))) as sock:
            frontend.tell(Request.ADD_MEM_REG, wire.pack_single_region(REGION), [memory])
            frontend.tell(Request.SET_VRING_CALL, index, [eventfds[0]])
            socket.send_fds(sock, [kick[:6]], eventfds[: round_ % 40])
            if round_ % 3 == 0:
                socket.send_fds(sock, [kick[6:] + kick], [frontend.fileno(), memory])
            if round_ % 3 == 1:
                sock.sendall(kick[6:10] + b"\xff" * 10)
        frontend.close()
        if round_ % 20 == 0:
            manager.restart(signal.SIGTERM if round_ % 40 else signal.SIGKILL)
            fds_before = set()
        if not fds_before:
            with connected(supervised):  # it is answered after all that came before were left
                until(lambda: manager.names != ["rpmb-session"])
            supervised.becomes_empty()
            until(lambda: is_asleep(manager.pid))  # it withdraws first, and closes then
            fds_before = set(os.listdir(f"/proc/{manager.pid}/fd"))
    os.close(memory)
    supervised.becomes_empty()
    until(lambda: set(os.listdir(f"/proc/{manager.pid}/fd")) == fds_before)


def test_credentials_do_not_hide_descriptors(tmp_path: Path, engine: Engine) -> None:
    """PassCredentials= of a socket unit: the kernel puts them before the descriptors."""
    with Supervised(tmp_path, engine=engine.name) as supervised:
        supervised._listener.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        with supervised.client() as client:
            client.program_key(KEY)
            supervised.manager.kill()
            assert client.write(0, bytes(256)) == 1


def test_full_queue_of_notifications_delays_readiness(supervised: Supervised) -> None:
    manager = supervised.manager
    with supervised.client(), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as others:
        others.setblocking(False)
        manager._held = True
        manager.send(signal.SIGKILL)
        manager.wait(lambda: not manager.pid)
        with manager._changed:  # nothing is read meanwhile
            others.connect(str(manager._address))
            with suppress(BlockingIOError):
                while True:
                    others.send(b"STATUS=busy")
            manager._held = False
            manager._start()
            until(lambda: "front-end taken over" in manager.log and is_asleep(manager.pid))
        manager.wait_ready()
