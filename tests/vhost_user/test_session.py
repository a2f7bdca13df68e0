# SPDX-License-Identifier: Apache-2.0
"""The vhost-user state machine over a real socket, with real eventfds and guest memory."""

import errno
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from vhost_rpmb.daemon.server import EventLoop
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.messages import counter_request
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import PeerError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.store import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.session import PROTOCOL_FEATURES, Backend, Device, LimitedLog
from vhost_rpmb.vhost_user.wire import MemoryRegion, ProtocolFeature, Request, VringState
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio

FEATURES = 1 << virtio.VIRTIO_F_VERSION_1 | 1 << virtio.VIRTIO_F_EVENT_IDX
OFFERED = FEATURES | wire.F_PROTOCOL_FEATURES
PAGE = 4096
REGION = MemoryRegion(guest_address=0x10000, size=PAGE, user_address=0x7000_0000, mmap_offset=0)


class EchoDevice:
    """A device of two queues that answers nothing; it records what it is asked to do."""

    features = FEATURES
    num_queues = 2
    config = b"abcdef"

    def __init__(self) -> None:
        self.processed = 0
        self.queues: list[object] = []  # that were processed, in order
        self.resets = 0
        self.flags: list[int] = []  # what process() returns next

    def process(self, queue: object) -> int:
        self.processed += 1
        self.queues.append(queue)
        return self.flags.pop(0) if self.flags else 0

    def reset(self) -> None:
        self.resets += 1


