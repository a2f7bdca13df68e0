# SPDX-License-Identifier: Apache-2.0
"""Of which kinds descriptors may be, and that no other is kept."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import until
from tests.support.peer import PAGE, REGION, Peer
from vhost_rpmb.errors import PeerError
from vhost_rpmb.vhost_user import foreign, wire
from vhost_rpmb.vhost_user.wire import Request


def test_request_channel_is_acknowledged_and_not_kept(peer: Peer) -> None:
    near, far = socket.socketpair()
    with near:
        with far:
            assert peer.ack(Request.SET_BACKEND_REQ_FD, b"", (far.fileno(),)) == 0
        near.settimeout(10)
        assert near.recv(1) == b""


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_UNIX, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_INET, socket.SOCK_STREAM),
    ],
)
def test_another_socket_as_request_channel_is_refused(
    peer: Peer, family: socket.AddressFamily, kind: socket.SocketKind
) -> None:
    with socket.socket(family, kind) as sock:
        peer.refused(Request.SET_BACKEND_REQ_FD, b"", (sock.fileno(),))


def test_another_file_as_request_channel_is_refused(peer: Peer, eventfds: list[int]) -> None:
    peer.refused(Request.SET_BACKEND_REQ_FD, b"", (eventfds[0],))


def test_memory_in_a_regular_file(peer: Peer, tmp_path: Path) -> None:
    with (tmp_path / "memory").open("w+b") as file:
        file.truncate(16 * PAGE)
        payload = wire.pack_single_region(REGION)
        assert peer.ack(Request.ADD_MEM_REG, payload, (file.fileno(),)) == 0


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "/dev", "/proc/self/maps"])
def test_memory_in_another_kind_of_file_is_refused(peer: Peer, name: str) -> None:
    fd = os.open(name, os.O_RDONLY | os.O_CLOEXEC)
    peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(REGION), (fd,))
    os.close(fd)


@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
)
def test_event_opened_with_o_path_is_refused(
    peer: Peer, eventfds: list[int], request_: Request
) -> None:
    """It only names a file; opening that anew would give rights that were never given."""
    reader, writer = os.pipe2(os.O_CLOEXEC)
    for fd in (eventfds[0], reader, writer):
        path = os.open(f"/proc/self/fd/{fd}", os.O_PATH | os.O_CLOEXEC)
        peer.refused(request_, wire.pack_u64(0), (path,))
        os.close(path)
    os.close(reader)
    os.close(writer)


def test_memory_opened_with_o_path_is_refused(peer: Peer, memfd: int) -> None:
    path = os.open(f"/proc/self/fd/{memfd}", os.O_PATH | os.O_CLOEXEC)
    peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(REGION), (path,))
    peer.refused(Request.SET_MEM_TABLE, wire.pack_memory_table([REGION]), (path,))
    os.close(path)


def test_request_channel_opened_with_o_path_is_refused(peer: Peer, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        path = os.open(tmp_path / "s", os.O_PATH | os.O_CLOEXEC)
    peer.refused(Request.SET_BACKEND_REQ_FD, b"", (path,))
    os.close(path)


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """All threads that close descriptors wait for this event, which the end sets."""
    gate = threading.Event()

    def wait() -> None:
        gate.wait()

    for _ in range(32):
        foreign.in_background(wait)
    until(lambda: not foreign.left_open())
    yield gate
    gate.set()
    until(lambda: not foreign.left_open())


def test_threads_that_lack_a_processor_end_no_connection(peer: Peer, gate: threading.Event) -> None:
    with socket.socket() as sock:
        timer = threading.Timer(0.2, gate.set)
        timer.start()
        peer.refused(Request.SET_BACKEND_REQ_FD, b"", (sock.fileno(),) * 3)
        timer.join()


def test_descriptors_that_stay_open_end_the_connection(peer: Peer, gate: threading.Event) -> None:
    with socket.socket() as sock:
        fds = (sock.fileno(),) * 3
        peer.send(Request.SET_BACKEND_REQ_FD, b"", fds, wire.FLAG_NEED_REPLY)
    assert isinstance(peer.end, PeerError)
    assert "too many descriptors of front-ends wait to be closed" in str(peer.end)
    assert not gate.is_set()
