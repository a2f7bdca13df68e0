# SPDX-License-Identifier: Apache-2.0
"""The driver side of a packed ring: what it asks for, and answers of a device that are wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.driver import EVENT_IDX, INDIRECT
from vhost_rpmb.driver.errors import QueueError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.packed import PackedRing, make_ring
from vhost_rpmb.driver.ring import Ring, Segment, Used
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.position import Position

AVAIL, USED = virtio.VIRTQ_DESC_F_AVAIL, virtio.VIRTQ_DESC_F_USED
SIZE = 5


@pytest.fixture
def ring(memory: GuestMemory) -> Iterator[PackedRing]:
    with PackedRing(memory, SIZE, features=EVENT_IDX | INDIRECT) as ring:
        yield ring


def segments(ring: Ring, count: int) -> list[Segment]:
    return [Segment(ring.memory.allocate(8), 8) for _ in range(count)]


def use(ring: PackedRing, slot: int, identity: int, length: int = 0, wrap: int = 1) -> None:
    """Act as the device: return a buffer."""
    ring.write_slot(slot, 0, length, identity, AVAIL | USED if wrap else 0)


@pytest.mark.parametrize(
    ("features", "kind"), [(0, Ring), (1 << virtio.VIRTIO_F_RING_PACKED, PackedRing)]
)
def test_feature_decides_about_the_format(
    memory: GuestMemory, features: int, kind: type[Ring]
) -> None:
    with make_ring(memory, 8, features=features) as ring:
        assert type(ring) is kind


def test_head_of_a_chain_becomes_available_at_the_publication(ring: PackedRing) -> None:
    identity = ring.add(segments(ring, 1), segments(ring, 2), indirect=False)
    assert ring.read_slot(0)[3] == 0
    assert [ring.read_slot(slot)[2] for slot in range(3)] == [identity] * 3
    ring.publish()
    flags = [ring.read_slot(slot)[3] for slot in range(4)]
    following, written = virtio.VIRTQ_DESC_F_NEXT, virtio.VIRTQ_DESC_F_WRITE
    assert flags == [AVAIL | following, AVAIL | written | following, AVAIL | written, 0]


def test_chains_go_round_the_ring(ring: PackedRing) -> None:
    position = Position(0, 1)
    for _ in range(9):
        identity = ring.add(segments(ring, 3), indirect=False)
        ring.publish()
        use(ring, position.slot, identity, wrap=position.wrap)
        position = position.advanced(3, SIZE)
        assert ring.collect() == [Used(identity, 0)]
        assert ring.base == position.pack() * 0x1_0001
        assert ring.in_flight == 0


def test_chain_that_does_not_fit_is_refused(ring: PackedRing) -> None:
    ring.add(segments(ring, 3), indirect=False)
    with pytest.raises(QueueError, match="2 of 5 descriptors are free"):
        ring.add(segments(ring, 3), indirect=False)
    ring.add(segments(ring, 3), indirect=True)
    ring.add(segments(ring, 1))
    with pytest.raises(QueueError, match="0 of 5"):
        ring.add(segments(ring, 1))


@pytest.mark.parametrize("event", range(SIZE))
@pytest.mark.parametrize("wrap", [0, 1])
def test_kick_is_wanted_for_the_slot_of_the_event(ring: PackedRing, event: int, wrap: int) -> None:
    ring.memory.store32(ring.used_ring, Position(event, wrap).pack() | 2 << 16)
    wanted = []
    for slot in range(SIZE):
        ring.add(segments(ring, 1))
        if ring.publish():
            wanted.append(slot)
    assert wanted == ([event] if wrap else [])


@pytest.mark.parametrize(("flags", "wanted"), [(0, True), (1, False), (3, True)])
def test_flags_of_the_device_decide_about_the_kick(
    ring: PackedRing, flags: int, wanted: bool
) -> None:
    ring.memory.store32(ring.used_ring, flags << 16)
    ring.add(segments(ring, 1))
    assert ring.publish() == wanted


def test_unknown_buffer_id_is_refused(ring: PackedRing) -> None:
    ring.add(segments(ring, 1))
    ring.publish()
    use(ring, 0, 4)
    with pytest.raises(QueueError, match="buffer id 4: not in flight"):
        ring.collect()


def test_longer_answer_than_the_chain_is_refused(ring: PackedRing) -> None:
    identity = ring.add((), segments(ring, 1))
    ring.publish()
    use(ring, 0, identity, length=9)
    with pytest.raises(QueueError, match="expected at most 8 bytes written, found 9"):
        ring.collect()