class Peer:
    """The front-end's end of a connection to a `Backend`, which is driven by a real event loop."""

    def __init__(self, engine: Engine, device: Device) -> None:
        self.sock, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.setblocking(False)
        self.reader = wire.MessageReader(self.sock)
        self.loop = EventLoop()
        self.log = LimitedLog(logging.getLogger("vhost_rpmb.test"))
        self.backend = Backend(far, device, engine, self.loop, self.log)
        self.end: Exception | None = None
        self._attention = os.eventfd(1)
        self._far = far.fileno()
        self._watched = True
        self.loop.add(self._far, self._receive)

    def _receive(self) -> None:
        try:
            self.backend.receive()
        except (EOFError, PeerError) as error:
            self.end = error
            self._disconnect()

    def _disconnect(self) -> None:
        if self._watched:
            self._watched = False
            self.loop.remove(self._far)
            self.backend.close()

    def close(self) -> None:
        if self._attention < 0:
            return
        self._disconnect()
        os.close(self._attention)
        self._attention = -1
        self.loop.close()
        self.reader.close()
        self.sock.close()

    def run(self) -> None:
        """Let the vrings be served, with something else that wants attention all the time."""
        self.loop.add(self._attention, lambda: None)
        self.backend.run()
        self.loop.remove(self._attention)

    def settle(self, rounds: int = 1000) -> int:
        """Run the loop until nothing happens any more; return how often it turned."""
        for turn in range(rounds):
            happened = self.loop.wait(0)
            pending = self.backend.pending
            self.run()
            if not happened and not pending:
                return turn
        raise AssertionError("the back-end does not come to rest")

    def send(
        self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), flags: int = 0
    ) -> None:
        wire.send_message(self.sock, request, flags, payload, fds)
        self.settle()

    def reply(self) -> bytes | None:
        """The payload of the next reply, None if there is none."""
        message = self.reader.read()
        if message is None:
            return None
        assert message.flags == wire.FLAG_REPLY | wire.VERSION
        assert not message.fds
        return message.payload

    def ask(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bytes | None:
        self.send(request, payload, fds)
        return self.reply()

    def ask_u64(self, request: int) -> int:
        reply = self.ask(request)
        assert reply is not None
        return wire.unpack_u64(reply)

    def ack(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> int:
        """Send with NEED_REPLY; return what the acknowledgement says."""
        self.send(request, payload, fds, wire.FLAG_NEED_REPLY)
        message = self.reader.read()
        assert message is not None, f"no acknowledgement ({self.end})"
        assert message.request == request
        assert message.flags == wire.FLAG_REPLY | wire.VERSION
        return wire.unpack_u64(message.payload)

    def refused(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = ()) -> None:
        """Check that a message is refused, and that the connection survives."""
        assert self.ack(request, payload, fds) != 0
        assert self.end is None
        assert self.ask_u64(Request.GET_FEATURES) == OFFERED

    def ends(
        self,
        reason: str,
        request: int,
        payload: bytes = b"",
        fds: tuple[int, ...] = (),
        flags: int = 0,
    ) -> None:
        """Check that a message ends the connection for this reason, without an answer."""
        self.send(request, payload, fds, flags)
        assert isinstance(self.end, PeerError)
        assert reason in str(self.end)
        with pytest.raises(EOFError):
            self.reader.read()

    def negotiate(self, protocol_features: int = PROTOCOL_FEATURES) -> None:
        self.send(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(protocol_features))
        self.send(Request.SET_FEATURES, wire.pack_u64(OFFERED))
        assert self.end is None

    def share(self, memory: GuestMemory) -> None:
        for region in memory.regions:
            assert not self.ack(
                Request.ADD_MEM_REG, wire.pack_single_region(region.place), (region.fd,)
            )

    def configure(self, ring: Ring, index: int = 0, base: int = 0) -> None:
        """Size, base and addresses of a vring."""
        assert not self.ack(Request.SET_VRING_NUM, VringState(index, ring.size).pack())
        assert not self.ack(Request.SET_VRING_BASE, VringState(index, base).pack())
        assert not self.ack(Request.SET_VRING_ADDR, addresses(ring, index).pack())

    def start(self, ring: Ring, index: int = 0, base: int = 0) -> None:
        """All that makes a vring run."""
        self.configure(ring, index, base)
        payload = wire.pack_u64(index)
        assert not self.ack(Request.SET_VRING_CALL, payload, (ring.call_fd,))
        assert not self.ack(Request.SET_VRING_ERR, payload, (ring.error_fd,))
        assert not self.ack(Request.SET_VRING_KICK, payload, (ring.kick_fd,))
        assert not self.ack(Request.SET_VRING_ENABLE, VringState(index, 1).pack())


def addresses(ring: Ring, index: int = 0, flags: int = 0) -> wire.VringAddress:
    user = ring.memory.user_address
    return wire.VringAddress(
        index, flags, user(ring.descriptor_table), user(ring.used_ring), user(ring.available_ring)
    )


def message(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    """The bytes of a message, to be sent in other slices than one."""
    return struct.pack("=III", request, flags | wire.VERSION, len(payload)) + payload


def open_fds() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def signalled(fd: int) -> bool:
    """Take the signal of an eventfd."""
    try:
        return os.eventfd_read(fd) > 0
    except BlockingIOError:
        return False


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def device() -> EchoDevice:
    return EchoDevice()


@pytest.fixture
def fresh(engine: Engine, device: EchoDevice, _no_descriptor_leaks: None) -> Iterator[Peer]:
    """A connection on which nothing was said yet."""
    peer = Peer(engine, device)
    yield peer
    peer.close()


@pytest.fixture
def peer(fresh: Peer) -> Peer:
    """A connection with everything negotiated."""
    fresh.negotiate()
    return fresh


@pytest.fixture
def memory(_no_descriptor_leaks: None) -> Iterator[GuestMemory]:
    with GuestMemory() as memory:
        yield memory


@pytest.fixture
def ring(memory: GuestMemory) -> Iterator[Ring]:
    with Ring(memory, 8) as ring:
        yield ring


@pytest.fixture
def eventfds(_no_descriptor_leaks: None) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    yield fds
    wire.close_fds(fds)


@pytest.fixture
def memfd(_no_descriptor_leaks: None) -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)


def backend_regions(peer: Peer) -> tuple[tuple[int, int, int], ...]:
    return peer.backend._memory.regions


# What each message looks like when it is right: payload, descriptors, needed protocol feature,
# whether it has a reply of its own.
Good = tuple[bytes, int, ProtocolFeature, bool]
NONE = ProtocolFeature(0)
MESSAGES: dict[Request, Good] = {
    Request.GET_FEATURES: (b"", 0, NONE, True),
    Request.SET_FEATURES: (wire.pack_u64(FEATURES), 0, NONE, False),
    Request.SET_OWNER: (b"", 0, NONE, False),
    Request.RESET_OWNER: (b"", 0, NONE, False),
    Request.SET_MEM_TABLE: (wire.pack_memory_table([REGION]), 1, NONE, False),
    Request.SET_LOG_BASE: (wire.pack_u64(PAGE), 0, NONE, False),
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
    Request.SET_BACKEND_REQ_FD: (b"", 1, ProtocolFeature.BACKEND_REQ, False),
    Request.GET_CONFIG: (
        wire.Config(0, 6, 0, bytes(6)).pack(),
        0,
        ProtocolFeature.CONFIG,
        True,
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
WITH_ACK = [request for request, good in MESSAGES.items() if not good[3]]
WITH_REPLY = [request for request, good in MESSAGES.items() if good[3]]
WITH_FEATURE = [request for request, good in MESSAGES.items() if good[2]]
WITH_PAYLOAD = [request for request, good in MESSAGES.items() if good[0]]
WITH_FDS = [request for request, good in MESSAGES.items() if good[1]]
# These may carry one that is not used.
UNUSED_FD = (Request.REM_MEM_REG, Request.SET_LOG_BASE)
WITHOUT_FDS = [r for r, good in MESSAGES.items() if not good[1] and r not in UNUSED_FD]
WITH_VRING = [request for request in MESSAGES if "VRING" in request.name]
NAME = wire.request_name  # for the names of test cases


@pytest.fixture
def descriptors(
    memfd: int, eventfds: list[int], _no_descriptor_leaks: None
) -> Iterator[Callable[[int], int]]:
    """A descriptor of the kind that a message wants."""
    near, far = socket.socketpair()

    def descriptor(request: int) -> int:
        if request in (Request.SET_MEM_TABLE, Request.ADD_MEM_REG):
            return memfd
        return near.fileno() if request == Request.SET_BACKEND_REQ_FD else eventfds[0]

    with near, far:
        yield descriptor


class TestEveryMessage:
    """What holds for all of them, from a second table of what they look like."""

    def good(
        self, peer: Peer, request: Request, descriptors: Callable[[int], int]
    ) -> tuple[bytes, tuple[int, ...]]:
        """Payload and descriptors that are right, after what has to come before."""
        payload, fds, _, _ = MESSAGES[request]
        if request == Request.REM_MEM_REG:
            assert not peer.ack(Request.ADD_MEM_REG, payload, (descriptors(Request.ADD_MEM_REG),))
        return payload, (descriptors(request),) * fds

    def fails(self, peer: Peer, request: Request, payload: bytes, fds: tuple[int, ...]) -> None:
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
    def test_acknowledged(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request
    ) -> None:
        assert peer.ack(request_, *self.good(peer, request_, descriptors)) == 0

    @pytest.mark.parametrize("request_", WITH_ACK, ids=NAME)
    def test_no_reply_unless_asked_for(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request
    ) -> None:
        assert peer.ask(request_, *self.good(peer, request_, descriptors)) is None
        assert peer.end is None

    @pytest.mark.parametrize("request_", WITH_REPLY, ids=NAME)
    @pytest.mark.parametrize("flags", [0, wire.FLAG_NEED_REPLY], ids=["plain", "need-reply"])
    def test_exactly_one_reply(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request, flags: int
    ) -> None:
        payload, fds = self.good(peer, request_, descriptors)
        peer.send(request_, payload, fds, flags)
        assert peer.reply()
        assert peer.reply() is None
        assert peer.end is None

    @pytest.mark.parametrize("request_", list(MESSAGES), ids=NAME)
    @pytest.mark.parametrize("more", [1, 16, 4000])
    def test_too_long(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request, more: int
    ) -> None:
        payload, fds = self.good(peer, request_, descriptors)
        self.fails(peer, request_, payload + bytes(more), fds)

    @pytest.mark.parametrize("request_", WITH_PAYLOAD, ids=NAME)
    @pytest.mark.parametrize("left", [0, 1, -1])
    def test_too_short(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request, left: int
    ) -> None:
        payload, fds = self.good(peer, request_, descriptors)
        self.fails(peer, request_, payload[:left], fds)

    @pytest.mark.parametrize("request_", list(MESSAGES), ids=NAME)
    @pytest.mark.parametrize("count", [2, 32, 33, 253])
    def test_too_many_descriptors(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request, count: int
    ) -> None:
        payload, _ = self.good(peer, request_, descriptors)
        self.fails(peer, request_, payload, (descriptors(request_),) * count)

    @pytest.mark.parametrize("request_", WITHOUT_FDS, ids=NAME)
    def test_one_descriptor_too_many(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request
    ) -> None:
        payload, _ = self.good(peer, request_, descriptors)
        self.fails(peer, request_, payload, (descriptors(request_),))

    @pytest.mark.parametrize("request_", WITH_FDS, ids=NAME)
    def test_missing_descriptor(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request
    ) -> None:
        payload, _ = self.good(peer, request_, descriptors)
        self.fails(peer, request_, payload, ())

    @pytest.mark.parametrize("request_", WITH_FEATURE, ids=NAME)
    def test_feature_not_negotiated(
        self, fresh: Peer, descriptors: Callable[[int], int], request_: Request
    ) -> None:
        payload, fds, feature, _ = MESSAGES[request_]
        fresh.negotiate(PROTOCOL_FEATURES & ~feature)
        self.fails(fresh, request_, payload, (descriptors(request_),) * fds)

    @pytest.mark.parametrize("request_", WITH_VRING, ids=NAME)
    @pytest.mark.parametrize("index", [2, 255])
    def test_vring_that_is_not_there(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request, index: int
    ) -> None:
        payload, fds = self.good(peer, request_, descriptors)
        assert payload[0] == 0
        self.fails(peer, request_, bytes([index]) + payload[1:], fds)

    @pytest.mark.parametrize("request_", WITH_VRING, ids=NAME)
    def test_second_vring(
        self, peer: Peer, descriptors: Callable[[int], int], request_: Request
    ) -> None:
        payload, fds = self.good(peer, request_, descriptors)
        peer.send(request_, b"\1" + payload[1:], fds)
        assert peer.end is None

    @pytest.mark.parametrize("flags", [wire.FLAG_REPLY, 0x10, 0x8000_0000])
    def test_flags_that_a_request_cannot_have(self, peer: Peer, flags: int) -> None:
        peer.send(Request.SET_OWNER, flags=flags | wire.FLAG_NEED_REPLY)
        assert peer.reply() == wire.pack_u64(1)
        assert peer.ack(Request.SET_OWNER) == 0

    @pytest.mark.parametrize(
        "request_",
        [0, 41, 44, 45, 0xFFFF_FFFF, *(set(Request) - set(MESSAGES) - {Request.SET_CONFIG})],
        ids=wire.request_name,
    )
    def test_unknown(self, peer: Peer, eventfds: list[int], request_: int) -> None:
        peer.refused(request_)
        peer.refused(request_, bytes(100), (eventfds[0],))
        peer.ends("does not have this message", request_)


class TestFailure:
    """How a failure is told to the front-end."""

    def test_without_need_reply(self, peer: Peer) -> None:
        peer.ends("SET_VRING_NUM: a queue size", Request.SET_VRING_NUM, VringState(0, 3).pack())

    def test_without_reply_ack(self, fresh: Peer) -> None:
        fresh.negotiate(PROTOCOL_FEATURES & ~ProtocolFeature.REPLY_ACK)
        fresh.ends(
            "SET_VRING_NUM: a queue size",
            Request.SET_VRING_NUM,
            VringState(0, 3).pack(),
            flags=wire.FLAG_NEED_REPLY,
        )

    def test_success_without_reply_ack(self, fresh: Peer) -> None:
        fresh.send(Request.SET_OWNER, flags=wire.FLAG_NEED_REPLY)
        assert fresh.reply() is None
        assert fresh.end is None

    def test_reply_ack_holds_from_its_negotiation_on(self, fresh: Peer) -> None:
        payload = wire.pack_u64(PROTOCOL_FEATURES)
        assert fresh.ack(Request.SET_PROTOCOL_FEATURES, payload) == 0

    def test_reason_is_logged(self, peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
        peer.refused(Request.SET_VRING_NUM, VringState(0, 3).pack())
        assert [record.getMessage() for record in caplog.records] == [
            "refused SET_VRING_NUM: a queue size is a power of two from 1 to 32768, not 3"
        ]

    def test_flood_of_failures_is_logged_once(
        self, peer: Peer, caplog: pytest.LogCaptureFixture
    ) -> None:
        for number in range(500):
            assert peer.ack(1000 + number) == 1
        assert len(caplog.records) == 1

    def test_front_end_that_reads_no_replies(self, peer: Peer) -> None:
        with suppress(BrokenPipeError):
            while peer.end is None:
                peer.send(Request.GET_FEATURES)
        assert isinstance(peer.end, PeerError)
        assert "does not read the replies" in str(peer.end)

    def test_front_end_gone_before_the_reply(self, peer: Peer) -> None:
        wire.send_message(peer.sock, Request.GET_FEATURES)
        peer.sock.close()
        peer.settle()
        assert isinstance(peer.end, EOFError)


class TestStream:
    def test_byte_by_byte(self, peer: Peer, eventfds: list[int]) -> None:
        data = message(Request.SET_VRING_KICK, wire.pack_u64(1), wire.FLAG_NEED_REPLY)
        socket.send_fds(peer.sock, [data[:1]], [eventfds[0]])
        for offset in range(1, len(data)):
            peer.settle()
            assert peer.reply() is None
            peer.sock.send(data[offset : offset + 1])
        peer.settle()
        assert peer.reply() == wire.pack_u64(0)

    def test_many_messages_in_one_send(self, peer: Peer) -> None:
        peer.sock.sendall(message(Request.GET_STATUS) * 200)
        peer.settle()
        for _ in range(200):
            assert peer.reply() == wire.pack_u64(0)
        assert peer.reply() is None

    def test_messages_do_not_starve_vrings(
        self, peer: Peer, ring: Ring, memory: GuestMemory, device: EchoDevice
    ) -> None:
        peer.share(memory)
        peer.start(ring)
        before = device.processed
        peer.sock.sendall(message(Request.SET_STATUS, wire.pack_u64(4)) * 1000)
        peer.sock.sendall(message(Request.GET_STATUS))
        ring.kick()
        peer.loop.wait(0)
        peer.run()
        assert device.processed == before + 1
        assert peer.reply() is None  # the messages are not through yet
        peer.settle()
        assert peer.reply() == wire.pack_u64(4)

    def test_end_in_the_middle_of_a_message(self, peer: Peer, eventfds: list[int]) -> None:
        socket.send_fds(peer.sock, [message(Request.SET_VRING_KICK)[:5]], eventfds)
        peer.sock.close()
        peer.settle()
        assert isinstance(peer.end, EOFError)

    def test_other_protocol_version(self, peer: Peer) -> None:
        peer.sock.sendall(struct.pack("=III", Request.GET_FEATURES, 2, 0))
        peer.settle()
        assert isinstance(peer.end, PeerError)


class TestNegotiation:
    def test_offer(self, fresh: Peer) -> None:
        assert fresh.ask_u64(Request.GET_FEATURES) == OFFERED
        assert fresh.ask_u64(Request.GET_PROTOCOL_FEATURES) == PROTOCOL_FEATURES

    @pytest.mark.parametrize("bit", [0, virtio.VIRTIO_F_INDIRECT_DESC, 34, 63])
    def test_feature_that_was_not_offered(self, peer: Peer, bit: int) -> None:
        peer.refused(Request.SET_FEATURES, wire.pack_u64(OFFERED | 1 << bit))

    def test_log_all_is_accepted_without_an_offer(self, peer: Peer) -> None:
        assert not OFFERED & wire.F_LOG_ALL
        assert peer.ack(Request.SET_FEATURES, wire.pack_u64(OFFERED | wire.F_LOG_ALL)) == 0
        assert peer.ack(Request.SET_FEATURES, wire.pack_u64(OFFERED)) == 0

    @pytest.mark.parametrize("bit", [1, 8, 14, 17, 19, 22, 40, 63])
    def test_protocol_feature_that_was_not_offered(self, peer: Peer, bit: int) -> None:
        peer.refused(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(1 << bit))
        assert peer.ask(Request.GET_MAX_MEM_SLOTS)  # what was negotiated before still is

    def test_queue_num(self, fresh: Peer) -> None:
        assert fresh.ask_u64(Request.GET_QUEUE_NUM) == 2

    def test_owner(self, peer: Peer) -> None:
        assert peer.ack(Request.SET_OWNER) == 0
        peer.refused(Request.SET_OWNER)
        assert peer.ack(Request.RESET_OWNER) == 0
        assert peer.ack(Request.SET_OWNER) == 0


class TestConfig:
    @pytest.mark.parametrize(("offset", "size"), [(0, 6), (0, 3), (3, 3), (5, 1), (0, 0), (6, 0)])
    def test_within(self, peer: Peer, offset: int, size: int) -> None:
        reply = peer.ask(Request.GET_CONFIG, wire.Config(offset, size, 0, bytes(size)).pack())
        expected = EchoDevice.config[offset : offset + size]
        assert reply == wire.Config(offset, size, 0, expected).pack()

    @pytest.mark.parametrize(
        ("offset", "size"),
        [(0, 7), (0, 256), (5, 2), (6, 1), (7, 0), (100, 56), (255, 1), (256, 0)],
    )
    def test_zeros_beyond_the_config_space(self, peer: Peer, offset: int, size: int) -> None:
        reply = peer.ask(Request.GET_CONFIG, wire.Config(offset, size, 0, bytes(size)).pack())
        expected = (EchoDevice.config + bytes(250))[offset : offset + size]
        assert reply == wire.Config(offset, size, 0, expected).pack()

    @pytest.mark.parametrize(
        ("offset", "size"), [(0, 257), (256, 1), (257, 0), (0xFFFF_FFFF, 1), (0xFFFF_FFFF, 0)]
    )
    def test_beyond_the_largest_config_space(self, peer: Peer, offset: int, size: int) -> None:
        asked = wire.Config(offset, size, 0, bytes(size)).pack()
        assert peer.ask(Request.GET_CONFIG, asked) == b""
        assert peer.end is None

    def test_size_that_is_not_the_payloads(self, peer: Peer) -> None:
        assert peer.ask(Request.GET_CONFIG, wire.Config(0, 3, 0, b"1234").pack()) == b""

    @pytest.mark.parametrize("flags", [wire.CONFIG_FLAG_WRITABLE, wire.CONFIG_FLAG_LIVE_MIGRATION])
    def test_read_only(self, peer: Peer, flags: int) -> None:
        peer.refused(Request.SET_CONFIG, wire.Config(0, 1, flags, b"x").pack())
        whole = wire.Config(0, 6, 0, bytes(6)).pack()
        assert peer.ask(Request.GET_CONFIG, whole) == wire.Config(0, 6, 0, b"abcdef").pack()


class TestMemory:
    def regions(self, peer: Peer) -> tuple[tuple[int, int, int], ...]:
        return peer.backend._memory.regions

    def places(self, count: int) -> list[MemoryRegion]:
        return [REGION._replace(guest_address=(2 * n + 1) * PAGE) for n in range(count)]

    def test_slots(self, peer: Peer, memfd: int) -> None:
        slots = peer.ask_u64(Request.GET_MAX_MEM_SLOTS)
        assert slots == 509
        places = self.places(slots + 1)
        for place in places[:-1]:
            assert peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(place), (memfd,)) == 0
        peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(places[-1]), (memfd,))
        assert len(self.regions(peer)) == slots

    def test_table(self, peer: Peer, memfd: int) -> None:
        places = self.places(32)
        table = wire.pack_memory_table(places)
        assert peer.ack(Request.SET_MEM_TABLE, table, (memfd,) * 32) == 0
        assert self.regions(peer) == tuple(place[:3] for place in places)

    def test_table_replaces(self, peer: Peer, memfd: int) -> None:
        for place in self.places(3):
            table = wire.pack_memory_table([place])
            assert peer.ack(Request.SET_MEM_TABLE, table, (memfd,)) == 0
            assert self.regions(peer) == (place[:3],)
        assert peer.ack(Request.SET_MEM_TABLE, wire.pack_memory_table([])) == 0
        assert self.regions(peer) == ()

    @pytest.mark.parametrize(
        "wrong",
        [
            REGION._replace(guest_address=0xFFF0_0000, size=0),
            REGION._replace(guest_address=REGION.guest_address + 100),
            REGION._replace(guest_address=0xFFF0_0000, mmap_offset=16 * PAGE),
            REGION._replace(guest_address=0xFFF0_0000, mmap_offset=1 << 63),
            REGION._replace(guest_address=(1 << 64) - PAGE // 2),
            REGION._replace(guest_address=0xFFF0_0000, user_address=(1 << 64) - 1),
        ],
        ids=["empty", "overlap", "past-the-end", "offset", "wraps", "user-address-wraps"],
    )
    def test_wrong_region_changes_nothing(
        self, peer: Peer, memfd: int, wrong: MemoryRegion
    ) -> None:
        good = REGION
        assert peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(good), (memfd,)) == 0
        peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(wrong), (memfd,))
        assert self.regions(peer) == (good[:3],)
        table = wire.pack_memory_table([good, wrong])
        peer.refused(Request.SET_MEM_TABLE, table, (memfd, memfd))
        assert self.regions(peer) == (good[:3],)

    def test_descriptor_that_cannot_be_mapped(self, peer: Peer, eventfds: list[int]) -> None:
        fds = (eventfds[0],)
        peer.refused(Request.ADD_MEM_REG, wire.pack_single_region(REGION), fds)
        peer.refused(Request.SET_MEM_TABLE, wire.pack_memory_table([REGION]), fds)
        assert self.regions(peer) == ()

    @pytest.mark.parametrize("count", [0, 1, 3])
    def test_table_with_another_number_of_descriptors(
        self, peer: Peer, memfd: int, count: int, caplog: pytest.LogCaptureFixture
    ) -> None:
        table = wire.pack_memory_table(self.places(2))
        peer.refused(Request.SET_MEM_TABLE, table, (memfd,) * count)
        assert self.regions(peer) == ()
        assert f"for each of 2 memory regions, found {count}" in caplog.text

    def test_table_of_which_descriptors_were_lost(self, peer: Peer, memfd: int) -> None:
        table = wire.pack_memory_table(self.places(32))
        peer.refused(Request.SET_MEM_TABLE, table, (memfd,) * 40)
        assert self.regions(peer) == ()

    @pytest.mark.parametrize("fds", [0, 1])
    def test_remove(self, peer: Peer, memfd: int, fds: int) -> None:
        for place in self.places(2):
            assert not peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(place), (memfd,))
        first, second = self.places(2)
        ignored = wire.pack_single_region(first._replace(mmap_offset=77))
        assert peer.ack(Request.REM_MEM_REG, ignored, (memfd,) * fds) == 0
        assert self.regions(peer) == (second[:3],)

    @pytest.mark.parametrize("field", ["guest_address", "size", "user_address"])
    def test_remove_what_is_not_there(self, peer: Peer, memfd: int, field: str) -> None:
        assert not peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(REGION), (memfd,))
        other = REGION._replace(**{field: 0x5000})
        peer.refused(Request.REM_MEM_REG, wire.pack_single_region(other))
        assert self.regions(peer) == (REGION[:3],)

    def test_unmapped_at_the_end(self, peer: Peer, engine: Engine) -> None:
        fd = os.memfd_create("unmapped-at-the-end")
        os.ftruncate(fd, PAGE)
        assert not peer.ack(Request.ADD_MEM_REG, wire.pack_single_region(REGION), (fd,))
        os.close(fd)
        assert "unmapped-at-the-end" in Path("/proc/self/maps").read_text()
        peer.close()
        assert "unmapped-at-the-end" not in Path("/proc/self/maps").read_text()


