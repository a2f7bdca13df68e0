# SPDX-License-Identifier: Apache-2.0
"""The packed ring with a driver that conforms: laps, positions, publication, event suppression."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import pytest

from tests.support.oracle import read_counter
from tests.support.rig import ALL_FEATURES, Rig, RigFactory
from tests.support.stores import states_of
from vhost_rpmb.driver.packed import PackedRing
from vhost_rpmb.driver.ring import Segment, Used
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import MORE, NOTIFY, Unanswered
from vhost_rpmb.virtio.position import Position

PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
EVENT_INDEX = 1 << virtio.VIRTIO_F_EVENT_IDX
INDIRECT = 1 << virtio.VIRTIO_F_INDIRECT_DESC
AVAIL, USED = virtio.VIRTQ_DESC_F_AVAIL, virtio.VIRTQ_DESC_F_USED
SIZES = [1, 2, 3, 5, 33, 64]
MANY = 1 << 16


def ring_of(rig: Rig) -> PackedRing:
    assert isinstance(rig.ring, PackedRing)
    return rig.ring


def answer(request: bytes, room: int) -> bytes:
    """A part of the room, recognisable by the request."""
    return (request * room)[: room - len(request) % 3 if room > 2 else room]


class Driver:
    """Submits chains of random shape, and checks that each is answered once and right."""

    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.chance = random.Random(seed)
        self.places = list(range(0x4020_0000, 0x4020_0000 + 0x100 * rig.ring.size, 0x100))
        self.in_flight: dict[int, tuple[int, bytes, list[Segment]]] = {}
        self.answered = 0

    def submit(self) -> bool:
        """Add one chain; False if it does not fit."""
        ring, chance = self.rig.ring, self.chance
        if not ring.free_descriptors:
            return False
        indirect = ring.indirect and bool(chance.getrandbits(1))
        most = ring.size if indirect else ring.free_descriptors
        count = chance.randint(1, min(most, 5))
        readable = chance.randint(0, count)
        place = self.places.pop()
        request = bytes([chance.randint(1, 255) for _ in range(8 * readable)])
        self.rig.guest.write(place, request)
        segments = [Segment(place + 8 * number, 8) for number in range(count)]
        head = ring.add(segments[:readable], segments[readable:], indirect=indirect)
        self.in_flight[head] = place, request, segments[readable:]
        return True

    def collect(self) -> list[int]:
        used = self.rig.ring.collect()
        for head, length in used:
            place, request, room = self.in_flight.pop(head)
            expected = answer(request, 8 * len(room))
            assert length == len(expected)
            found = b"".join(self.rig.guest.read(*segment) for segment in room)
            assert found[:length] == expected
            self.places.append(place)
        self.answered += len(used)
        return [element.head for element in used]


def make_driver(make_rig: RigFactory, size: int, features: int, seed: int) -> Driver:
    rig = make_rig(size=size, features=PACKED | features)
    rig.guest.reserve(0x4020_0000, 0x100 * size)
    return Driver(rig, seed)


@pytest.mark.parametrize("features", [0, EVENT_INDEX, INDIRECT, ALL_FEATURES])
@pytest.mark.parametrize("size", SIZES)
def test_each_chain_is_answered_once_over_many_laps(
    make_rig: RigFactory, engine: Engine, size: int, features: int
) -> None:
    driver = make_driver(make_rig, size, features, size)
    rig = driver.rig
    order: list[int] = []
    submitted: list[int] = []
    while driver.answered < 8 * size + 40:
        for _ in range(driver.chance.randint(1, 2 * size)):
            if not driver.submit():
                break
            submitted.append(next(reversed(driver.in_flight)))
        rig.ring.publish()
        limit = driver.chance.choice([1, 2, MANY])
        while rig.queue.answer_chains(answer, 1000, limit) & MORE:
            order += driver.collect()
        order += driver.collect()
        assert order == submitted
        assert not driver.in_flight
        assert rig.queue.base == rig.ring.base


@pytest.mark.parametrize("size", [32768, 4096])
def test_largest_ring_is_served(make_rig: RigFactory, engine: Engine, size: int) -> None:
    rig = make_rig(size=size, features=PACKED)
    data, room = rig.put(b"request"), rig.room(7)
    heads = [rig.ring.add(data, room) for _ in range(size // 2)]
    rig.ring.publish()
    assert not rig.queue.answer_chains(answer, 1000, MANY) & MORE
    assert rig.ring.collect() == [Used(head, 6) for head in heads]
    assert rig.ring.base == 0  # after one lap


def test_chain_runs_across_the_end(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(size=5, features=PACKED)
    for _ in range(7):
        head = rig.ring.add(rig.put(b"abc", (1, 1)), rig.room(1))
        rig.ring.publish()
        assert not rig.queue.answer_chains(answer, 1000, MANY) & MORE
        assert rig.ring.collect() == [Used(head, 1)]


def test_chain_of_all_slots_is_served(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(size=5, features=PACKED)
    for _ in range(4):
        rig.ring.add(rig.put(b"abc", (1, 1)), rig.room(2, (1,)))
        rig.ring.publish()
        rig.queue.answer_chains(answer, 1000, MANY)
        assert [used.length for used in rig.ring.collect()] == [2]


def test_rpmb_is_served(make_rig: RigFactory) -> None:
    rig = make_rig(features=PACKED | ALL_FEATURES)
    rig.program()
    rig.write(0, 3, b"\5" * 256)
    assert rig.read(3) == [b"\5" * 256]
    for _ in range(200):
        assert rig.chain(read_counter())[0].result == 0


def test_used_descriptor_has_no_other_flag_and_no_other_slot_changes(
    make_rig: RigFactory, engine: Engine
) -> None:
    rig = make_rig(size=8, features=PACKED | INDIRECT)
    ring = ring_of(rig)
    for slot in range(8):
        ring.write_slot(slot, 0xAB, 0xCD, 0xEF, 0)
    (data,) = rig.put(b"abc")
    rig.ring.add([data], rig.room(3), indirect=False)
    rig.ring.add([data], indirect=False)
    rig.ring.publish()
    before = [ring.read_slot(slot) for slot in range(8)]
    rig.queue.answer_chains(answer, 1000, MANY)
    after = [ring.read_slot(slot) for slot in range(8)]
    assert after[0] == (before[0][0], 3, 0, AVAIL | USED | virtio.VIRTQ_DESC_F_WRITE)
    assert after[2] == (before[2][0], 0, 1, AVAIL | USED)
    assert (after[1], after[3:]) == (before[1], before[3:])


# Publication


@pytest.mark.needs_ptrace
@pytest.mark.parametrize("size", [4, 5])
def test_first_chain_of_a_batch_is_published_last(
    make_rig: RigFactory, engine: Engine, size: int
) -> None:
    """At no store is the head of a batch used while a descriptor or a buffer is not complete."""
    rig = make_rig(size=size, features=PACKED)
    ring = ring_of(rig)
    rooms = [rig.room(4) for _ in range(4)]
    for room in rooms:
        rig.ring.add((), room)
    rig.ring.publish()
    places = [(ring.descriptor_table, 16 * size)] + [(room[0].address, 4) for room in rooms]
    states = states_of(
        engine.name,
        lambda: rig.queue.answer_chains(lambda _, room: bytes(room), 1000, MANY),
        lambda: b"".join(rig.guest.read(*place) for place in places),
    )
    heads = [int.from_bytes(state[14:16], "little") & (AVAIL | USED) for state in states]
    assert heads[-1] == AVAIL | USED
    assert heads.count(AVAIL | USED) == 1  # the last state of all
    assert len(states) >= 9  # a store for each buffer, and one or more for each descriptor
    assert all(earlier != later for earlier, later in pairwise(states))


def test_batch_ends_when_all_slots_are_in_flight(make_rig: RigFactory, engine: Engine) -> None:
    """Whatever the guest makes available meanwhile."""
    rig = make_rig(size=3, features=PACKED)
    ring = ring_of(rig)
    for _ in range(3):
        rig.ring.add(rig.put(b"a"))
    rig.ring.publish()
    asked = 0

    def hostile(_: bytes, room: int) -> bytes:
        nonlocal asked
        asked += 1
        for slot in range(3):
            address, length, identity, _flags = ring.read_slot(slot)
            # Available in both laps, before the device has used it.
            ring.write_slot(slot, address, length, identity, USED if asked > 2 else AVAIL)
        return b""

    rig.queue.answer_chains(hostile, 1000, MANY)
    assert asked == 3


# Event suppression


@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_device_asks_for_the_kick_of_the_next_chain(
    make_rig: RigFactory, engine: Engine, features: int
) -> None:
    rig = make_rig(size=3, features=PACKED | features)
    ring = ring_of(rig)
    for _ in range(8):
        rig.ring.add(rig.put(b"a"))
        rig.ring.add(rig.put(b"b"))
        rig.ring.publish()
        rig.queue.answer_chains(answer, 1000, MANY)
        rig.ring.collect()
        if features:
            assert ring.device_area == (ring.base & 0xFFFF, virtio.RING_EVENT_FLAGS_DESC)
        else:
            assert ring.device_area == (0, virtio.RING_EVENT_FLAGS_ENABLE)


@pytest.mark.parametrize(
    ("features", "flags", "notified"),
    [
        (0, virtio.RING_EVENT_FLAGS_ENABLE, True),
        (0, virtio.RING_EVENT_FLAGS_DISABLE, False),
        (0, virtio.RING_EVENT_FLAGS_DESC, True),  # reserved without the feature
        (0, 3, True),
        (0, 0xFFFF, True),
        (EVENT_INDEX, virtio.RING_EVENT_FLAGS_ENABLE, True),
        (EVENT_INDEX, virtio.RING_EVENT_FLAGS_DISABLE, False),
        (EVENT_INDEX, 3, True),
        (EVENT_INDEX, virtio.RING_EVENT_FLAGS_DESC, False),
    ],
)
def test_flags_of_the_driver_decide_about_the_notification(
    make_rig: RigFactory, engine: Engine, features: int, flags: int, notified: bool
) -> None:
    rig = make_rig(size=4, features=PACKED | features)
    rig.ring.add(rig.put(b"a"))
    rig.ring.publish()
    ring_of(rig).set_driver_area(Position(2, 1).pack(), flags)
    assert bool(rig.queue.answer_chains(answer, 1000, MANY) & NOTIFY) == notified
    assert rig.queue.answer_chains(answer, 1000, MANY) == 0  # nothing was used


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_notification_is_exact(make_rig: RigFactory, engine: Engine, size: int) -> None:
    """For each position, number of slots and event: if and only if a slot used is the event's."""
    rig = make_rig(size=size, features=PACKED | EVENT_INDEX)
    ring = ring_of(rig)
    (data,) = rig.put(b"a")
    positions = [Position(slot, wrap) for wrap in (1, 0) for slot in range(size)]
    for old in positions:
        for count in range(1, size + 1):
            for event in positions:
                rig.ring.reset(old.pack() << 16 | old.pack())
                for slot in range(size):  # as the lap before left them
                    wrap = old.wrap if slot < old.slot else old.wrap ^ 1
                    ring.write_slot(slot, 0, 0, 0, AVAIL | USED if wrap else 0)
                rig.queue.set_base(rig.ring.base)
                ring.set_driver_area(event.pack(), virtio.RING_EVENT_FLAGS_DESC)
                rig.ring.add([data] * count)
                rig.ring.publish()
                used = {old.advanced(number, size) for number in range(count)}
                flags = rig.queue.answer_chains(answer, 1000, MANY)
                assert bool(flags & NOTIFY) == (event in used), (old, count, event)
                assert len(rig.ring.collect()) == 1


