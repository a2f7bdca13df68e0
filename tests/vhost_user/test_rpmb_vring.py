# SPDX-License-Identifier: Apache-2.0
"""A vring of the real device: requests, broken rings and their reports."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peer import NEGOTIATED, OFFERED, Peer, addresses, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.frame import counter_request
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request, VringState
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio


@pytest.fixture
def rpmb(engine: Engine, tmp_path: Path, _no_descriptor_leaks: None) -> Iterator[Peer]:
    image = tmp_path / "flash"
    image.write_bytes(bytes(spec.CAPACITY_UNIT))
    store = open_store(Paths.resolve(str(image)))
    peer = Peer(engine, engine.RpmbDevice(store))
    peer.send(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(NEGOTIATED))
    features = 1 << virtio.VIRTIO_F_VERSION_1 | wire.F_PROTOCOL_FEATURES
    assert not peer.ack(Request.SET_FEATURES, wire.pack_u64(features))
    yield peer
    peer.close()
    store.close()


@pytest.fixture
def running(rpmb: Peer, memory: GuestMemory, ring: Ring) -> Peer:
    rpmb.share(memory)
    rpmb.start(ring)
    signalled(ring.call_fd)
    return rpmb


def request_counter(ring: Ring) -> None:
    """Add the chain of one GET_WRITE_COUNTER and kick."""
    memory = ring.memory
    request, answer = memory.allocate(512), memory.allocate(512)
    memory.write(request, counter_request(bytes(16)))
    ring.add([Segment(request, 512)], [Segment(answer, 512)])
    ring.publish()
    ring.kick()


def answered(peer: Peer, ring: Ring) -> bool:
    peer.settle()
    used = ring.collect()
    return [element.length for element in used] == [512] and signalled(ring.call_fd)


def break_ring(peer: Peer, ring: Ring) -> None:
    ring.set_available_index(ring.size + 1)
    ring.kick()
    peer.settle()


def test_requests_are_answered(running: Peer, ring: Ring) -> None:
    for _ in range(20):
        request_counter(ring)
        assert answered(running, ring)
        assert not signalled(ring.error_fd)
    reply = running.ask(Request.GET_VRING_BASE, bytes(8))
    assert reply == VringState(0, 20).pack()


def test_dirty_log_messages_leave_a_running_vring_as_it_is(running: Peer, ring: Ring) -> None:
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
            request_counter(ring)
            assert answered(running, ring)
    assert not signalled(ring.error_fd)
    assert running.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 12).pack()


def test_request_without_a_kick_is_found_at_the_start(
    rpmb: Peer, memory: GuestMemory, ring: Ring
) -> None:
    rpmb.share(memory)
    request_counter(ring)
    os.eventfd_read(ring.kick_fd)
    rpmb.start(ring)
    assert answered(rpmb, ring)


def test_broken_ring_is_reported_and_stopped(
    running: Peer, ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    break_ring(running, ring)
    assert signalled(ring.error_fd)
    (record,) = caplog.records
    assert record.getMessage() == (
        "vring 0 stopped until its reset: the available index is ahead by more than the queue size"
    )
    ring.set_available_index(0)
    request_counter(ring)
    assert not answered(running, ring)
    assert not signalled(ring.error_fd)
    assert running.ask_u64(Request.GET_STATUS) == 0  # the connection goes on


def test_each_cause_of_a_broken_ring_is_logged(
    running: Peer, ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    """The limit of lines holds for each cause by itself."""
    for _ in range(2):
        break_ring(running, ring)
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
def test_broken_ring_works_again_after_its_setup(running: Peer, ring: Ring, how: str) -> None:
    break_ring(running, ring)
    assert signalled(ring.error_fd)
    ring.reset()
    if how == "GET_VRING_BASE":
        assert running.ask(Request.GET_VRING_BASE, bytes(8)) == bytes(8)
    if how == "SET_VRING_BASE":
        assert not running.ack(Request.SET_VRING_BASE, bytes(8))
    else:
        assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
    signalled(ring.call_fd)
    request_counter(ring)
    assert answered(running, ring)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [(Request.SET_STATUS, wire.pack_u64(0)), (Request.RESET_DEVICE, b"")],
)
def test_broken_ring_works_again_after_a_reset(
    running: Peer, ring: Ring, request_: Request, payload: bytes
) -> None:
    break_ring(running, ring)
    assert signalled(ring.error_fd)
    ring.reset()
    assert not running.ack(request_, payload)
    running.start(ring)
    signalled(ring.call_fd)
    request_counter(ring)
    assert answered(running, ring)


def test_broken_chains_are_reported_once(
    running: Peer, ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(5):
        ring.write_descriptor(0, 0xDEAD_0000, 512)
        ring.offer(0)
        ring.publish()
        ring.kick()
        running.settle()
    request_counter(ring)
    running.settle()
    assert [element.length for element in ring.collect()] == [0] * 5 + [512]
    assert [record.getMessage() for record in caplog.records] == [
        "vring 0: 1 broken chains: a buffer lies outside every memory region"
    ]


def test_ring_works_again_when_its_memory_returns(running: Peer, ring: Ring) -> None:
    (region,) = ring.memory.regions
    payload = wire.pack_single_region(region.place)
    assert not running.ack(Request.REM_MEM_REG, payload)
    request_counter(ring)
    running.settle()
    assert signalled(ring.error_fd)
    assert not running.ack(Request.ADD_MEM_REG, payload, (region.fd,))
    assert not running.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
    assert answered(running, ring)


def test_memory_table_is_replaced_under_a_running_vring(running: Peer, ring: Ring) -> None:
    (region,) = ring.memory.regions
    table = wire.pack_memory_table([region.place])
    for _ in range(3):
        assert not running.ack(Request.SET_MEM_TABLE, table, (region.fd,))
        request_counter(ring)
        assert answered(running, ring)


def test_features_reach_the_queue(running: Peer, ring: Ring) -> None:
    features = OFFERED | 1 << virtio.VIRTIO_F_INDIRECT_DESC
    for negotiated, length in ((False, 0), (True, 512)):
        if negotiated:
            assert not running.ack(Request.SET_FEATURES, wire.pack_u64(features))
        assert indirect_lengths(running, ring) == [length]
    assert not running.ack(Request.RESET_DEVICE)  # what was negotiated stays
    ring.reset()
    running.start(ring)
    assert indirect_lengths(running, ring) == [512]


def indirect_lengths(peer: Peer, ring: Ring) -> list[int]:
    """Send one request through an indirect_lengths table; how many bytes were answered."""
    memory = ring.memory
    request, answer = memory.allocate(512), memory.allocate(512)
    memory.write(request, counter_request(bytes(16)))
    ring.add([Segment(request, 512)], [Segment(answer, 512)], indirect=True)
    ring.publish()
    ring.kick()
    peer.settle()
    return [element.length for element in ring.collect()]