class TestVringSettings:
    @pytest.mark.parametrize("size", [1, 64, 32768])
    def test_size(self, peer: Peer, size: int) -> None:
        assert peer.ack(Request.SET_VRING_NUM, VringState(0, size).pack()) == 0

    @pytest.mark.parametrize("size", [0, 3, 65536, 0xFFFF_FFFF])
    def test_wrong_size(self, peer: Peer, size: int) -> None:
        peer.refused(Request.SET_VRING_NUM, VringState(0, size).pack())

    @pytest.mark.parametrize("base", [0, 1, 0xFFFF])
    def test_base(self, peer: Peer, base: int) -> None:
        assert peer.ack(Request.SET_VRING_BASE, VringState(1, base).pack()) == 0
        reply = peer.ask(Request.GET_VRING_BASE, VringState(1, 0).pack())
        assert reply == VringState(1, base).pack()
        assert peer.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 0).pack()

    @pytest.mark.parametrize("base", [0x10000, 0xFFFF_FFFF])
    def test_wrong_base(self, peer: Peer, base: int) -> None:
        peer.refused(Request.SET_VRING_BASE, VringState(0, base).pack())

    def test_log_flag(self, peer: Peer) -> None:
        assert peer.ack(Request.SET_VRING_ADDR, wire.VringAddress(0, 1, 0, 0, 0, 9).pack()) == 0

    @pytest.mark.parametrize("flags", [2, 3, 0x8000_0000])
    def test_other_flags(self, peer: Peer, flags: int) -> None:
        peer.refused(Request.SET_VRING_ADDR, wire.VringAddress(0, flags, 0, 0, 0).pack())

    @pytest.mark.parametrize("value", [2, 0xFFFF_FFFF])
    def test_enable_is_a_truth_value(self, peer: Peer, value: int) -> None:
        peer.refused(Request.SET_VRING_ENABLE, VringState(0, value).pack())

    def test_enable_needs_protocol_features(self, fresh: Peer) -> None:
        fresh.negotiate()
        assert fresh.ack(Request.SET_FEATURES, wire.pack_u64(FEATURES)) == 0
        fresh.refused(Request.SET_VRING_ENABLE, VringState(0, 1).pack())

    @pytest.mark.parametrize(
        "request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
    )
    def test_event_descriptors(self, peer: Peer, eventfds: list[int], request_: Request) -> None:
        no_fd = wire.pack_u64(wire.VRING_NO_FD)
        peer.refused(request_, no_fd, (eventfds[0],))
        peer.refused(request_, wire.pack_u64(0x200), (eventfds[0],))
        peer.refused(request_, wire.pack_u64(1 << 63), (eventfds[0],))
        assert peer.ack(request_, wire.pack_u64(0), (eventfds[0],)) == 0
        assert peer.ack(request_, wire.pack_u64(0), (eventfds[0],)) == 0
        if request_ == Request.SET_VRING_KICK:
            peer.refused(request_, no_fd)  # polling is not served
        else:
            assert peer.ack(request_, no_fd) == 0


