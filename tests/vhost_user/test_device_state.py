# SPDX-License-Identifier: Apache-2.0
"""SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE: their order, descriptors, and hostile peers."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE
from tests.support.peer import NEGOTIATED, OFFERED, EchoDevice, Peer
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.interfaces import Keeper
from vhost_rpmb.vhost_user.wire import (
    ProtocolFeature,
    Request,
    StateDirection,
    StateTransferDescription,
    VringState,
)

SAVE, LOAD = StateDirection.SAVE, StateDirection.LOAD
ACCEPTED, REFUSED = wire.pack_u64(0x100), wire.pack_u64(0x101)
GOOD, BAD = wire.pack_u64(0), wire.pack_u64(1)
LIMIT = 1 << 20
LARGE = bytes(range(256)) * 4096  # more than a pipe or a socket holds


class Box:
    """The state of a device that is only bytes."""

    limit = LIMIT

    def __init__(self) -> None:
        self.content = b"content"
        self.loaded: list[bytes] = []
        self.sent_all: list[bool] = []
        self.fault = ""

    def save(self) -> bytes:
        if self.fault:
            raise OSError(None, self.fault)
        return self.content

    def sent(self, complete: bool) -> None:
        self.sent_all.append(complete)

    def load(self, blob: bytes) -> None:
        if self.fault:
            raise ValueError(self.fault)
        self.loaded.append(blob)


@pytest.fixture
def box() -> Box:
    return Box()


@pytest.fixture
def peer(engine: Engine, device: EchoDevice, keeper: Keeper | None, box: Box) -> Iterator[Peer]:
    offered = PROTOCOL_FEATURES | ProtocolFeature.DEVICE_STATE
    peer = Peer(engine, device, keeper, protocol_features=offered, state=box)
    peer.negotiate(NEGOTIATED | ProtocolFeature.DEVICE_STATE)
    yield peer
    peer.close()


@pytest.fixture(params=["pipe", "socket"])
def channel(request: pytest.FixtureRequest, _no_descriptor_leaks: None) -> Iterator[list[int]]:
    """The reading and the writing end, closed at the end unless the test has set them to -1."""
    if request.param == "pipe":
        ends = list(os.pipe())
    else:
        ends = [end.detach() for end in socket.socketpair()]
    yield ends
    for fd in ends:
        if fd >= 0:
            os.close(fd)


def close(channel: list[int], end: int) -> None:
    os.close(channel[end])
    channel[end] = -1


def request(peer: Peer, direction: int, fd: int | None, phase: int = 0) -> bytes | None:
    payload = StateTransferDescription(direction, phase).pack()
    return peer.ask(Request.SET_DEVICE_STATE_FD, payload, () if fd is None else (fd,))


def check(peer: Peer) -> bytes:
    """The reply to CHECK_DEVICE_STATE, which may be late."""
    peer.send(Request.CHECK_DEVICE_STATE)
    return reply(peer)


def reply(peer: Peer) -> bytes:
    deadline = time.monotonic() + PATIENCE
    while (found := peer.reply()) is None:
        assert time.monotonic() < deadline
        peer.loop.wait(0.01)
    return found


def read_all(fd: int) -> bytes:
    parts = []
    while part := os.read(fd, 1 << 16):
        parts.append(part)
    return b"".join(parts)


def works(peer: Peer) -> None:
    assert peer.end is None
    assert peer.ask_u64(Request.GET_FEATURES) == OFFERED


@pytest.mark.parametrize("content", [b"", b"content", LARGE], ids=len)
def test_state_is_saved(peer: Peer, box: Box, channel: list[int], content: bytes) -> None:
    """The reply comes first; the end of the bytes is the close by the back-end."""
    box.content = content
    assert request(peer, SAVE, channel[1]) == ACCEPTED
    close(channel, 1)
    assert read_all(channel[0]) == content
    assert check(peer) == GOOD
    assert box.sent_all == [True] if content else [False]
    works(peer)


@pytest.mark.parametrize("content", [b"", b"content", LARGE], ids=len)
def test_state_is_loaded(peer: Peer, box: Box, channel: list[int], content: bytes) -> None:
    assert request(peer, LOAD, channel[0]) == ACCEPTED
    close(channel, 0)
    sending = threading.Thread(target=_send, args=(channel, content))
    sending.start()
    assert check(peer) == GOOD
    sending.join()
    assert box.loaded == [content]
    works(peer)


def _send(channel: list[int], content: bytes) -> None:
    for start in range(0, len(content), 5000):
        os.write(channel[1], content[start : start + 5000])
    close(channel, 1)


def test_check_waits_and_no_other_message_is_served(
    peer: Peer, box: Box, channel: list[int]
) -> None:
    assert request(peer, LOAD, channel[0]) == ACCEPTED
    close(channel, 0)
    peer.send(Request.CHECK_DEVICE_STATE)
    peer.send(Request.GET_FEATURES)
    turns = [peer.loop.wait(0.05) for _ in range(4)]
    assert peer.reply() is None
    assert not any(turns)  # it does not spin
    os.write(channel[1], b"content")
    close(channel, 1)
    assert reply(peer) == GOOD
    assert reply(peer) == wire.pack_u64(OFFERED)
    assert box.loaded == [b"content"]


def test_flags_of_the_descriptor_stay(peer: Peer, channel: list[int]) -> None:
    assert request(peer, SAVE, channel[1]) == ACCEPTED
    assert os.get_blocking(channel[1])
    close(channel, 1)
    assert read_all(channel[0]) == b"content"
    assert check(peer) == GOOD


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_descriptor_that_does_not_block_is_served(
    peer: Peer, box: Box, channel: list[int], direction: StateDirection
) -> None:
    own = channel[direction == SAVE]
    os.set_blocking(own, False)
    box.content = LARGE
    assert request(peer, direction, own) == ACCEPTED
    close(channel, direction == SAVE)
    if direction == SAVE:
        assert read_all(channel[0]) == LARGE
    else:
        _send(channel, b"content")
    assert check(peer) == GOOD


def test_check_without_a_transfer_fails(peer: Peer, channel: list[int]) -> None:
    assert check(peer) == BAD
    assert request(peer, SAVE, channel[1]) == ACCEPTED
    close(channel, 1)
    assert read_all(channel[0]) == b"content"
    assert check(peer) == GOOD
    assert check(peer) == BAD
    works(peer)


@pytest.mark.parametrize(
    ("direction", "phase"), [(2, 0), (0xFFFF_FFFF, 0), (0, 1), (1, 1), (1, 0xFFFF_FFFF)]
)
def test_other_parameters_are_refused(
    peer: Peer, channel: list[int], direction: int, phase: int
) -> None:
    assert request(peer, direction, channel[1], phase) == REFUSED
    works(peer)


def test_payload_and_descriptors_are_checked(peer: Peer, channel: list[int]) -> None:
    assert request(peer, SAVE, None) == REFUSED
    assert peer.ask(Request.SET_DEVICE_STATE_FD, bytes(7), (channel[1],)) == REFUSED
    two = (channel[1], channel[1])
    assert peer.ask(Request.SET_DEVICE_STATE_FD, bytes(8), two) == REFUSED
    assert peer.ask(Request.CHECK_DEVICE_STATE, bytes(1)) == BAD
    works(peer)


KINDS: dict[str, Callable[[Path], int]] = {
    "eventfd": lambda _: os.eventfd(0),
    "file": lambda folder: os.open(folder / "file", os.O_RDWR | os.O_CREAT),
    "folder": lambda folder: os.open(folder, os.O_RDONLY),
    "zeros": lambda _: os.open("/dev/zero", os.O_RDWR),
    "path": lambda folder: os.open(folder, os.O_PATH),
    "datagram": lambda _: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).detach(),
    "tcp": lambda _: socket.socket().detach(),
    "unconnected": lambda _: socket.socket(socket.AF_UNIX).detach(),
    "memory": lambda _: os.memfd_create("memory"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_other_kinds_of_files_are_refused(
    peer: Peer, tmp_path: Path, kind: str, direction: StateDirection
) -> None:
    fd = KINDS[kind](tmp_path)
    try:
        assert request(peer, direction, fd) == REFUSED
    finally:
        os.close(fd)
    works(peer)


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_wrong_end_of_a_pipe_is_refused(peer: Peer, direction: StateDirection) -> None:
    ends = os.pipe()
    assert request(peer, direction, ends[direction == LOAD]) == REFUSED
    wire.close_fds(ends)
    works(peer)


def test_own_connection_is_refused(peer: Peer) -> None:
    assert request(peer, LOAD, peer._far) == REFUSED
    works(peer)


def test_running_vring_refuses_a_transfer(
    peer: Peer, memory: GuestMemory, ring: Ring, channel: list[int]
) -> None:
    peer.share(memory)
    peer.start(ring)
    assert request(peer, SAVE, channel[1]) == REFUSED
    peer.ask(Request.GET_VRING_BASE, VringState(0, 0).pack())
    assert request(peer, SAVE, channel[1]) == ACCEPTED
    close(channel, 1)
    assert read_all(channel[0]) == b"content"
    assert check(peer) == GOOD


def test_vring_that_starts_ends_the_transfer(
    peer: Peer, box: Box, memory: GuestMemory, ring: Ring, channel: list[int]
) -> None:
    assert request(peer, LOAD, channel[0]) == ACCEPTED
    peer.share(memory)
    peer.start(ring)
    os.write(channel[1], b"content")
    close(channel, 1)
    assert check(peer) == BAD
    assert box.loaded == []


def test_second_transfer_replaces_the_first(peer: Peer, box: Box, channel: list[int]) -> None:
    """A front-end that gave up does not check."""
    box.content = LARGE
    assert request(peer, SAVE, channel[1]) == ACCEPTED
    box.content = b"content"
    ends = os.pipe()
    assert request(peer, SAVE, ends[1]) == ACCEPTED
    os.close(ends[1])
    assert read_all(ends[0]) == b"content"
    os.close(ends[0])
    assert check(peer) == GOOD
    assert check(peer) == BAD
    assert box.sent_all == [False, True]


@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_failure_of_the_device_is_reported(
    peer: Peer, box: Box, channel: list[int], direction: StateDirection
) -> None:
    """By the end of the bytes and in the check."""
    box.fault = "no room"
    own = direction == SAVE
    assert request(peer, direction, channel[own]) == ACCEPTED
    close(channel, own)
    if direction == SAVE:
        assert read_all(channel[0]) == b""
    else:
        _send(channel, b"content")
    assert check(peer) == BAD
    works(peer)


@pytest.mark.parametrize("read", [0, 1, 70000])
def test_reader_that_leaves_fails_the_transfer(
    peer: Peer, box: Box, channel: list[int], read: int
) -> None:
    box.content = LARGE
    assert request(peer, SAVE, channel[1]) == ACCEPTED
    close(channel, 1)
    assert len(os.read(channel[0], read)) <= read
    close(channel, 0)
    assert check(peer) == BAD
    assert box.sent_all == [False]
    works(peer)


def test_endless_state_is_refused(peer: Peer, box: Box, channel: list[int]) -> None:
    assert request(peer, LOAD, channel[0]) == ACCEPTED
    close(channel, 0)
    with pytest.raises(OSError, match=r"pipe|reset"):
        _send(channel, bytes(1 << 30))
    assert check(peer) == BAD
    assert box.loaded == []
    works(peer)


@pytest.mark.parametrize("held", [False, True], ids=["moving", "checking"])
@pytest.mark.parametrize("direction", [SAVE, LOAD])
def test_disconnect_ends_the_transfer(
    peer: Peer, box: Box, channel: list[int], direction: StateDirection, held: bool
) -> None:
    """Also while another process keeps the other end of the channel."""
    box.content = LARGE
    assert request(peer, direction, channel[direction == SAVE]) == ACCEPTED
    if held:
        peer.send(Request.CHECK_DEVICE_STATE)
        assert peer.reply() is None
    peer.sock.shutdown(socket.SHUT_RDWR)
    deadline = time.monotonic() + PATIENCE
    while peer.end is None and time.monotonic() < deadline:
        peer.loop.wait(0.01)
    assert isinstance(peer.end, EOFError)
    assert box.loaded == []
    assert box.sent_all == ([False] if direction == SAVE else [])


def test_without_the_feature_both_fail(engine: Engine, device: EchoDevice) -> None:
    peer = Peer(engine, device)
    try:
        peer.negotiate()
        assert not peer.ask_u64(Request.GET_PROTOCOL_FEATURES) & ProtocolFeature.DEVICE_STATE
        assert peer.ask(Request.SET_DEVICE_STATE_FD, bytes(8)) == REFUSED
        assert peer.ask(Request.CHECK_DEVICE_STATE) == BAD
        works(peer)
    finally:
        peer.close()
