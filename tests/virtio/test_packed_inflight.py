# SPDX-License-Identifier: Apache-2.0
"""The in-flight record of a packed ring: a kill at any store loses and repeats nothing."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from tests.support.oracle import read_counter
from tests.support.rig import ALL_FEATURES, Rig, RigFactory
from tests.support.stores import states_of
from tests.support.tracked import TrackedRing
from vhost_rpmb.driver.packed import PackedRing
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import inflight, inflight_packed
from vhost_rpmb.vhost_user.inflight import InvalidRecordError
from vhost_rpmb.vhost_user.wire import InflightDescription
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, MORE, Unanswered

PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
FEATURES = PACKED  # two slots a request
MANY = 1 << 16
STALE = 0x8000_8000  # what a front-end sends as the base after a crash: an old value


class Tracked(TrackedRing):
    """A packed ring, of which the descriptors are put back, not the event areas."""

    def __init__(self, rig: Rig) -> None:
        assert isinstance(rig.ring, PackedRing)
        self.ring = rig.ring
        self.size = rig.ring.size
        super().__init__(rig, 32 + 32 * self.size, (self.ring.descriptor_table, 16 * self.size))
        self.answered: list[int] = []

    def start(self, base: int = STALE) -> None:
        """Start the vring of a new process."""
        self.rig.queue = self.rig.engine.Virtqueue(self.rig.memory)
        self.rig.start(FEATURES, base)
        inflight_packed.resume(self.rig.queue, self.record, self.size)

    def collect(self) -> None:
        self.answered += [used.head for used in self.ring.collect()]

    def check_idle(self) -> None:
        """Nothing is in flight, and the record is at the ring's position."""
        state = self.file.read(0, self.length)
        assert not any(state[32::32])
        slot, wrap = self.rig.queue.base & 0x7FFF, self.rig.queue.base >> 15 & 1
        expected = slot.to_bytes(2, "little") * 2 + bytes([wrap]) * 2
        assert state[16:22] == expected


def published(tracked: Tracked, state: bytes) -> bool:
    """Whether the driver sees the batch that is published in this state."""
    position = tracked.ring.base >> 16
    flags = state[tracked.length + 16 * (position & 0x7FFF) + 14 :][:2]
    used = virtio.VIRTQ_DESC_F_AVAIL | virtio.VIRTQ_DESC_F_USED
    return int.from_bytes(flags, "little") & used == (used if position >> 15 else 0)


@pytest.fixture
def make_tracked(make_rig: RigFactory) -> Iterator[Any]:
    made: list[Tracked] = []

    def make(size: int) -> Tracked:
        made.append(Tracked(make_rig(size=size, features=FEATURES)))
        return made[-1]

    yield make
    for tracked in made:
        tracked.close()


@pytest.mark.needs_ptrace
@pytest.mark.parametrize(
    ("size", "batches"),
    [(2, (1, 1, 1)), (3, (1, 1)), (8, (1,)), (8, (4,)), (8, (3, 4)), (33, (16, 16)), (64, (5, 32))],
)
def test_kill_at_each_store_loses_and_repeats_nothing(
    make_tracked: Any, engine: Engine, size: int, batches: Sequence[int]
) -> None:
    tracked: Tracked = make_tracked(size)
    tracked.start()
    for count in batches[:-1]:
        tracked.submit(count)
        assert tracked.serve() == count
        tracked.collect()
    tracked.check_idle()
    tracked.submit(batches[-1])
    states = states_of(
        engine.name, lambda: tracked.rig.device.process(tracked.rig.queue), tracked.look
    )
    # Taking: mark, copy, number, free head for each slot; publishing: links, used descriptors, ...
    assert len(states) > 10 * batches[-1]
    seen = 0
    for state in states:
        tracked.put_back(state)
        done = published(tracked, state)
        seen += done
        tracked.start()
        assert tracked.rig.queue.base & 0xFFFF == tracked.rig.queue.base >> 16
        assert tracked.serve() == (0 if done else batches[-1])
        tracked.check_idle()
        final = tracked.look()[tracked.length :]
        for number, head in enumerate(tracked.heads[-batches[-1] :]):
            slot = ((tracked.ring.base >> 16 & 0x7FFF) + 2 * number) % size
            length, identity = (
                int.from_bytes(final[16 * slot + 8 :][:4], "little"),
                int.from_bytes(final[16 * slot + 12 :][:2], "little"),
            )
            assert (length, identity) == (spec.FRAME_SIZE, head)
    assert 1 <= seen < len(states) / 2 + 2 * batches[-1] + 5
    tracked.collect()
    assert tracked.answered == tracked.heads