class TestRunning:
    """When a vring is processed, and when not."""

    @pytest.fixture
    def set_up(self, peer: Peer, memory: GuestMemory, ring: Ring) -> Peer:
        """Everything is there but that the vring is running."""
        peer.share(memory)
        peer.start(ring)
        assert not peer.ack(Request.SET_VRING_ENABLE, VringState(0, 0).pack())
        signalled(ring.call_fd)
        return peer

    @pytest.fixture
    def running(self, set_up: Peer, ring: Ring, device: EchoDevice) -> Peer:
        assert not set_up.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        signalled(ring.call_fd)
        device.processed = 0
        return set_up

    @pytest.mark.parametrize("last", range(4))
    def test_starts_with_the_last_thing_it_needs(
        self, peer: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice, last: int
    ) -> None:
        peer.share(memory)
        steps: list[tuple[Request, bytes, tuple[int, ...]]] = [
            (Request.SET_VRING_NUM, VringState(0, ring.size).pack(), ()),
            (Request.SET_VRING_ADDR, addresses(ring).pack(), ()),
            (Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,)),
            (Request.SET_VRING_ENABLE, VringState(0, 1).pack(), ()),
        ]
        assert not peer.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (ring.call_fd,))
        final = steps.pop(last)
        for step in steps:
            assert not peer.ack(*step)
        ring.kick()
        peer.settle()
        assert device.processed == 0
        assert not signalled(ring.call_fd)
        assert not peer.ack(*final)
        peer.settle()
        assert device.processed >= 1
        assert signalled(ring.call_fd)

    def test_look_without_a_kick(self, set_up: Peer, ring: Ring, device: EchoDevice) -> None:
        device.processed = 0
        assert not set_up.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        set_up.settle()
        assert device.processed == 1
        assert signalled(ring.call_fd)
        assert not set_up.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        set_up.settle()
        assert device.processed == 1  # it ran already

    def test_without_protocol_features_it_is_enabled_from_the_start(
        self, fresh: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice
    ) -> None:
        fresh.negotiate()
        assert not fresh.ack(Request.SET_FEATURES, wire.pack_u64(FEATURES))
        fresh.share(memory)
        fresh.configure(ring)
        assert device.processed == 0
        assert not fresh.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        assert device.processed == 1

    def test_kick(self, running: Peer, ring: Ring, device: EchoDevice) -> None:
        for count in range(1, 50):
            ring.kick()
            running.settle()
            assert device.processed == count
        assert not signalled(ring.call_fd)

    def test_notification(
        self, running: Peer, ring: Ring, device: EchoDevice, engine: Engine
    ) -> None:
        device.flags = [engine.NOTIFY]
        ring.kick()
        running.settle()
        assert signalled(ring.call_fd)
        assert not signalled(ring.error_fd)

    def test_more_is_processed_after_other_events(
        self, running: Peer, ring: Ring, device: EchoDevice, engine: Engine
    ) -> None:
        device.flags = [engine.MORE] * 5
        ring.kick()
        running.loop.wait(0)
        for count in range(1, 6):
            running.run()
            assert device.processed == count
            assert running.backend.pending
        wire.send_message(running.sock, Request.GET_STATUS)
        running.loop.wait(0)
        assert running.reply() is not None
        running.run()
        assert device.processed == 6
        assert not running.backend.pending

    def test_endless_more_ends_when_the_vring_is_stopped(
        self, running: Peer, ring: Ring, device: EchoDevice, engine: Engine
    ) -> None:
        device.flags = [engine.MORE] * 1000
        ring.kick()
        wire.send_message(running.sock, Request.GET_VRING_BASE, 0, bytes(8))
        running.settle(rounds=10)
        assert len(device.flags) > 990
        assert running.reply() == VringState(0, 0).pack()

    @pytest.mark.parametrize(
        ("request_", "payload"),
        [
            (Request.SET_VRING_ENABLE, VringState(0, 0).pack()),
            (Request.RESET_OWNER, b""),
            (Request.SET_STATUS, wire.pack_u64(0)),
            (Request.RESET_DEVICE, b""),
        ],
        ids=["disable", "reset-owner", "status-0", "reset-device"],
    )
    def test_stopped(
        self, running: Peer, ring: Ring, device: EchoDevice, request_: Request, payload: bytes
    ) -> None:
        assert not running.ack(request_, payload)
        ring.kick()
        running.settle()
        assert device.processed == 0

    def test_stopped_by_get_vring_base(
        self, running: Peer, ring: Ring, device: EchoDevice, memory: GuestMemory
    ) -> None:
        assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
        ring.kick()
        running.settle()
        assert device.processed == 0
        # A new kick descriptor is all that it needs to go on.
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        assert device.processed >= 1
        assert signalled(ring.call_fd)

    def test_reset_forgets_the_vrings_settings(
        self, running: Peer, ring: Ring, device: EchoDevice
    ) -> None:
        assert not running.ack(Request.SET_VRING_BASE, VringState(1, 9).pack())
        assert not running.ack(Request.SET_STATUS, wire.pack_u64(0))
        assert running.ask(Request.GET_VRING_BASE, VringState(1, 0).pack()) == bytes([1]) + bytes(7)
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        assert not running.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        assert device.processed == 0
        running.start(ring)
        assert device.processed >= 1

    def test_enabled_after_a_reset(self, running: Peer, ring: Ring, device: EchoDevice) -> None:
        """As in the beginning: only without protocol features, as there is no message for it."""
        for features, processed in ((OFFERED, 0), (FEATURES, 1)):
            assert not running.ack(Request.SET_FEATURES, wire.pack_u64(features))
            assert not running.ack(Request.RESET_DEVICE)
            device.processed = 0
            assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
            running.configure(ring)
            assert bool(device.processed) == processed

    def test_size_and_base_of_a_running_vring(self, running: Peer, ring: Ring) -> None:
        running.refused(Request.SET_VRING_NUM, VringState(0, 8).pack())
        running.refused(Request.SET_VRING_BASE, VringState(0, 0).pack())
        assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
        assert not running.ack(Request.SET_VRING_NUM, VringState(0, 8).pack())
        assert not running.ack(Request.SET_VRING_BASE, VringState(0, 3).pack())

    def test_addresses_of_a_running_vring(self, running: Peer) -> None:
        assert not running.ack(Request.SET_VRING_ADDR, wire.VringAddress(0, 0, 0, 0, 0).pack())

    def test_new_kick_descriptor(
        self, running: Peer, ring: Ring, device: EchoDevice, eventfds: list[int]
    ) -> None:
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
        device.processed = 0
        ring.kick()
        running.settle()
        assert device.processed == 0
        os.eventfd_write(eventfds[0], 1)
        running.settle()
        assert device.processed == 1

    def test_new_call_descriptor_is_signalled(
        self, running: Peer, ring: Ring, device: EchoDevice, eventfds: list[int], engine: Engine
    ) -> None:
        assert not running.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (eventfds[0],))
        assert signalled(eventfds[0])
        device.flags = [engine.NOTIFY]
        ring.kick()
        running.settle()
        assert signalled(eventfds[0])
        assert not signalled(ring.call_fd)

    def test_call_descriptor_taken_away(
        self, running: Peer, ring: Ring, device: EchoDevice, engine: Engine
    ) -> None:
        assert not running.ack(Request.SET_VRING_CALL, wire.pack_u64(wire.VRING_NO_FD))
        device.flags = [engine.NOTIFY]
        ring.kick()
        running.settle()
        assert device.processed == 1
        assert not signalled(ring.call_fd)

    def test_vrings_are_independent(
        self, running: Peer, memory: GuestMemory, device: EchoDevice
    ) -> None:
        with Ring(memory, 4) as second:
            running.start(second, index=1)
            device.processed = 0
            second.kick()
            running.settle()
            assert device.processed == 1
            assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
            second.kick()
            running.settle()
            assert device.processed == 2

    @pytest.fixture
    def two(self, running: Peer, memory: GuestMemory, device: EchoDevice) -> Iterator[Ring]:
        """A second vring that runs; nothing was kicked."""
        with Ring(memory, 4) as second:
            running.start(second, index=1)
            running.settle()
            device.queues.clear()
            yield second

    def queues(self, peer: Peer) -> list[object]:
        return [vring.queue for vring in peer.backend._vrings]

    def test_kick_while_the_loop_sleeps_on_another_vring(
        self, running: Peer, ring: Ring, two: Ring, device: EchoDevice
    ) -> None:
        ring.kick()
        running.loop.wait(0)
        kick = threading.Timer(0.1, two.kick)
        kick.start()
        running.backend.run()  # asleep on the first vring until the kick, for a second at most
        kick.join()
        running.settle()
        assert device.queues[-1] is self.queues(running)[1]

    def test_vrings_that_are_kicked_at_once(
        self, running: Peer, ring: Ring, two: Ring, device: EchoDevice, engine: Engine
    ) -> None:
        """None waits until the other one has nothing more to do."""
        device.flags = [engine.MORE] * 1000
        ring.kick()
        two.kick()
        running.loop.wait(0)
        running.backend.run()
        assert len(device.queues) == 2
        assert all(queue in device.queues for queue in self.queues(running))

    def test_call_and_error_descriptors_outlive_a_reset(
        self, running: Peer, ring: Ring, device: EchoDevice, engine: Engine
    ) -> None:
        assert not running.ack(Request.RESET_DEVICE)
        running.configure(ring)
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        device.flags = [engine.NOTIFY]
        assert not running.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        assert signalled(ring.call_fd)

    def test_closed_while_running(self, running: Peer, ring: Ring, device: EchoDevice) -> None:
        ring.kick()
        running.sock.close()
        running.settle()
        assert isinstance(running.end, EOFError)
        assert device.processed <= 1
        ring.kick()
        assert running.settle() == 0


