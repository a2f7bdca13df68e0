# SPDX-License-Identifier: Apache-2.0
"""Rules that every message follows, from a second table of the messages."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator

import pytest

from tests.support.peer import FEATURES, NEGOTIATED, PAGE, REGION, EchoDevice, Peer
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.interfaces import Keeper
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request, VringState

# What each message looks like when it is right: payload, descriptors, needed protocol feature,
# whether it has a reply of its own.
Valid = tuple[bytes, int, ProtocolFeature, bool]
NONE = ProtocolFeature(0)
MIGRATION = ProtocolFeature.LOG_SHMFD
MESSAGES: dict[Request, Valid] = {
    Request.GET_FEATURES: (b"", 0, NONE, True),
    Request.SET_FEATURES: (wire.pack_u64(FEATURES), 0, NONE, False),
    Request.SET_OWNER: (b"", 0, NONE, False),
    Request.RESET_OWNER: (b"", 0, NONE, False),
    Request.SET_MEM_TABLE: (wire.pack_memory_table([REGION]), 1, NONE, False),
    Request.SET_LOG_BASE: (wire.pack_u64(PAGE), 0, NONE, False),
    Request.SET_LOG_FD: (b"", 1, ProtocolFeature.LOG_SHMFD, False),
    Request.SET_VRING_NUM: (VringState(0, 8).pack(), 0, NONE, False),
    Request.SET_VRING_ADDR: (wire.VringAddress(0, 0, 0, 0, 0).pack(), 0, NONE, False),
    Request.SET_VRING_BASE: (VringState(0, 8).pack(), 0, NONE, False),
    Request.GET_VRING_BASE: (VringState(0, 0).pack(), 0, NONE, True),
    Request.SET_VRING_KICK: (wire.pack_u64(0), 1, NONE, False),
    Request.SET_VRING_CALL: (wire.pack_u64(0), 1, NONE, False),
    Request.SET_VRING_ERR: (wire.pack_u64(0), 1, NONE, False),
    Request.GET_PROTOCOL_FEATURES: (b"", 0, NONE, True),
    Request.SET_PROTOCOL_FEATURES: (wire.pack_u64(PROTOCOL_FEATURES), 0, NONE, False),
    Request.GET_QUEUE_NUM: (b"", 0, NONE, True),
    Request.SET_VRING_ENABLE: (VringState(0, 1).pack(), 0, NONE, False),
    Request.SET_BACKEND_REQ_FD: (b"", 1, NONE, False),
    Request.GET_CONFIG: (
        wire.Config(0, 6, 0, bytes(6)).pack(),
        0,
        ProtocolFeature.CONFIG,
        True,
    ),
    Request.GET_INFLIGHT_FD: (
        wire.InflightDescription(0, 0, 2, 8).pack(),
        0,
        ProtocolFeature.INFLIGHT_SHMFD,
        True,
    ),
    Request.SET_INFLIGHT_FD: (
        wire.InflightDescription(1024, 0, 2, 8).pack(),
        1,
        ProtocolFeature.INFLIGHT_SHMFD,
        False,
    ),
    Request.RESET_DEVICE: (b"", 0, ProtocolFeature.RESET_DEVICE, False),
    Request.GET_MAX_MEM_SLOTS: (b"", 0, ProtocolFeature.CONFIGURE_MEM_SLOTS, True),
    Request.ADD_MEM_REG: (
        wire.pack_single_region(REGION),
        1,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        False,
    ),
    Request.REM_MEM_REG: (
        wire.pack_single_region(REGION),
        0,
        ProtocolFeature.CONFIGURE_MEM_SLOTS,
        False,
    ),
    Request.SET_STATUS: (wire.pack_u64(1), 0, ProtocolFeature.STATUS, False),
    Request.GET_STATUS: (b"", 0, ProtocolFeature.STATUS, True),
}
WITH_ACK = [request for request, valid in MESSAGES.items() if not valid[3]]
WITH_REPLY = [request for request, valid in MESSAGES.items() if valid[3]]
WITH_FEATURE = [request for request, valid in MESSAGES.items() if valid[2]]
WITH_PAYLOAD = [request for request, valid in MESSAGES.items() if valid[0]]
WITH_FDS = [request for request, valid in MESSAGES.items() if valid[1]]
# These may carry one that is not used.
UNUSED_FD = (Request.REM_MEM_REG, Request.SET_LOG_BASE)
WITHOUT_FDS = [r for r, valid in MESSAGES.items() if not valid[1] and r not in UNUSED_FD]
WITH_VRING = [request for request in MESSAGES if "VRING" in request.name]
NAME = wire.request_name  # for the names of test cases


@pytest.fixture
def fresh(engine: Engine, device: EchoDevice, keeper: Keeper | None) -> Iterator[Peer]:
    """A connection of a back-end that offers everything."""
    peer = Peer(engine, device, keeper, PROTOCOL_FEATURES | MIGRATION)
    yield peer
    peer.close()


@pytest.fixture
def peer(fresh: Peer, request: pytest.FixtureRequest) -> Peer:
    """What is for migrations is negotiated only for the messages that need it."""
    about = request.node.callspec.params.get("request_")
    fresh.negotiate(NEGOTIATED | (MESSAGES[about][2] if about in MESSAGES else NONE))
    return fresh


@pytest.fixture
def descriptors(
    memfd: int, eventfds: list[int], _no_descriptor_leaks: None
) -> Iterator[Callable[[int], int]]:
    """A descriptor of the kind that a message wants."""
    near, far = socket.socketpair()

    def descriptor(request: int) -> int:
        if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG, Request.SET_INFLIGHT_FD):
            return memfd
        return near.fileno() if request == Request.SET_BACKEND_REQ_FD else eventfds[0]

    with near, far:
        yield descriptor


def valid(
    peer: Peer, request: Request, descriptors: Callable[[int], int]
) -> tuple[bytes, tuple[int, ...]]:
    """Payload and descriptors that are right, after what has to come before."""
    payload, fds, _, _ = MESSAGES[request]
    if request == Request.REM_MEM_REG:
        assert not peer.ack(Request.ADD_MEM_REG, payload, (descriptors(Request.ADD_MEM_REG),))
    return payload, (descriptors(request),) * fds


def refuses(peer: Peer, request: Request, payload: bytes, fds: tuple[int, ...]) -> None:
    """Check that it is refused by what can say so.

    A front-end that waits for a reply with content could take an acknowledgement for it, so
    that the connection has to end. GET_CONFIG has an error of its own.
    """
    if request == Request.GET_CONFIG:
        assert peer.ask(request, payload, fds) == b""
        assert peer.end is None
    elif request in WITH_REPLY:
        peer.ends(request.name, request, payload, fds, wire.FLAG_NEED_REPLY)
    else:
        peer.refused(request, payload, fds)


@pytest.mark.parametrize("request_", WITH_ACK, ids=NAME)
def test_valid_message_is_acknowledged(
    peer: Peer, descriptors: Callable[[int], int], request_: Request
) -> None:
    assert peer.ack(request_, *valid(peer, request_, descriptors)) == 0


@pytest.mark.parametrize("request_", WITH_ACK, ids=NAME)
def test_no_reply_unless_asked_for(
    peer: Peer, descriptors: Callable[[int], int], request_: Request
) -> None:
    assert peer.ask(request_, *valid(peer, request_, descriptors)) is None
    assert peer.end is None


@pytest.mark.parametrize("request_", WITH_REPLY, ids=NAME)
@pytest.mark.parametrize("flags", [0, wire.FLAG_NEED_REPLY], ids=["plain", "need-reply"])
def test_exactly_one_reply(
    peer: Peer, descriptors: Callable[[int], int], request_: Request, flags: int
) -> None:
    payload, fds = valid(peer, request_, descriptors)
    peer.send(request_, payload, fds, flags)
    assert peer.reply()
    assert peer.reply() is None
    assert peer.end is None


@pytest.mark.parametrize("request_", list(MESSAGES), ids=NAME)
@pytest.mark.parametrize("more", [1, 16, 4000])
def test_payload_too_long_is_refused(
    peer: Peer, descriptors: Callable[[int], int], request_: Request, more: int
) -> None:
    payload, fds = valid(peer, request_, descriptors)
    refuses(peer, request_, payload + bytes(more), fds)


@pytest.mark.parametrize("request_", WITH_PAYLOAD, ids=NAME)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_payload_too_short_is_refused(
    peer: Peer, descriptors: Callable[[int], int], request_: Request, left: int
) -> None:
    payload, fds = valid(peer, request_, descriptors)
    refuses(peer, request_, payload[:left], fds)


@pytest.mark.parametrize("request_", list(MESSAGES), ids=NAME)
@pytest.mark.parametrize("count", [2, 32, 33, 253])
def test_too_many_descriptors_are_refused(
    peer: Peer, descriptors: Callable[[int], int], request_: Request, count: int
) -> None:
    payload, _ = valid(peer, request_, descriptors)
    refuses(peer, request_, payload, (descriptors(request_),) * count)


@pytest.mark.parametrize("request_", WITHOUT_FDS, ids=NAME)
def test_unexpected_descriptor_is_refused(
    peer: Peer, descriptors: Callable[[int], int], request_: Request
) -> None:
    payload, _ = valid(peer, request_, descriptors)
    refuses(peer, request_, payload, (descriptors(request_),))


@pytest.mark.parametrize("request_", WITH_FDS, ids=NAME)
def test_missing_descriptor_is_refused(
    peer: Peer, descriptors: Callable[[int], int], request_: Request
) -> None:
    payload, _ = valid(peer, request_, descriptors)
    refuses(peer, request_, payload, ())


@pytest.mark.parametrize("request_", WITH_FEATURE, ids=NAME)
def test_message_needs_its_protocol_feature(
    fresh: Peer, descriptors: Callable[[int], int], request_: Request
) -> None:
    payload, fds, feature, _ = MESSAGES[request_]
    fresh.negotiate(PROTOCOL_FEATURES & ~feature)
    refuses(fresh, request_, payload, (descriptors(request_),) * fds)


@pytest.mark.parametrize("request_", WITH_VRING, ids=NAME)
@pytest.mark.parametrize("index", [2, 255])
def test_vring_index_out_of_range_is_refused(
    peer: Peer, descriptors: Callable[[int], int], request_: Request, index: int
) -> None:
    payload, fds = valid(peer, request_, descriptors)
    assert payload[0] == 0
    refuses(peer, request_, bytes([index]) + payload[1:], fds)


@pytest.mark.parametrize("request_", WITH_VRING, ids=NAME)
def test_second_vring_is_accepted(
    peer: Peer, descriptors: Callable[[int], int], request_: Request
) -> None:
    payload, fds = valid(peer, request_, descriptors)
    peer.send(request_, b"\1" + payload[1:], fds)
    assert peer.end is None


# Messages whose failure has a form of its own, with tests in other files.
ELSEWHERE = {Request.SET_CONFIG, Request.SET_DEVICE_STATE_FD, Request.CHECK_DEVICE_STATE}


@pytest.mark.parametrize("flags", [wire.FLAG_REPLY, 0x10, 0x8000_0000])
def test_invalid_flags_are_refused(peer: Peer, flags: int) -> None:
    peer.send(Request.SET_OWNER, flags=flags | wire.FLAG_NEED_REPLY)
    assert peer.reply() == wire.pack_u64(1)
    assert peer.ack(Request.SET_OWNER) == 0


@pytest.mark.parametrize(
    "request_",
    [0, 41, 44, 45, 0xFFFF_FFFF, *(set(Request) - set(MESSAGES) - ELSEWHERE)],
    ids=wire.request_name,
)
def test_unknown_message_is_refused(peer: Peer, eventfds: list[int], request_: int) -> None:
    peer.refused(request_)
    peer.refused(request_, bytes(100), (eventfds[0],))
    peer.ends("does not have this message", request_)