# Positions


def at_slot(rig: Rig, count: int) -> None:
    """Move the ring on by so many slots."""
    for _ in range(count):
        rig.ring.add(rig.put(b"a"))
        rig.ring.publish()
        rig.queue.answer_chains(answer, 1000, MANY)
        rig.ring.collect()


@pytest.mark.parametrize("moved", range(8))
@pytest.mark.parametrize(
    "passed",
    [
        lambda base: base,
        lambda base: base & 0xFFFF,  # the available position alone
        lambda base: base & 0xFFFF_0000,
        # The halves apart; without a used half there is only the other one.
        lambda base: base & 0xFFFF_0000 | (base ^ 2 if base >> 16 else base) & 0xFFFF,
    ],
    ids=["both", "available", "used", "apart"],
)
def test_base_is_where_the_ring_continues(
    make_rig: RigFactory, engine: Engine, moved: int, passed: Callable[[int], int]
) -> None:
    rig = make_rig(size=3, features=PACKED)
    assert rig.queue.base == 0x8000_8000
    at_slot(rig, moved)
    base = rig.queue.base
    assert base == (moved % 3 | (1 ^ moved // 3 & 1) << 15) * 0x1_0001
    assert rig.queue.used == base & 0xFFFF
    rig.queue = engine.Virtqueue(rig.memory)
    rig.start(PACKED, passed(base))
    assert rig.queue.base == base
    at_slot(rig, 4)


def test_other_format_begins_a_new_ring(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(features=PACKED)
    assert rig.queue.packed
    at_slot(rig, 3)
    rig.queue.set_features(PACKED | ALL_FEATURES)
    assert rig.queue.base == 0x8003_8003
    rig.queue.set_features(ALL_FEATURES)
    assert (rig.queue.packed, rig.queue.base) == (False, 0)
    rig.queue.set_features(PACKED)
    assert (rig.queue.packed, rig.queue.base) == (True, 0x8000_8000)
    rig.queue.reset()
    assert (rig.queue.packed, rig.queue.base) == (False, 0)


def test_other_size_keeps_the_base(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(size=8, features=PACKED)
    at_slot(rig, 3)
    rig.queue.set_size(33)
    assert rig.queue.base == 0x8003_8003


# Chains that are not answered


def test_chain_that_is_answered_later_stays_the_next_one(
    make_rig: RigFactory, engine: Engine
) -> None:
    rig = make_rig(size=5, features=PACKED)
    heads = [rig.ring.add(rig.put(bytes([number]) * 2, (1,))) for number in range(2)]
    rig.ring.publish()
    asked = []

    def later(request: bytes, room: int) -> bytes | Unanswered:
        asked.append(request[0])
        return Unanswered.LATER if len(asked) in (2, 3) else b""

    for expected, base in ((heads[:1], 0x8002), ([], 0x8002), (heads[1:], 0x8004)):
        flags = rig.queue.answer_chains(later, 1000, MANY)
        assert [used.head for used in rig.ring.collect()] == expected
        assert bool(flags & MORE) == (base < 0x8004)
        assert rig.queue.base == base * 0x1_0001
    assert asked == [0, 1, 1, 1]


def test_chain_that_is_never_answered_keeps_its_slots(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(size=3, features=PACKED)
    for number in range(3):
        rig.ring.add(rig.put(bytes([number])))
    rig.ring.publish()
    flags = rig.queue.answer_chains(
        lambda request, _: Unanswered.NEVER if request == b"\1" else b"", 1000, MANY
    )
    assert not flags & MORE
    assert len(rig.ring.collect()) == 2
    assert rig.ring.in_flight == 1
    for _ in range(5):
        rig.ring.add(rig.put(b"a"))
        rig.ring.publish()
        rig.queue.answer_chains(answer, 1000, MANY)
        assert len(rig.ring.collect()) == 1