class TestKickDescriptors:
    """Kick, call and error descriptors that are not what they should be."""

    @pytest.fixture
    def ready(self, peer: Peer, memory: GuestMemory, ring: Ring) -> Peer:
        peer.share(memory)
        peer.start(ring)
        assert peer.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
        return peer

    @pytest.fixture
    def pipe(self, _no_descriptor_leaks: None) -> Iterator[tuple[int, int]]:
        ends = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        yield ends
        for end in ends:
            with suppress(OSError):
                os.close(end)

    @pytest.mark.parametrize("kind", ["file", "directory", "device", "socket", "memfd"])
    @pytest.mark.parametrize(
        "request_", [Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR]
    )
    def test_wrong_kind(
        self, ready: Peer, tmp_path: Path, kind: str, request_: Request, memfd: int
    ) -> None:
        near, far = socket.socketpair()
        (tmp_path / "file").touch()
        paths = {"file": tmp_path / "file", "directory": tmp_path, "device": Path("/dev/zero")}
        with near, far:
            if kind in paths:
                fd = os.open(paths[kind], os.O_RDONLY)
            else:
                fd = os.dup(near.fileno() if kind == "socket" else memfd)
            ready.refused(request_, wire.pack_u64(0), (fd,))
            os.close(fd)

    def test_refused_kick_leaves_the_old_one(
        self, peer: Peer, memory: GuestMemory, ring: Ring, device: EchoDevice, memfd: int
    ) -> None:
        peer.share(memory)
        peer.start(ring)
        before = device.processed
        peer.refused(Request.SET_VRING_KICK, wire.pack_u64(0), (memfd,))
        ring.kick()
        peer.settle()
        assert device.processed == before + 1

    def test_descriptor_that_epoll_refuses(self, ready: Peer) -> None:
        """The event loop's own epoll instance: an anonymous file that cannot watch itself."""
        own = ready.loop.epoll.fileno()
        ready.refused(Request.SET_VRING_KICK, wire.pack_u64(0), (own,))

    def test_pipe(self, ready: Peer, device: EchoDevice, pipe: tuple[int, int]) -> None:
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (pipe[0],))
        device.processed = 0
        for count in range(1, 10):
            os.write(pipe[1], bytes(8))
            ready.settle()
            assert device.processed == count

    def test_pipe_does_not_fill_up(
        self, ready: Peer, device: EchoDevice, pipe: tuple[int, int]
    ) -> None:
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (pipe[0],))
        for _ in range(100):
            os.write(pipe[1], bytes(4096))
            ready.settle()
        device.processed = 0
        os.write(pipe[1], bytes(8))
        ready.settle()
        assert device.processed == 1

    def test_pipe_is_read_when_the_loop_slept(
        self, ready: Peer, device: EchoDevice, pipe: tuple[int, int]
    ) -> None:
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (pipe[0],))
        os.write(pipe[1], bytes(8))
        ready.loop.wait(0)
        device.processed = 0
        kick = threading.Timer(0.1, os.write, (pipe[1], bytes(8)))
        kick.start()
        ready.backend.run()  # asleep until the kick, for a second at most
        kick.join()
        ready.settle()
        assert device.processed == 2
        with pytest.raises(BlockingIOError):
            os.read(pipe[0], 1)

    def test_full_pipe(self, ready: Peer, device: EchoDevice, pipe: tuple[int, int]) -> None:
        with suppress(BlockingIOError):
            while True:
                os.write(pipe[1], bytes(4096))
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (pipe[0],))
        assert ready.settle(rounds=10) < 10

    def test_pipe_whose_writer_is_gone(
        self, ready: Peer, device: EchoDevice, pipe: tuple[int, int]
    ) -> None:
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (pipe[0],))
        os.close(pipe[1])
        before = device.processed
        assert ready.settle(rounds=10) < 10
        for _ in range(100):
            ready.loop.wait(0)
            ready.run()
        assert device.processed <= before + 1

    def test_writing_end_of_a_pipe(self, ready: Peer, pipe: tuple[int, int]) -> None:
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (pipe[1],))
        assert ready.settle(rounds=10) < 10
        os.close(pipe[0])
        assert ready.settle(rounds=10) < 10
        assert ready.ask_u64(Request.GET_FEATURES)

    def test_kick_counter_at_its_limit(
        self, ready: Peer, device: EchoDevice, eventfds: list[int]
    ) -> None:
        os.eventfd_write(eventfds[0], 0xFFFF_FFFF_FFFF_FFFE)
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
        assert ready.settle(rounds=10) < 10
        assert device.processed

    def test_kick_drained_by_the_front_end(
        self, ready: Peer, device: EchoDevice, eventfds: list[int]
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

    def test_full_call_eventfd(
        self,
        ready: Peer,
        device: EchoDevice,
        eventfds: list[int],
        engine: Engine,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        full = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        os.eventfd_write(full, 0xFFFF_FFFF_FFFF_FFFE)
        assert not ready.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (full,))
        device.flags = [engine.NOTIFY] * 3
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (eventfds[0],))
        ready.settle()
        assert os.eventfd_read(full) == 0xFFFF_FFFF_FFFF_FFFE
        os.close(full)
        assert not caplog.records  # the front-end has its signal

    @pytest.mark.parametrize(
        "request_type", [Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ERR]
    )
    def test_the_flags_of_an_eventfd_are_the_front_ends(
        self, ready: Peer, request_type: Request
    ) -> None:
        """One that reads its end blocking goes on doing so."""
        blocking = os.eventfd(0, os.EFD_CLOEXEC)
        assert not ready.ack(request_type, wire.pack_u64(0), (blocking,))
        assert os.get_blocking(blocking)
        os.close(blocking)

    def test_call_pipe_without_a_reader(
        self,
        ready: Peer,
        ring: Ring,
        device: EchoDevice,
        engine: Engine,
        pipe: tuple[int, int],
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        assert not ready.ack(Request.SET_VRING_CALL, wire.pack_u64(0), (pipe[1],))
        os.close(pipe[0])
        device.flags = [engine.NOTIFY] * 100
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        for _ in range(20):
            ring.kick()
            ready.settle()
        assert ready.end is None
        assert [record.getMessage() for record in caplog.records] == [
            f"a front-end cannot be signalled: {os.strerror(errno.EPIPE)}"
        ]

    def test_one_eventfd_for_everything(
        self, ready: Peer, device: EchoDevice, eventfds: list[int], engine: Engine
    ) -> None:
        payload = wire.pack_u64(0)
        for request in (Request.SET_VRING_CALL, Request.SET_VRING_ERR, Request.SET_VRING_KICK):
            assert not ready.ack(request, payload, (eventfds[0],))
        device.flags = [engine.NOTIFY] * 5
        assert ready.settle(rounds=20) < 20

    def test_closed_by_the_front_end(self, ready: Peer, device: EchoDevice) -> None:
        fd = os.eventfd(0, os.EFD_CLOEXEC)
        assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (fd,))
        os.close(fd)
        assert ready.settle(rounds=10) < 10

    def test_descriptor_is_watched_no_more_after_its_replacement(
        self, ready: Peer, eventfds: list[int]
    ) -> None:
        """The front-end keeps the same file open, so that closing ours alone would not do."""
        for fd in (eventfds[0], eventfds[1]):
            assert not ready.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (fd,))
        ready.settle()
        os.eventfd_write(eventfds[0], 1)
        assert not ready.loop.wait(0)


