# SPDX-License-Identifier: Apache-2.0
"""Packed rings that break a rule: of chains, of the ring, of its parts; and random ones."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence

import pytest

from tests.support.raw import BUFFERS, GUEST, SIZE, USER, RawGuest, descriptor
from tests.support.rig import ALL_FEATURES
from vhost_rpmb import engine as engines
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, FAULTS, MORE, NOTIFY, Unanswered

PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
NEXT, WRITE, INDIRECT = (
    virtio.VIRTQ_DESC_F_NEXT,
    virtio.VIRTQ_DESC_F_WRITE,
    virtio.VIRTQ_DESC_F_INDIRECT,
)
AVAIL, USED = virtio.VIRTQ_DESC_F_AVAIL, virtio.VIRTQ_DESC_F_USED
DRIVER_AREA, DEVICE_AREA = 0x3000, 0x3100  # offsets in the file; the descriptors are at 0
DATA, TABLE = BUFFERS, BUFFERS + 0x1000
OUTSIDE = 0x1000
LIMIT = 4096
MANY = 1 << 16

Slot = tuple[int, int, int, int]  # addr, len, id, flags


class Guest(RawGuest):
    """A packed ring whose every byte the test sets."""

    def __init__(
        self, engine: Engine, size: int = 5, features: int = PACKED | ALL_FEATURES
    ) -> None:
        super().__init__(engine)
        self.size = size
        self.fill(bytes(SIZE))
        self.share()
        self.begin(features)
        self.asked: list[tuple[bytes, int]] = []
        self.flags = 0

    def begin(self, features: int, base: int = 0x8000_8000) -> None:
        self.queue.reset()
        self.queue.set_size(self.size)
        self.queue.set_features(features)
        self.queue.set_addresses(USER, USER + DRIVER_AREA, USER + DEVICE_AREA)
        self.queue.set_base(base)

    def write(self, slots: Sequence[Slot], place: int = 0) -> None:
        raw = b"".join(
            descriptor(address, length, each, flags) for address, length, each, flags in slots
        )
        os.pwrite(self.fd, raw, place)

    def read(self, slot: int) -> tuple[int, int, int]:
        """Length, id and flags of a slot."""
        raw = os.pread(self.fd, 8, 16 * slot + 8)
        return (
            int.from_bytes(raw[:4], "little"),
            int.from_bytes(raw[4:6], "little"),
            int.from_bytes(raw[6:], "little"),
        )

    def process(self) -> list[tuple[bytes, int]]:
        self.asked = []
        self.flags = self.queue.answer_chains(self._answer, LIMIT, MANY)
        return self.asked

    def _answer(self, request: bytes, room: int) -> bytes:
        self.asked.append((request, room))
        return bytes(room)


@pytest.fixture
def guest(engine: Engine) -> Iterator[Guest]:
    guest = Guest(engine)
    yield guest
    guest.close()


def readable(flags: int = 0, identity: int = 0) -> Slot:
    return GUEST + DATA, 8, identity, flags | AVAIL


BROKEN_CHAINS: dict[str, tuple[list[Slot], list[Slot], int]] = {
    "buffer outside": ([(OUTSIDE, 8, 1, AVAIL)], [], rules.CHAIN_BUFFER),
    "zero length": ([(GUEST + DATA, 0, 1, AVAIL)], [], rules.CHAIN_EMPTY_DESCRIPTOR),
    "readable after writable": (
        [readable(NEXT | WRITE), readable(identity=1)],
        [],
        rules.CHAIN_ORDER,
    ),
    "fault before the end": (
        [(OUTSIDE, 8, 7, AVAIL | NEXT), readable(NEXT), readable(identity=1)],
        [],
        rules.CHAIN_BUFFER,
    ),
    "indirect and next": (
        [(GUEST + TABLE, 16, 7, AVAIL | INDIRECT | NEXT), readable(identity=1)],
        [readable()],
        rules.CHAIN_INDIRECT_FLAGS,
    ),
    "indirect behind a direct one": (
        [readable(NEXT), (GUEST + TABLE, 16, 1, AVAIL | INDIRECT)],
        [readable()],
        rules.CHAIN_INDIRECT_FLAGS,
    ),
    "table of length 0": (
        [(GUEST + TABLE, 0, 1, AVAIL | INDIRECT)],
        [],
        rules.CHAIN_INDIRECT_LENGTH,
    ),
    "table of length 8": (
        [(GUEST + TABLE, 8, 1, AVAIL | INDIRECT)],
        [],
        rules.CHAIN_INDIRECT_LENGTH,
    ),
    "table longer than the queue": (
        [(GUEST + TABLE, 16 * 6, 1, AVAIL | INDIRECT)],
        [readable()] * 6,
        rules.CHAIN_INDIRECT_SIZE,
    ),
    "table outside": ([(OUTSIDE, 16, 1, AVAIL | INDIRECT)], [], rules.CHAIN_INDIRECT_TABLE),
    "table over the end": (
        [(GUEST + SIZE - 16, 32, 1, AVAIL | INDIRECT)],
        [],
        rules.CHAIN_INDIRECT_TABLE,
    ),
    "fault in the table": (
        [(GUEST + TABLE, 32, 1, AVAIL | INDIRECT)],
        [readable(), (OUTSIDE, 1, 0, 0)],
        rules.CHAIN_BUFFER,
    ),
}


@pytest.mark.parametrize(("slots", "table", "rule"), BROKEN_CHAINS.values(), ids=BROKEN_CHAINS)
def test_broken_chain_is_returned_with_all_its_slots(
    guest: Guest, slots: list[Slot], table: list[Slot], rule: int
) -> None:
    guest.write(table, TABLE)
    guest.write([*slots, readable(identity=9)])
    assert guest.process() == [(bytes(8), 0)]
    assert guest.flags & FAULTS
    assert guest.queue.take_faults() == {rules.CHAIN_RULES[rule]: 1}
    assert guest.read(0) == (0, 1, AVAIL | USED)
    assert guest.read(len(slots)) == (0, 9, AVAIL | USED)
    assert guest.queue.base == (0x8000 | len(slots) + 1) * 0x1_0001


def test_indirect_table_that_was_not_negotiated_breaks_the_chain(guest: Guest) -> None:
    guest.begin(PACKED)
    guest.write([(GUEST + TABLE, 16, 1, AVAIL | INDIRECT)])
    assert guest.process() == []
    assert list(guest.queue.take_faults()) == [rules.CHAIN_RULES[rules.CHAIN_INDIRECT_FEATURE]]


def test_in_a_table_only_write_counts(guest: Guest) -> None:
    """NEXT, INDIRECT and the id mean nothing there; all entries belong to the chain, in order."""
    os.pwrite(guest.fd, b"abcd", DATA)
    table = [
        (GUEST + DATA, 2, 0xFFFF, 0),
        (GUEST + DATA + 2, 2, 3, NEXT | INDIRECT | AVAIL | USED),
        (GUEST + DATA + 8, 4, 0, WRITE | INDIRECT),
    ]
    guest.write(table, TABLE)
    guest.write([(GUEST + TABLE, 48, 0xABCD, AVAIL | INDIRECT | WRITE)])
    assert guest.process() == [(b"abcd", 4)]
    assert not guest.flags & FAULTS
    assert guest.read(0) == (4, 0xABCD, AVAIL | USED | WRITE)


@pytest.mark.parametrize("identity", [0, 5, 0x8000, 0xFFFF])
def test_id_of_the_last_slot_is_echoed(guest: Guest, identity: int) -> None:
    guest.write([readable(NEXT, identity=1), readable(identity=identity)])
    assert len(guest.process()) == 1
    assert guest.read(0) == (0, identity, AVAIL | USED)


@pytest.mark.parametrize("flags", [0, USED, AVAIL | USED])
def test_slot_that_is_not_available_is_left(guest: Guest, flags: int) -> None:
    guest.write([(GUEST + DATA, 8, 1, flags)])
    assert guest.process() == []
    assert guest.flags == 0
    assert guest.read(0) == (8, 1, flags)


def check_broken(guest: Guest, rule: int) -> None:
    """The ring is broken, stays broken, and works again with a base."""
    assert guest.flags & BROKEN
    assert not guest.flags & MORE
    assert guest.queue.error == rules.RING_RULES[rule] != ""
    assert guest.process() == []
    assert guest.flags & BROKEN
    guest.fill(bytes(SIZE))
    guest.begin(PACKED)
    guest.write([readable()])
    assert len(guest.process()) == 1
    assert not guest.flags & BROKEN


@pytest.mark.parametrize("size", [1, 2, 5])
def test_chain_without_an_end_breaks_the_ring(engine: Engine, size: int) -> None:
    guest = Guest(engine, size)
    guest.write([readable(NEXT)] * size)
    assert guest.process() == []
    check_broken(guest, rules.RING_ENDLESS_CHAIN)
    guest.close()


def test_chain_into_slots_in_flight_breaks_the_ring_after_the_chains_before_it(
    guest: Guest,
) -> None:
    guest.write([readable(NEXT), readable(identity=3), *[readable(NEXT)] * 3])
    assert len(guest.process()) == 1
    assert guest.read(0) == (0, 3, AVAIL | USED)
    assert guest.flags & NOTIFY
    check_broken(guest, rules.RING_ENDLESS_CHAIN)


@pytest.mark.parametrize("base", [0x8005_8005, 0x0005_0005, 0xFFFF_FFFF, 0x7FFF_7FFF, 0x0000_7FFF])
def test_base_behind_the_ring_breaks_it(guest: Guest, base: int) -> None:
    guest.begin(PACKED, base)
    assert guest.queue.base >> 16 == (base >> 16 or base)
    assert guest.process() == []
    check_broken(guest, rules.RING_POSITION)


def test_base_of_more_than_32_bits_is_refused(guest: Guest) -> None:
    with pytest.raises(ValueError, match="32 bits"):
        guest.queue.set_base(1 << 32)


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        (0, rules.RING_DESCRIPTOR_TABLE),
        (1, rules.RING_DRIVER_AREA),
        (2, rules.RING_DEVICE_AREA),
    ],
)
@pytest.mark.parametrize("address", [0, USER + 2, USER + SIZE, USER + BUFFERS - 2, 2**64 - 4])
def test_part_that_is_not_there_breaks_the_ring(
    guest: Guest, part: int, rule: int, address: int
) -> None:
    addresses = [USER, USER + DRIVER_AREA, USER + DEVICE_AREA]
    addresses[part] = address
    guest.queue.set_addresses(*addresses)
    assert guest.queue.used is None
    assert guest.process() == []
    check_broken(guest, rule)


@pytest.mark.parametrize("addresses", [(USER, USER, USER), (USER, USER + 12, USER + 28)])
def test_parts_may_overlap(guest: Guest, addresses: tuple[int, int, int]) -> None:
    """The guest harms itself only."""
    guest.queue.set_addresses(*addresses)
    guest.write([readable()] * 5)
    for _ in range(4):
        guest.process()
    assert guest.queue.base >> 16 & 0x7FFF < 5


@pytest.mark.parametrize("event", [5, 0x7FFF, 0x8005, 0xFFFF])
def test_event_behind_the_ring_is_no_event(guest: Guest, event: int) -> None:
    os.pwrite(guest.fd, event.to_bytes(2, "little") + b"\2\0", DRIVER_AREA)
    guest.write([readable()])
    assert len(guest.process()) == 1
    assert not guest.flags & NOTIFY


def test_slots_that_are_made_available_again_are_served_a_lap_later_only(guest: Guest) -> None:
    """What the guest writes behind the device is available when its lap comes."""
    guest.write([readable()] * 5)
    assert len(guest.process()) == 5
    guest.write([readable()] * 5)  # flags of the first lap
    assert guest.process() == []
    guest.write([(GUEST + DATA, 8, 0, USED)] * 5)
    assert len(guest.process()) == 5
    assert guest.queue.base == 0x8000_8000


@pytest.mark.parametrize("when", ["before", "between"])
def test_lost_memory_is_not_answered(engine: Engine, when: str) -> None:
    guest = Guest(engine)
    guest.write([readable(), readable()])
    asked = []

    def answer(request: bytes, _room: int) -> bytes:
        asked.append(request)
        os.ftruncate(guest.fd, 0)
        return b""

    if when == "before":
        os.ftruncate(guest.fd, BUFFERS)  # the ring stays
    assert guest.queue.answer_chains(answer, LIMIT, MANY) & BROKEN
    assert len(asked) == (when == "between")
    assert guest.queue.error == rules.RING_RULES[rules.RING_MEMORY_LOST]
    guest.close()


def test_smaller_size_drops_what_is_in_flight(engine: Engine) -> None:
    """The positions of a larger ring must not reach the slots behind a smaller one."""
    guest = Guest(engine, 64)
    guest.write([readable()] * 60)
    guest.queue.answer_chains(lambda *_: Unanswered.NEVER, LIMIT, MANY)
    before = os.pread(guest.fd, SIZE, 0)
    guest.queue.set_size(4)
    assert len(guest.process()) == 4
    assert guest.queue.base == 0
    assert os.pread(guest.fd, SIZE, 0)[16 * 64 : DRIVER_AREA] == before[16 * 64 : DRIVER_AREA]
    guest.close()


# Both engines, on random rings


def random_slot(chance: random.Random, wrap: int) -> Slot:
    """A descriptor, mostly one that is available in the lap of this wrap counter."""
    address = GUEST + chance.choice([DATA, DATA, DATA + 0x100, TABLE, SIZE - 8, 0])
    length = chance.choice([8, 8, 8, 16, 32, 48, 0, 1, 80, 0xFFFF_FFFF])
    kind = chance.choice([0, 0, 0, 0, NEXT, NEXT, WRITE, WRITE, INDIRECT, INDIRECT, 7, 0x7F78])
    if kind & INDIRECT:
        address, length = GUEST + TABLE, chance.choice([16, 32, 48, 0, 8, 2000])
    lap = (AVAIL if wrap else USED) if chance.random() < 0.9 else chance.choice([0, AVAIL | USED])
    return address, length, chance.choice([0, 1, 2, 0xFFFF]), kind | lap


def trace_of(engine: Engine, size: int, seed: int) -> list[object]:
    """What an engine does with a script of random steps."""
    chance = random.Random(seed)
    features = chance.choice([0, 1 << virtio.VIRTIO_F_EVENT_IDX, ALL_FEATURES, ALL_FEATURES])
    guest = Guest(engine, size, PACKED | features)
    trace: list[object] = []
    try:
        for _ in range(12):
            slot, wrap = guest.queue.base >> 16 & 0x7FFF, guest.queue.base >> 31
            for number in range(chance.randint(1, size)):
                guest.write([random_slot(chance, wrap)], TABLE + 16 * (number % 4))
                if slot == size:
                    slot, wrap = 0, wrap ^ 1
                guest.write([random_slot(chance, wrap)], 16 * (slot % size))
                slot += 1
            os.pwrite(guest.fd, chance.randbytes(4), DRIVER_AREA)
            if chance.random() < 0.05:
                guest.queue.set_base(chance.choice([0x8000_8000, 0, chance.getrandbits(32), 1]))
            trace += [guest.process(), guest.flags, guest.queue.error, guest.queue.take_faults()]
            trace += [guest.queue.base, os.pread(guest.fd, SIZE, 0)]
            if guest.flags & BROKEN:
                guest.queue.set_base(chance.choice([0x8000_8000, 0x1_0001, 0]))
    finally:
        guest.close()
    return trace


@pytest.mark.parametrize("size", [1, 2, 3, 5, 33, 64])
def test_engines_agree_on_random_rings(size: int) -> None:
    fast, pure = (engines.load(name) for name in engines.ENGINES)
    served = 0
    for seed in range(60):
        trace = trace_of(fast, size, seed)
        assert trace == trace_of(pure, size, seed), seed
        served += sum(len(each) for each in trace[::6] if isinstance(each, list))
    assert served > 100
