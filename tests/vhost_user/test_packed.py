# SPDX-License-Identifier: Apache-2.0
"""Packed rings behind the messages: format, size, base, reset, and what is in flight."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.manager import Manager
from tests.support.peer import FEATURES, PAGE, EchoDevice, Peer, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.packed import PackedRing
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import inflight, wire
from vhost_rpmb.vhost_user.wire import InflightDescription, Request, VringState
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import Unanswered

PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
SIZE = 5
START = 0x8000_8000
GOOD = InflightDescription(2 * inflight.stride(SIZE), 0, 2, SIZE)


class Device(EchoDevice):
    """Answers with zeros; or never, as a process that is killed."""

    features = FEATURES | PACKED
    dead = False

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[bytes] = []

    def process(self, queue: Any) -> int:
        flags: int = queue.answer_chains(self._answer, 1000, 64)
        return flags

    def _answer(self, request: bytes, room: int) -> bytes | Unanswered:
        self.asked.append(request)
        return Unanswered.NEVER if self.dead else bytes(room)


@pytest.fixture
def device() -> Device:
    return Device()


@pytest.fixture
def ring(memory: GuestMemory) -> Iterator[PackedRing]:
    with PackedRing(memory, SIZE) as ring:
        yield ring


@pytest.fixture
def peer(fresh: Peer, memory: GuestMemory) -> Peer:
    return ready(fresh, memory)


def ready(peer: Peer, memory: GuestMemory, features: int = PACKED) -> Peer:
    """Negotiate a packed ring, and share the memory."""
    peer.negotiate()
    set_features(peer, features)
    peer.share(memory)
    return peer


def set_features(peer: Peer, features: int) -> None:
    offered = wire.pack_u64(FEATURES | wire.F_PROTOCOL_FEATURES | features)
    assert peer.ack(Request.SET_FEATURES, offered) == 0


def base(peer: Peer) -> int:
    reply = peer.ask(Request.GET_VRING_BASE, bytes(8))
    assert reply is not None
    return VringState.unpack(reply).num


def submit(ring: Ring, *requests: bytes) -> None:
    for request in requests:
        address = ring.memory.allocate(len(request))
        ring.memory.write(address, request)
        ring.add([Segment(address, len(request))])
    ring.publish()
    ring.kick()


def exchange(peer: Peer, ring: Ring, *requests: bytes) -> None:
    submit(ring, *requests)
    peer.settle()
    assert len(ring.collect()) == len(requests)


@pytest.mark.parametrize("size", [1, 3, 33, 64, 32768])
def test_ring_of_any_size_runs(peer: Peer, memory: GuestMemory, size: int) -> None:
    with PackedRing(memory, size) as ring:
        peer.start(ring, base=START)
        for _ in range(70):
            exchange(peer, ring, b"request")
        assert base(peer) == ring.base


def test_split_ring_of_an_odd_size_is_broken(
    fresh: Peer, memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    ready(fresh, memory, 0)
    with Ring(memory, SIZE) as ring:
        fresh.start(ring)
        assert signalled(ring.error_fd)
    assert "the size of a split ring is not a power of two" in caplog.text


def test_fresh_ring_begins_at_the_first_slot(peer: Peer, ring: Ring) -> None:
    """Also where no base comes."""
    assert base(peer) == START
    peer.start(ring, base=START)
    exchange(peer, ring, b"a", b"b")
    assert base(peer) == 0x8002_8002
    assert not peer.ack(Request.SET_STATUS, wire.pack_u64(0))
    assert base(peer) == START
    ring.reset()
    peer.start(ring, base=START)
    exchange(peer, ring, b"a")


def test_ring_continues_where_it_stopped(peer: Peer, ring: Ring) -> None:
    peer.start(ring, base=START)
    for _ in range(20):
        exchange(peer, ring, b"a", b"b", b"c")
        stopped = base(peer)
        assert stopped == ring.base
        submit(ring, b"d")  # while it is stopped
        peer.start(ring, base=stopped)
        assert len(ring.collect()) == 1


@pytest.mark.parametrize("value", [0x8005_8005, 0x7FFF_0000])
def test_base_behind_the_ring_breaks_it_when_it_starts(
    peer: Peer, ring: Ring, value: int, caplog: pytest.LogCaptureFixture
) -> None:
    peer.start(ring, base=value)
    assert signalled(ring.error_fd)
    assert "a slot of the vring base is not below the queue size" in caplog.text
    peer.start(ring, base=START)
    exchange(peer, ring, b"a")


def test_format_does_not_change_while_a_ring_runs(peer: Peer, ring: Ring) -> None:
    peer.start(ring, base=START)
    exchange(peer, ring, b"a")
    others = wire.pack_u64(FEATURES | wire.F_PROTOCOL_FEATURES)
    assert peer.ack(Request.SET_FEATURES, others) != 0
    set_features(peer, PACKED)
    exchange(peer, ring, b"a")
    assert base(peer) == 0x8002_8002
    set_features(peer, 0)
    assert base(peer) == 0
    set_features(peer, PACKED)
    assert base(peer) == START


# The record of what is in flight


@pytest.fixture
def recorded(peer: Peer, region: int) -> Peer:
    assert peer.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,)) == 0
    return peer


def record(region: int) -> tuple[int, int, int]:
    """Version, used index and wrap counter."""
    raw = os.pread(region, 32, 0)
    return raw[8], int.from_bytes(raw[16:18], "little"), raw[20]


def test_record_begins_at_the_base_and_follows_the_ring(
    recorded: Peer, ring: Ring, region: int
) -> None:
    os.pwrite(region, b"\xff" * 8 + bytes(8) + b"\xff" * 100, 0)  # version 0: nothing else counts
    ring.reset(0x8003_8003)
    recorded.start(ring, base=0x8003_8003)
    assert record(region) == (1, 3, 1)
    exchange(recorded, ring, b"a", b"b", b"c")
    assert record(region) == (1, 1, 0)
    assert base(recorded) == 0x1_0001
    assert not any(os.pread(region, PAGE, inflight.stride(SIZE)))


@pytest.mark.parametrize("passed", [START, 0x8001_8001, 0, 0x1234_1234])
def test_chains_of_a_killed_back_end_are_served_from_the_record(
    engine: Engine,
    device: Device,
    recorded: Peer,
    memory: GuestMemory,
    ring: PackedRing,
    region: int,
    passed: int,
) -> None:
    """Whatever base comes, of the slots that the ring has."""
    recorded.start(ring, base=START)
    exchange(recorded, ring, b"a")
    device.dead = True
    submit(ring, b"b", b"c")
    recorded.settle()
    recorded.close()
    device.dead, device.asked = False, []
    peer = ready(Peer(engine, device), memory)
    assert peer.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,)) == 0
    broken = passed & 0x7FFF >= SIZE
    peer.start(ring, base=passed)
    assert signalled(ring.error_fd) == broken
    if broken:
        peer.start(ring, base=START)
    assert device.asked == [b"b", b"c"]
    assert len(ring.collect()) == 2
    assert base(peer) == 0x8003_8003
    peer.close()


def test_other_base_in_a_connection_begins_a_new_ring(
    recorded: Peer, ring: Ring, region: int
) -> None:
    recorded.start(ring, base=START)
    exchange(recorded, ring, b"a", b"b")
    stopped = base(recorded)
    recorded.start(ring, base=stopped)
    exchange(recorded, ring, b"a")
    assert base(recorded) == 0x8003_8003
    ring.reset(0x8001_8001)
    recorded.start(ring, base=0x8001_8001)
    assert record(region) == (1, 1, 1)
    exchange(recorded, ring, b"a")


@pytest.mark.parametrize("request_", [Request.SET_STATUS, Request.RESET_DEVICE])
def test_reset_begins_a_new_ring(
    recorded: Peer, ring: Ring, region: int, request_: Request
) -> None:
    recorded.start(ring, base=START)
    exchange(recorded, ring, b"a", b"b")
    payload = wire.pack_u64(0) if request_ == Request.SET_STATUS else b""
    assert not recorded.ack(request_, payload)
    assert record(region)[0] == 0
    ring.reset()
    recorded.start(ring, base=START)
    assert record(region) == (1, 0, 1)
    exchange(recorded, ring, b"a")


def test_record_of_the_other_format_is_fresh(
    recorded: Peer, memory: GuestMemory, ring: Ring, region: int
) -> None:
    recorded.start(ring, base=START)
    exchange(recorded, ring, b"a", b"b")
    base(recorded)
    set_features(recorded, 0)
    with Ring(memory, 4) as split:
        recorded.start(split)
        exchange(recorded, split, b"a")
        base(recorded)
        set_features(recorded, PACKED)
        ring.reset()
        recorded.start(ring, base=START)
        exchange(recorded, ring, b"a")


@pytest.mark.parametrize(
    ("place", "value", "reason"),
    [
        (8, 2, "expected version 1, found 2"),
        (10, 4, "expected number of descriptors 5, found 4"),
        (16, 5, "expected used slots below 5"),
    ],
)
def test_invalid_record_stops_the_vring_with_the_reason(
    recorded: Peer,
    ring: Ring,
    region: int,
    device: Device,
    place: int,
    value: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    recorded.start(ring, base=START)
    base(recorded)
    content = bytearray(os.pread(region, 32 + 32 * SIZE, 0))
    content[place] = value
    os.pwrite(region, content, 0)
    submit(ring, b"a")
    assert not recorded.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,))
    recorded.start(ring, base=START)
    assert signalled(ring.error_fd)
    assert device.asked == []
    assert "vring 0 stopped until its reset: the in-flight region is invalid" in caplog.text
    assert reason in caplog.text
    assert os.pread(region, len(content), 0) == content


# Another process


@pytest.fixture
def manager(_no_descriptor_leaks: None) -> Iterator[Manager]:
    with Manager() as manager:
        yield manager


@pytest.mark.kept
def test_ring_that_another_process_may_continue_has_a_record(
    engine: Engine, device: Device, memory: GuestMemory, ring: Ring, manager: Manager
) -> None:
    """Of a packed ring, although the front-end sent no region."""
    peer = ready(Peer(engine, device, manager.handover), memory)
    state = peer.backend._backend
    assert state.save().inflight is None
    peer.start(ring, base=START)
    found = state.save().inflight
    assert found is not None
    assert found.queue_size >= SIZE
    exchange(peer, ring, b"a")
    (vring, _) = state.save().vrings
    assert (vring.base, vring.used, vring.ahead, vring.kept) == (0x8001, 0x8001, 0, True)
    set_owner = peer.ack(Request.SET_OWNER)
    assert not set_owner
    peer.close()
    with Ring(memory, 8) as split:
        peer = ready(Peer(engine, device, manager.handover), memory, 0)
        peer.start(split)
        exchange(peer, split, b"a")
        assert peer.backend._backend.save().inflight is None
        peer.close()