class TestStatus:
    def test_kept(self, peer: Peer) -> None:
        assert peer.ask_u64(Request.GET_STATUS) == 0
        for status in (1, 3, 11, 15, 255, 0):
            assert peer.ack(Request.SET_STATUS, wire.pack_u64(status)) == 0
            assert peer.ask_u64(Request.GET_STATUS) == status

    @pytest.mark.parametrize("status", [0x100, 1 << 63])
    def test_too_wide(self, peer: Peer, status: int) -> None:
        assert peer.ack(Request.SET_STATUS, wire.pack_u64(3)) == 0
        peer.refused(Request.SET_STATUS, wire.pack_u64(status))
        assert peer.ask_u64(Request.GET_STATUS) == 3

    def test_only_reset_device_resets_the_device(self, peer: Peer, device: EchoDevice) -> None:
        peer.send(Request.SET_STATUS, wire.pack_u64(15))
        peer.send(Request.SET_STATUS, wire.pack_u64(0))
        peer.send(Request.RESET_OWNER)
        assert device.resets == 0
        peer.send(Request.SET_STATUS, wire.pack_u64(15))
        assert peer.ack(Request.RESET_DEVICE) == 0
        assert device.resets == 1
        assert peer.ask_u64(Request.GET_STATUS) == 0

    @pytest.mark.parametrize("request_", [Request.SET_STATUS, Request.RESET_DEVICE])
    def test_memory_outlives_a_reset(
        self, peer: Peer, memory: GuestMemory, request_: Request
    ) -> None:
        peer.share(memory)
        before = peer.backend._memory.regions
        peer.send(request_, wire.pack_u64(0) if request_ == Request.SET_STATUS else b"")
        assert before
        assert peer.backend._memory.regions == before


