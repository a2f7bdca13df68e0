# SPDX-License-Identifier: Apache-2.0
"""Kick, call and error descriptors of an unexpected kind or state."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from tests.support.peer import EchoDevice, Peer
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request
from vhost_rpmb.virtio.flags import NOTIFY


@pytest.fixture
def ready(peer: Peer, memory: GuestMemory, ring: Ring) -> Peer:
    peer.share(memory)
    peer.start(ring)
    assert peer.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
    return peer


@pytest.mark.parametrize("kind", ["file", "directory", "device", "socket", "memfd", "pipe"])
@pytest.mark.parametrize(
    "request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
)
def test_descriptor_of_another_kind_is_refused(
    ready: Peer, tmp_path: Path, kind: str, request_: Request, memfd: int
) -> None:
    near, far = socket.socketpair()
    reader, writer = os.pipe2(os.O_CLOEXEC)
    others = {"socket": near.fileno(), "memfd": memfd, "pipe": reader}
    (tmp_path / "file").touch()
    paths = {"file": tmp_path / "file", "directory": tmp_path, "device": Path("/dev/zero")}
    with near, far:
        fd = os.open(paths[kind], os.O_RDONLY) if kind in paths else os.dup(others[kind])
        ready.refused(request_, wire.pack_u64(0), (fd,))
        os.close(fd)
    os.close(reader)
    os.close(writer)


def test_refused_kick_descriptor_leaves_the_previous_one(
    peer: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice, memfd: int
) -> None:
    peer.share(memory)
    peer.start(ring)
    before = device.processed
    peer.refused(Request.SET_VRING_KICK, wire.pack_u64(0), (memfd,))
    ring.kick()
    peer.settle()
    assert device.processed == before + 1


def test_kick_descriptor_refused_by_epoll_is_refused(ready: Peer) -> None:
    """The event loop's own epoll instance: an anonymous file that cannot watch itself."""
    own = ready.loop.epoll.fileno()
    ready.refused(Request.SET_VRING_KICK, wire.pack_u64(0), (own,))


def test_kick_counter_at_its_limit_is_read(
    ready: Peer, device: EchoDevice, eventfds: list[int]
) -> None:
    os.eventfd_write(eventfds[0], 0xFFFF_FFFF_FFFF_FFFE)
    assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
    assert ready.settle(rounds=10) < 10
    assert device.processed


def test_kick_drained_by_the_front_end_does_not_block(
    ready: Peer, device: EchoDevice, eventfds: list[int]
) -> None:
    assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
    device.processed = 0
    for _ in range(10):
        os.eventfd_write(eventfds[0], 1)
        os.eventfd_read(eventfds[0])
        ready.settle()
    assert device.processed <= 10
    os.eventfd_write(eventfds[0], 1)
    before = device.processed
    ready.settle()
    assert device.processed == before + 1


def test_full_call_eventfd_counts_as_signalled(
    ready: Peer,
    device: EchoDevice,
    eventfds: list[int],
    engine: Engine,
    caplog: pytest.LogCaptureFixture,
) -> None:
    full = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
    os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE)
    assert not ready.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (full,))
    device.flags = [NOTIFY] * 3
    assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
    ready.settle()
    assert os.eventfd_read(full) == 0xFFFF_FFFF_FFFF_FFFE
    os.close(full)
    assert not caplog.records  # the front-end has its signal


@pytest.mark.parametrize(
    "request_type", [Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ERR]
)
def test_flags_of_an_eventfd_stay_as_they_are(ready: Peer, request_type: Request) -> None:
    """One that reads its end blocking goes on doing so."""
    blocking = os.eventfd(0, os.EFD_CLOEXEC)
    assert not ready.ack(request_type, wire.pack_u64(0), (blocking,))
    assert os.get_blocking(blocking)
    os.close(blocking)


def test_one_eventfd_for_kick_call_and_error_causes_no_busy_loop(
    ready: Peer, device: EchoDevice, eventfds: list[int], engine: Engine
) -> None:
    payload = wire.pack_u64(0)
    for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_VRING_KICK):
        assert not ready.ack(request, payload, (eventfds[0],))
    device.flags = [NOTIFY] * 5
    assert ready.settle(rounds=20) < 20


def test_kick_descriptor_closed_by_the_front_end_causes_no_busy_loop(
    ready: Peer, device: EchoDevice
) -> None:
    fd = os.eventfd(0, os.EFD_CLOEXEC)
    assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (fd,))
    os.close(fd)
    assert ready.settle(rounds=10) < 10


def test_replaced_kick_descriptor_is_no_longer_watched(ready: Peer, eventfds: list[int]) -> None:
    """The front-end keeps the same file open, so that closing ours alone would not do."""
    for fd in (eventfds[0], eventfds[1]):
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (fd,))
    ready.settle()
    os.eventfd_write(eventfds[0], 1)
    assert not ready.loop.wait(0)