class _KilledError(Exception):
    pass


class _Stopping:
    """The stores of a recovery, of which a process makes the first ones only."""

    def __init__(self, left: int) -> None:
        self.left = left
        self.stores = 0

    def around(self, store: Any) -> Any:
        def stop(*arguments: object) -> None:
            if not self.left:
                raise _KilledError
            self.left -= 1
            self.stores += 1
            store(*arguments)

        return stop


@pytest.mark.needs_ptrace
def test_kill_during_a_recovery_loses_and_repeats_nothing(
    make_tracked: Any, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracked: Tracked = make_tracked(8)
    tracked.start()
    tracked.submit(1)
    tracked.serve()
    tracked.collect()
    tracked.submit(3)
    states = states_of(
        engine.name, lambda: tracked.rig.device.process(tracked.rig.queue), tracked.look
    )
    write_back = 0
    for state in states:
        left = 0
        while True:
            tracked.put_back(state)
            stopping = _Stopping(left)
            queue = tracked.rig.engine.Virtqueue(tracked.rig.memory)
            tracked.rig.queue = queue
            tracked.rig.start(FEATURES, STALE)
            record = tracked.record
            with monkeypatch.context() as patch:
                patch.setattr(record, "store", stopping.around(record.store))
                wrapped: Any = _Wrapped(queue, stopping)
                try:
                    inflight_packed.resume(wrapped, record, tracked.size)
                    break
                except _KilledError:
                    left += 1
            write_back += wrapped.written
            between = tracked.look()
            done = published(tracked, between)
            assert done == published(tracked, state)
            tracked.start()
            assert tracked.serve() == (0 if done else 3)
            tracked.check_idle()
    assert write_back  # descriptors that the dead process had overwritten


class _Wrapped:
    """A queue whose slots are stored one at a time."""

    def __init__(self, queue: Any, stopping: _Stopping) -> None:
        self._queue = queue
        self._stopping = stopping
        self.written = 0

    def write_slot(self, slot: int, descriptor: bytes) -> None:
        self._stopping.around(self._queue.write_slot)(slot, descriptor)
        self.written += 1

    def __getattr__(self, name: str) -> object:
        return getattr(self._queue, name)


def test_chains_of_the_record_are_served_as_they_were_taken(
    make_tracked: Any, engine: Engine
) -> None:
    """Whatever the guest has in their slots by now."""
    tracked: Tracked = make_tracked(8)
    tracked.start()
    tracked.submit(3)
    tracked.rig.queue.answer_chains(lambda *_: Unanswered.NEVER, 1000, MANY)
    for slot in range(6):
        tracked.ring.write_slot(slot, 0x10, 1, 77, virtio.VIRTQ_DESC_F_AVAIL)
    tracked.start()
    assert tracked.rig.queue.base == 0x8000_8000
    assert tracked.serve() == 3
    tracked.collect()
    assert tracked.answered == tracked.heads
    tracked.check_idle()


def test_chain_that_is_answered_later_stays_in_flight(make_tracked: Any, engine: Engine) -> None:
    tracked: Tracked = make_tracked(8)
    tracked.start()
    tracked.submit(3)
    asked = []

    def later(request: bytes, room: int) -> bytes | Unanswered:
        asked.append(request)
        return Unanswered.LATER if len(asked) in (2, 3) else bytes(room)

    for base in (0x8002, 0x8002, 0x8006):
        flags = tracked.rig.queue.answer_chains(later, 1000, MANY)
        assert bool(flags & MORE) == (base != 0x8006)
        assert tracked.rig.queue.base == base * 0x1_0001
        tracked.collect()
    assert tracked.answered == tracked.heads
    tracked.check_idle()


def test_endless_chain_leaves_the_record_as_it_was(make_tracked: Any, engine: Engine) -> None:
    tracked: Tracked = make_tracked(5)
    tracked.start()
    tracked.submit(1)
    for slot in range(2, 5):
        flags = virtio.VIRTQ_DESC_F_AVAIL | virtio.VIRTQ_DESC_F_NEXT
        tracked.ring.write_slot(slot, 0x10, 1, 77, flags)
    assert tracked.rig.device.process(tracked.rig.queue) & BROKEN
    assert tracked.rig.queue.error == rules.RING_RULES[rules.RING_ENDLESS_CHAIN]
    tracked.collect()
    assert tracked.answered == tracked.heads
    for slot in range(2, 5):
        tracked.ring.write_slot(slot, 0, 0, 0, 0)
    for _ in range(4):
        tracked.start()
        tracked.submit(2)
        assert tracked.serve() == 2
        tracked.collect()
        assert tracked.answered == tracked.heads
        tracked.check_idle()


def test_broken_chains_are_recorded_with_all_their_slots(make_tracked: Any, engine: Engine) -> None:
    tracked: Tracked = make_tracked(5)
    tracked.start()
    for _ in range(9):
        tracked.ring.add([*tracked.rig.put(b"abc", (1, 1)), (0x10, 1)])  # type: ignore[list-item]
        tracked.ring.publish()
        assert tracked.serve() == 1
        assert len(tracked.ring.collect()) == 1
        tracked.check_idle()


def test_region_rewritten_while_it_is_served_changes_nothing(
    make_tracked: Any, engine: Engine
) -> None:
    tracked: Tracked = make_tracked(33)
    tracked.start()
    for _ in range(9):
        tracked.submit(7)
        tracked.file.write(0, b"\xff" * tracked.length)
        assert tracked.serve() == 7
        tracked.collect()
        assert tracked.answered == tracked.heads


def test_random_regions_are_refused_or_served(make_tracked: Any, engine: Engine) -> None:
    """What a front-end wrote there reaches nothing but the record and the ring."""
    chance = random.Random(5)
    tracked: Tracked = make_tracked(8)
    tracked.start()
    tracked.submit(3)
    tracked.rig.queue.answer_chains(lambda *_: Unanswered.NEVER, 1000, MANY)
    state = tracked.look()
    refused = served = 0
    for _ in range(400):
        changed = bytearray(state)
        for _ in range(chance.randint(1, 3)):
            changed[chance.randrange(8, tracked.length)] = chance.choice([0, 1, 2, 3, 7, 8, 255])
        tracked.put_back(bytes(changed))
        try:
            tracked.start()
        except InvalidRecordError:
            refused += 1
            continue
        served += 1
        for _ in range(3):
            tracked.rig.device.process(tracked.rig.queue)
            tracked.rig.queue.take_faults()
    assert refused > 50
    assert served > 50


@pytest.mark.parametrize("started", [False, True])
def test_truncated_region_breaks_the_ring(make_rig: RigFactory, started: bool) -> None:
    rig = make_rig(size=8, features=PACKED | ALL_FEATURES)
    fd = os.memfd_create("region")
    os.ftruncate(fd, 4096)
    memory = rig.engine.GuestMemory(1)
    region = inflight.Region(memory, InflightDescription(inflight.stride(8), 0, 1, 8), fd)
    record = region.record(0)
    assert record is not None
    if not started:
        os.ftruncate(fd, 0)
    inflight_packed.resume(rig.queue, record, 8)
    if started:
        assert rig.chain(read_counter())[0].result == spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
        os.ftruncate(fd, 0)
    os.close(fd)
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.publish()
    assert rig.device.process(rig.queue) & BROKEN
    assert rig.queue.error == rules.RING_RULES[rules.RING_INFLIGHT_LOST]
    rig.queue.set_base(rig.ring.base)  # without the region it works again
    assert rig.process()[0].length == spec.FRAME_SIZE
    region.close()