class TestDirtyLog:
    """Dirty logging, which is not offered: what QEMU sends for calc-dirty-rate all the same."""

    @pytest.mark.parametrize(
        "protocol_features", [PROTOCOL_FEATURES, NONE], ids=["negotiated", "none"]
    )
    @pytest.mark.parametrize("size", [wire.U64_SIZE, wire.LOG_SIZE])
    @pytest.mark.parametrize("fds", [0, 1])
    def test_log_base_is_ignored(
        self, fresh: Peer, memfd: int, protocol_features: int, size: int, fds: int
    ) -> None:
        fresh.negotiate(protocol_features)
        before = open_fds()
        assert fresh.ask(Request.SET_LOG_BASE, bytes(size), (memfd,) * fds) is None
        assert fresh.end is None
        assert open_fds() == before
        if protocol_features:
            assert fresh.ack(Request.SET_LOG_BASE, bytes(size), (memfd,) * fds) == 0
            assert fresh.reply() is None
        assert fresh.ask_u64(Request.GET_FEATURES) == OFFERED

    def test_log_fd_is_refused(self, peer: Peer, eventfds: list[int]) -> None:
        peer.refused(Request.SET_LOG_FD, b"", (eventfds[0],))


class TestBackendChannel:
    def test_kept_open_and_replaced(self, peer: Peer) -> None:
        for _ in range(3):
            near, far = socket.socketpair()
            with near:
                with far:
                    assert peer.ack(Request.SET_BACKEND_REQ_FD, b"", (far.fileno(),)) == 0
                near.setblocking(False)
                with pytest.raises(BlockingIOError):  # not the end of the connection
                    near.recv(1)

    def test_not_a_socket(self, peer: Peer, eventfds: list[int]) -> None:
        peer.refused(Request.SET_BACKEND_REQ_FD, b"", (eventfds[0],))


