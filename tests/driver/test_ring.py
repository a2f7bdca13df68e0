# SPDX-License-Identifier: Apache-2.0
"""The driver's side of a split ring, with the device played by hand."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time

import pytest

from tests.support.daemon import PATIENCE
from tests.support.driver import EVENT_IDX, MIB
from vhost_rpmb.driver.errors import BackendError, QueueError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.driver.rpmb import FEATURES
from vhost_rpmb.virtio import spec as virtio

pytestmark = pytest.mark.usefixtures("no_leaks")


def use(ring: Ring, head: int, length: int) -> None:
    """Play the device: append a used element."""
    index = ring.used_index
    place = ring.used_ring + 4 + 8 * (index % ring.size)
    ring.memory.write(place, struct.pack("<II", head, length))
    ring.memory.store16(ring.used_ring + 2, (index + 1) & 0xFFFF)


def test_layout_of_a_direct_chain(memory: GuestMemory) -> None:
    with Ring(memory, 8) as ring:
        head = ring.add([Segment(0x100, 5), Segment(0x200, 6)], [Segment(0x300, 7)])
        table = memory.read(ring.descriptor_table, 8 * 16)
        found = [struct.unpack_from("<QIHH", table, 16 * head)]
        while found[-1][2] & virtio.VIRTQ_DESC_F_NEXT:
            found.append(struct.unpack_from("<QIHH", table, 16 * found[-1][3]))
        assert [entry[:3] for entry in found] == [
            (0x100, 5, virtio.VIRTQ_DESC_F_NEXT),
            (0x200, 6, virtio.VIRTQ_DESC_F_NEXT),
            (0x300, 7, virtio.VIRTQ_DESC_F_WRITE),
        ]
        assert memory.read(ring.available_ring, 4) == bytes(4)  # not yet available
        assert ring.publish()
        assert memory.read(ring.available_ring, 6) == struct.pack("<HHH", 0, 1, head)
        assert ring.free_descriptors == 5


def test_indirect_chain_takes_one_descriptor_and_frees_its_table(ring: Ring) -> None:
    segments = [Segment(0x100 * number, number) for number in range(1, 20)]
    head = ring.add(segments[:10], segments[10:])
    assert ring.free_descriptors == 7
    raw = ring.memory.read(ring.descriptor_table + 16 * head, 16)
    table, length, flags, _ = struct.unpack("<QIHH", raw)
    assert (length, flags) == (19 * 16, virtio.VIRTQ_DESC_F_INDIRECT)
    entries = list(struct.iter_unpack("<QIHH", ring.memory.read(table, length)))
    assert [Segment(*entry[:2]) for entry in entries] == segments
    assert [entry[2] for entry in entries] == [1] * 10 + [3] * 8 + [2]
    assert [entry[3] for entry in entries[:-1]] == list(range(1, 19))
    ring.publish()
    use(ring, head, 0)
    assert [used.head for used in ring.collect()] == [head]
    assert ring.free_descriptors == 8
    with pytest.raises(KeyError):
        ring.memory.free(table)


def test_full_ring_refuses_a_chain_until_one_is_answered(memory: GuestMemory) -> None:
    with Ring(memory, 4) as ring:
        for _ in range(2):
            ring.add([Segment(0, 1)], [Segment(0, 1)])
        with pytest.raises(QueueError, match="0 of 4 descriptors are free"):
            ring.add([Segment(0, 1)])
        ring.publish()
        use(ring, 0, 1)
        ring.collect()
        ring.add([Segment(0, 1)], [Segment(0, 1)])


@pytest.mark.parametrize(
    ("event", "new", "old", "wanted"),
    [
        (0, 1, 0, True),
        (1, 1, 0, False),
        (65535, 1, 0, False),
        (4, 5, 0, True),
        (5, 5, 0, False),
        (65535, 0, 65535, True),
        (0, 0, 65535, False),
        (1, 3, 65534, True),
        (3, 3, 65534, False),
    ],
)
def test_event_index_decides_whether_to_kick(
    memory: GuestMemory, event: int, new: int, old: int, wanted: bool
) -> None:
    with Ring(memory, 8, features=EVENT_IDX, first_index=old) as ring:
        memory.store16(ring.used_ring + 4 + 8 * 8, event)
        for _ in range((new - old) & 0xFFFF):
            ring.add([Segment(0, 1)])
        assert ring.publish() is wanted
        assert memory.load16(ring.available_ring + 2) == new


@pytest.mark.parametrize(("flags", "wanted"), [(0, True), (1, False)])
def test_flag_decides_whether_to_kick_without_event_index(
    memory: GuestMemory, flags: int, wanted: bool
) -> None:
    with Ring(memory, 8) as ring:
        memory.store16(ring.used_ring, flags)
        ring.add([Segment(0, 1)])
        assert ring.publish() is wanted


def test_wait_returns_at_an_answer(ring: Ring) -> None:
    head = ring.add([Segment(0, 1)], [Segment(0, 9)])
    ring.publish()

    def answer() -> None:
        time.sleep(0.05)
        use(ring, head, 9)
        os.eventfd_write(ring.call_fd, 1)

    device = threading.Thread(target=answer)
    device.start()
    assert ring.wait(PATIENCE) == [(head, 9)]
    device.join()
    assert ring.memory.load16(ring.available_ring + 4 + 2 * 8) == 0  # used_event


@pytest.mark.parametrize("features", [0, EVENT_IDX])
def test_calls_can_be_suppressed(memory: GuestMemory, features: int) -> None:
    with Ring(memory, 8, features=features) as ring:
        ring.suppress_calls()
        flags = memory.load16(ring.available_ring)
        used_event = memory.load16(ring.available_ring + 4 + 2 * 8)
        assert (flags, used_event) == ((0, 0xFFFF) if features else (1, 0))


def test_wait_ends_with_an_error_without_an_answer(ring: Ring) -> None:
    ring.add([Segment(0, 1)])
    ring.publish()
    started = time.monotonic()
    with pytest.raises(BackendError, match=r"within 0\.1 s; 1 in flight"):
        ring.wait(0.1)
    assert time.monotonic() - started >= 0.1


def test_wait_ends_with_an_error_at_a_disconnect(ring: Ring) -> None:
    ours, theirs = socket.socketpair()
    with ours:
        theirs.close()
        with pytest.raises(BackendError, match="closed the connection"):
            ring.wait(PATIENCE, peer=ours.fileno())


def test_answers_are_taken_before_the_error_eventfd_is_reported(ring: Ring) -> None:
    head = ring.add([Segment(0, 1)])
    ring.publish()

    def answer_and_break() -> None:
        use(ring, head, 0)
        os.eventfd_write(ring.error_fd, 1)

    device = threading.Timer(0.05, answer_and_break)
    device.start()
    assert ring.wait(PATIENCE) == [(head, 0)]
    device.join()
    with pytest.raises(QueueError, match="reports the queue broken"):
        ring.wait(PATIENCE)


def test_used_index_too_far_ahead_is_refused(ring: Ring) -> None:
    head = ring.add([Segment(0, 1)])
    ring.publish()
    use(ring, head, 0)
    use(ring, head, 0)
    with pytest.raises(QueueError, match="moved by 2, but only 1"):
        ring.collect()


@pytest.mark.parametrize("head", [3, 8, 0xFFFF_FFFF])
def test_head_that_is_not_in_flight_is_refused(ring: Ring, head: int) -> None:
    assert ring.add([Segment(0, 1)]) == 0
    ring.publish()
    use(ring, head, 0)
    with pytest.raises(QueueError, match=f"head index {head}: not in flight"):
        ring.collect()


def test_length_above_the_room_is_refused(ring: Ring) -> None:
    head = ring.add([Segment(0, 100)], [Segment(0, 9)])
    ring.publish()
    use(ring, head, 10)
    with pytest.raises(QueueError, match="at most 9 bytes written, found 10"):
        ring.collect()


def test_raw_heads_are_returned_as_often_as_offered(ring: Ring) -> None:
    ring.offer(0xBEEF)
    ring.offer(0xBEEF)
    ring.publish()
    assert ring.memory.read(ring.available_ring + 2, 6) == struct.pack("<HHH", 2, *[0xBEEF] * 2)
    use(ring, 0xBEEF, 0)
    use(ring, 0xBEEF, 0)
    assert ring.collect() == [(0xBEEF, 0)] * 2
    assert ring.in_flight == 0


def test_close_frees_all_memory(memory: GuestMemory) -> None:
    with Ring(memory, 256, features=FEATURES) as ring:
        ring.add([Segment(0, 1), Segment(0, 1)])
    assert memory.allocate(4 * MIB) == memory.regions[0].start
