# SPDX-License-Identifier: Apache-2.0
"""Drivers that acknowledge no feature, on the ring layout of the legacy MMIO transport, as NuttX.

The legacy transport has one page number for all three parts of a ring: they follow each other, and
the used ring begins at the next page. The front-end computes the addresses. The forms of their
requests are in tests/rpmb/test_foreign_drivers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.support.oracle import (
    FRAME_SIZE,
    KEY,
    NONCE,
    A,
    Frame,
    program_key,
    read_counter,
    read_data,
    read_result,
    sealed,
    split,
    write_data,
)
from tests.support.peer import NEGOTIATED, PAGE, Peer, signalled
from tests.support.rig import make_image
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request, VringState
from vhost_rpmb.virtio import spec as virtio

SIZE = 64
STATUS = (
    virtio.VIRTIO_STATUS_ACKNOWLEDGE,
    virtio.VIRTIO_STATUS_ACKNOWLEDGE | virtio.VIRTIO_STATUS_DRIVER,
    # No FEATURES_OK: the legacy interface does not have it.
    virtio.VIRTIO_STATUS_ACKNOWLEDGE | virtio.VIRTIO_STATUS_DRIVER | virtio.VIRTIO_STATUS_DRIVER_OK,
)


@pytest.fixture
def legacy(memory: GuestMemory) -> Iterator[Ring]:
    """A ring in one piece of pages."""
    start = memory.regions[0].start
    used = 16 * SIZE + 6 + 2 * SIZE
    memory.reserve(start + used, PAGE - used)
    with Ring(memory, SIZE) as ring:
        assert ring.descriptor_table == start
        assert ring.available_ring == start + 16 * SIZE
        assert ring.used_ring == start + PAGE
        yield ring


@pytest.fixture
def rpmb(engine: Engine, tmp_path: Path, _no_descriptor_leaks: None) -> Iterator[Peer]:
    """The real device, on a connection on which nothing was said yet."""
    store = open_store(Paths.resolve(str(make_image(tmp_path / "flash"))))
    peer = Peer(engine, engine.RpmbDevice(store))
    yield peer
    peer.close()
    store.close()


def start(peer: Peer, memory: GuestMemory, ring: Ring) -> None:
    """Start the device for a driver that acknowledges no feature, not even VERSION_1."""
    peer.send(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(NEGOTIATED))
    for status in STATUS[:2]:
        assert not peer.ack(Request.SET_STATUS, wire.pack_u64(status))
    assert not peer.ack(Request.SET_FEATURES, wire.pack_u64(wire.F_PROTOCOL_FEATURES))
    peer.share(memory)
    peer.start(ring)
    assert not peer.ack(Request.SET_STATUS, wire.pack_u64(STATUS[2]))


def commands(peer: Peer, ring: Ring, *requests: bytes, room: int = 1) -> list[Frame]:
    """Send a list of commands as NuttX does: a readable buffer for each, and one for the answer."""
    memory = ring.memory
    addresses = [memory.allocate(len(request) + 1) + 1 for request in requests]
    readable = []
    for address, request in zip(addresses, requests, strict=True):
        memory.write(address, request)
        readable.append(Segment(address, len(request)))
    answer = Segment(memory.allocate(room * FRAME_SIZE + 1) + 1, room * FRAME_SIZE)
    signalled(ring.call_fd)
    head = ring.add(readable, [answer])
    assert ring.publish()  # without features, the device has to ask for kicks by the flag
    ring.kick()
    peer.settle()
    (used,) = ring.collect()
    assert used.head == head
    assert signalled(ring.call_fd)
    return split(memory.read(answer.address, used.length))


def conversation(peer: Peer, ring: Ring) -> None:
    """A key, writes and reads, as the other drivers do."""
    answers: Sequence[Frame] = commands(peer, ring, program_key(block_count=0), read_result(0))
    assert answers == [sealed(req_resp=0x100)]
    for number in range(70):  # more than the ring has descriptors
        answers = commands(peer, ring, write_data(number, number, A), read_result())
        assert answers == [sealed(req_resp=0x300, address=number, write_counter=number + 1)]
    assert commands(peer, ring, read_counter()) == [
        sealed(req_resp=0x200, nonce=NONCE, write_counter=70)
    ]
    assert [frame.data for frame in commands(peer, ring, read_data(68, 3), room=3)] == [
        A,
        A,
        bytes(256),
    ]


def test_driver_without_version_1_on_a_legacy_ring(
    rpmb: Peer, memory: GuestMemory, legacy: Ring
) -> None:
    start(rpmb, memory, legacy)
    conversation(rpmb, legacy)
    assert not signalled(legacy.error_fd)
    assert rpmb.end is None


def test_legacy_driver_resets_and_starts_again(
    rpmb: Peer, memory: GuestMemory, legacy: Ring
) -> None:
    """As after a reboot of the guest; what is durable stays."""
    start(rpmb, memory, legacy)
    conversation(rpmb, legacy)
    assert rpmb.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 73).pack()
    assert not rpmb.ack(Request.SET_STATUS, wire.pack_u64(0))
    for region in memory.regions:
        payload = wire.pack_single_region(region.place)
        assert not rpmb.ack(Request.REM_MEM_REG, payload)
    legacy.reset()
    start(rpmb, memory, legacy)
    answers = commands(rpmb, legacy, read_counter())
    assert answers == [sealed(KEY, req_resp=0x200, nonce=NONCE, write_counter=70)]


def test_front_end_without_protocol_features(rpmb: Peer, memory: GuestMemory, legacy: Ring) -> None:
    """Features 0 altogether: the vring is enabled from the beginning."""
    rpmb.send(Request.SET_FEATURES, wire.pack_u64(0))
    table = wire.pack_memory_table([region.place for region in memory.regions])
    rpmb.send(Request.SET_MEM_TABLE, table, tuple(region.fd for region in memory.regions))
    user = memory.user_address
    addresses = wire.VringAddress(
        0,
        0,
        user(legacy.descriptor_table),
        user(legacy.used_ring),
        user(legacy.available_ring),
    )
    rpmb.send(Request.SET_VRING_NUM, VringState(0, SIZE).pack())
    rpmb.send(Request.SET_VRING_BASE, VringState(0, 0).pack())
    rpmb.send(Request.SET_VRING_ADDR, addresses.pack())
    rpmb.send(Request.SET_VRING_CALL, wire.pack_u64(0), (legacy.call_fd,))
    rpmb.send(Request.SET_VRING_KICK, wire.pack_u64(0), (legacy.kick_fd,))
    conversation(rpmb, legacy)
    assert rpmb.end is None