class TestRpmbDevice:
    """With the real device: what a guest breaks, and how it is reported."""

    @pytest.fixture
    def rpmb(self, engine: Engine, tmp_path: Path, _no_descriptor_leaks: None) -> Iterator[Peer]:
        image = tmp_path / "flash"
        image.write_bytes(bytes(spec.CAPACITY_UNIT))
        store = open_store(Paths.resolve(str(image)))
        peer = Peer(engine, engine.RpmbDevice(store))
        peer.send(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(PROTOCOL_FEATURES))
        features = 1 << virtio.VIRTIO_F_VERSION_1 | wire.F_PROTOCOL_FEATURES
        assert not peer.ack(Request.SET_FEATURES, wire.pack_u64(features))
        yield peer
        peer.close()
        store.close()

    @pytest.fixture
    def running(self, rpmb: Peer, memory: GuestMemory, ring: Ring) -> Peer:
        rpmb.share(memory)
        rpmb.start(ring)
        signalled(ring.call_fd)
        return rpmb

    def request_counter(self, ring: Ring) -> None:
        """Add the chain of one GET_WRITE_COUNTER and kick."""
        memory = ring.memory
        request, answer = memory.allocate(512), memory.allocate(512)
        memory.write(request, counter_request(bytes(16)))
        ring.add([Segment(request, 512)], [Segment(answer, 512)])
        ring.publish()
        ring.kick()

    def answered(self, peer: Peer, ring: Ring) -> bool:
        peer.settle()
        used = ring.collect()
        return [element.length for element in used] == [512] and signalled(ring.call_fd)

    def break_ring(self, peer: Peer, ring: Ring) -> None:
        ring.set_available_index(ring.size + 1)
        ring.kick()
        peer.settle()

    def test_request(self, running: Peer, ring: Ring) -> None:
        for _ in range(20):
            self.request_counter(ring)
            assert self.answered(running, ring)
            assert not signalled(ring.error_fd)
        reply = running.ask(Request.GET_VRING_BASE, bytes(8))
        assert reply == VringState(0, 20).pack()

    def test_dirty_logging_of_a_running_vring(self, running: Peer, ring: Ring) -> None:
        """The messages of QEMU's calc-dirty-rate change nothing; the ring keeps its position."""
        features = 1 << virtio.VIRTIO_F_VERSION_1 | wire.F_PROTOCOL_FEATURES
        logged = wire.pack_u64(features | wire.F_LOG_ALL)
        for _ in range(3):
            assert running.ask(Request.SET_LOG_BASE, bytes(wire.LOG_SIZE)) is None
            for step in (
                (Request.SET_FEATURES, logged),
                (Request.SET_VRING_ADDR, addresses(ring, flags=wire.VRING_ADDRESS_LOG).pack()),
                (Request.SET_FEATURES, wire.pack_u64(features)),
                (Request.SET_VRING_ADDR, addresses(ring).pack()),
            ):
                assert not running.ack(*step)
                self.request_counter(ring)
                assert self.answered(running, ring)
        assert not signalled(ring.error_fd)
        assert running.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 12).pack()

    def test_kick_swallowed_by_an_earlier_back_end(
        self, rpmb: Peer, memory: GuestMemory, ring: Ring
    ) -> None:
        rpmb.share(memory)
        self.request_counter(ring)
        os.eventfd_read(ring.kick_fd)
        rpmb.start(ring)
        assert self.answered(rpmb, ring)

    def test_broken_ring(self, running: Peer, ring: Ring, caplog: pytest.LogCaptureFixture) -> None:
        self.break_ring(running, ring)
        assert signalled(ring.error_fd)
        (record,) = caplog.records
        assert record.getMessage() == (
            "vring 0 stopped until its reset: the available index is ahead by more than the queue "
            "size"
        )
        ring.set_available_index(0)
        self.request_counter(ring)
        assert not self.answered(running, ring)
        assert not signalled(ring.error_fd)
        assert running.ask_u64(Request.GET_STATUS) == 0  # the connection goes on

    def test_each_cause_of_a_broken_ring_is_logged(
        self, running: Peer, ring: Ring, caplog: pytest.LogCaptureFixture
    ) -> None:
        """The limit of lines holds for each cause by itself."""
        for _ in range(2):
            self.break_ring(running, ring)
            ring.reset()
            assert not running.ack(Request.SET_VRING_BASE, bytes(8))
            ring.offer(1000)
            ring.publish()
            ring.kick()
            running.settle()
            ring.reset()
            assert not running.ack(Request.SET_VRING_BASE, bytes(8))
        prefix = "vring 0 stopped until its reset: "
        assert [record.getMessage() for record in caplog.records] == [
            prefix + rules.RING_RULES[rules.RING_AVAILABLE_INDEX],
            prefix + rules.RING_RULES[rules.RING_HEAD],
        ]

    @pytest.mark.parametrize("how", ["GET_VRING_BASE", "SET_VRING_BASE", "SET_VRING_KICK"])
    def test_broken_ring_works_again(self, running: Peer, ring: Ring, how: str) -> None:
        self.break_ring(running, ring)
        assert signalled(ring.error_fd)
        ring.reset()
        if how == "GET_VRING_BASE":
            assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
        if how == "SET_VRING_BASE":
            assert not running.ack(Request.SET_VRING_BASE, bytes(8))
        else:
            assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        signalled(ring.call_fd)
        self.request_counter(ring)
        assert self.answered(running, ring)

    @pytest.mark.parametrize(
        ("request_", "payload"),
        [(Request.SET_STATUS, wire.pack_u64(0)), (Request.RESET_DEVICE, b"")],
    )
    def test_broken_ring_works_again_after_a_reset(
        self, running: Peer, ring: Ring, request_: Request, payload: bytes
    ) -> None:
        self.break_ring(running, ring)
        assert signalled(ring.error_fd)
        ring.reset()
        assert not running.ack(request_, payload)
        running.start(ring)
        signalled(ring.call_fd)
        self.request_counter(ring)
        assert self.answered(running, ring)

    def test_broken_chains_are_reported_once(
        self, running: Peer, ring: Ring, caplog: pytest.LogCaptureFixture
    ) -> None:
        for _ in range(5):
            ring.write_descriptor(0, 0xDEAD_0000, 512)
            ring.offer(0)
            ring.publish()
            ring.kick()
            running.settle()
        self.request_counter(ring)
        running.settle()
        assert [element.length for element in ring.collect()] == [0] * 5 + [512]
        assert [record.getMessage() for record in caplog.records] == [
            "vring 0: 1 broken chains: a buffer lies outside every memory region"
        ]

    def test_memory_that_is_taken_away(self, running: Peer, ring: Ring) -> None:
        (region,) = ring.memory.regions
        payload = wire.pack_single_region(region.place)
        assert not running.ack(Request.REM_MEM_REG, payload)
        self.request_counter(ring)
        running.settle()
        assert signalled(ring.error_fd)
        assert not running.ack(Request.ADD_MEM_REG, payload, (region.fd,))
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        assert self.answered(running, ring)

    def test_memory_that_is_replaced_while_running(self, running: Peer, ring: Ring) -> None:
        (region,) = ring.memory.regions
        table = wire.pack_memory_table([region.place])
        for _ in range(3):
            assert not running.ack(Request.SET_MEM_TABLE, table, (region.fd,))
            self.request_counter(ring)
            assert self.answered(running, ring)

    def test_features_reach_the_queue(self, running: Peer, ring: Ring) -> None:
        features = OFFERED | 1 << virtio.VIRTIO_F_INDIRECT_DESC
        for negotiated, length in ((False, 0), (True, 512)):
            if negotiated:
                assert not running.ack(Request.SET_FEATURES, wire.pack_u64(features))
            assert self.indirect(running, ring) == [length]
        assert not running.ack(Request.RESET_DEVICE)  # what was negotiated stays
        ring.reset()
        running.start(ring)
        assert self.indirect(running, ring) == [512]

    def indirect(self, peer: Peer, ring: Ring) -> list[int]:
        """Send one request through an indirect table; how many bytes were answered."""
        memory = ring.memory
        request, answer = memory.allocate(512), memory.allocate(512)
        memory.write(request, counter_request(bytes(16)))
        ring.add([Segment(request, 512)], [Segment(answer, 512)], indirect=True)
        ring.publish()
        ring.kick()
        peer.settle()
        return [element.length for element in ring.collect()]


class TestLimitedLog:
    def test_one_line_per_rule_and_interval(self, caplog: pytest.LogCaptureFixture) -> None:
        log = LimitedLog(logging.getLogger("vhost_rpmb.test"), interval=1000)
        for _ in range(3):
            log.report("one", "the first")
            log.report("other", "the second")
        assert [record.getMessage() for record in caplog.records] == ["the first", "the second"]

    def test_next_line_counts_what_was_left_out(
        self, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        now = 5.0
        monkeypatch.setattr("vhost_rpmb.vhost_user.session.time.monotonic", lambda: now)
        log = LimitedLog(logging.getLogger("vhost_rpmb.test"), interval=10)
        for _ in range(4):
            log.report("rule", "text")
        now = 15.0
        log.report("rule", "text")
        now = 25.0
        log.report("rule", "text")
        assert [record.getMessage() for record in caplog.records] == [
            "text",
            "text (3 more before)",
            "text",
        ]
