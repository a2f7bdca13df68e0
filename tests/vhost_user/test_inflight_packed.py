# SPDX-License-Identifier: Apache-2.0
"""The in-flight record of a packed ring, after each store of a device that was killed."""

from __future__ import annotations

import random
import struct
from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

import pytest

from vhost_rpmb.vhost_user.inflight import InvalidRecordError, stride
from vhost_rpmb.vhost_user.inflight_packed import PackedRecovery, initial, recover
from vhost_rpmb.virtio.position import Position

AVAIL, USED = 1 << 7, 1 << 15
NEXT = 1
DESCRIPTOR = struct.Struct("<QIHH")  # addr, len, id, flags
# Offsets in the record, and in an entry of it.
DESC_NUM, FREE, OLD_FREE, USED_IDX, OLD_USED = 10, 12, 14, 16, 18
WRAPS = 20
HEADER, ENTRY = 32, 32
INFLIGHT, FOLLOWING, LAST, NUM, COUNTER, COPY = 0, 2, 4, 6, 8, 16
SIZES = [1, 2, 3, 5, 8]


class Chain(NamedTuple):
    head: int
    descriptors: tuple[bytes, ...]


class Model:
    """A driver and a device on one ring; the device's stores are steps of generators."""

    def __init__(self, size: int, chance: random.Random) -> None:
        self.size = size
        self.random = chance
        start = Position(chance.randrange(size), chance.randrange(2))
        self.record = bytearray(initial(size, start))
        # All of the lap before.
        stale = AVAIL | USED if start.wrap ^ 1 else 0
        self.ring = [bytes(14) + stale.to_bytes(2, "little")] * size
        for slot in range(start.slot):
            done = AVAIL | USED if start.wrap else 0
            self.ring[slot] = bytes(14) + done.to_bytes(2, "little")
        self.added = self.taken = self.used = start
        self.room = size  # slots that the driver may use
        self.waiting: list[int] = []  # sizes of chains that are available
        self.in_flight: list[Chain] = []  # that were taken completely and not published
        self.counter = 0

    def get(self, offset: int, layout: str = "H") -> int:
        (value,) = struct.unpack_from(f"={layout}", self.record, offset)
        assert isinstance(value, int)
        return value

    def put(self, offset: int, layout: str, *values: int) -> None:
        struct.pack_into(f"={layout}", self.record, offset, *values)

    # The driver

    def add(self) -> None:
        """Make chains available as long as there is room."""
        while self.room:
            count = self.random.randint(1, min(self.room, 3))
            self.room -= count
            self.waiting.append(count)
            for left in reversed(range(count)):
                flags = (AVAIL if self.added.wrap else USED) | (NEXT if left else 0)
                address, length = self.random.getrandbits(64), self.random.getrandbits(32)
                identity = self.random.getrandbits(16)
                descriptor = DESCRIPTOR.pack(address, length, identity, flags)
                self.ring[self.added.slot] = descriptor
                self.added = self.added.advanced(1, self.size)

    # The device

    def take(self) -> Iterator[None]:
        """Take the next chain."""
        head = self.get(OLD_FREE)
        place = HEADER + head * ENTRY
        self.put(place + NUM, "H", 0)
        yield
        self.put(place + COUNTER, "Q", self.counter)
        self.counter += 1
        yield
        self.put(place + INFLIGHT, "B", 1)
        yield
        descriptors = []
        count = self.waiting.pop(0)
        for number in range(count):
            entry = self.get(FREE)
            slot = self.taken.advanced(number, self.size).slot
            address, length, identity, flags = DESCRIPTOR.unpack(self.ring[slot])
            descriptors.append(self.ring[slot])
            copy = HEADER + entry * ENTRY + COPY
            self.put(copy, "HHIQ", identity, flags, length, address)
            yield
            self.put(place + NUM, "H", number + 1)
            yield
            self.put(FREE, "H", self.get(HEADER + entry * ENTRY + FOLLOWING))
            yield
        self.put(place + LAST, "H", entry)
        yield
        self.put(OLD_FREE, "H", self.get(FREE))
        self.taken = self.taken.advanced(count, self.size)
        self.in_flight.append(Chain(head, tuple(descriptors)))
        yield

    def publish(self, count: int) -> Iterator[None]:
        """Publish the first chains in flight; the driver uses their slots again at once."""
        batch = self.in_flight[:count]
        end, places = self.used, []
        for chain in batch:
            place = HEADER + chain.head * ENTRY
            last = HEADER + self.get(place + LAST) * ENTRY
            self.put(last + FOLLOWING, "H", self.get(FREE))
            yield
            self.put(FREE, "H", chain.head)
            yield
            places.append(end)
            end = end.advanced(len(chain.descriptors), self.size)
            self.put(USED_IDX, "H", end.slot)
            yield
            self.put(WRAPS, "B", end.wrap)
            yield
        for position in [*places[1:], places[0]]:
            flags = AVAIL | USED if position.wrap else 0
            self.ring[position.slot] = DESCRIPTOR.pack(0, 512, 7, flags)
            if position == places[0]:
                self.in_flight = self.in_flight[count:]
                self.used = end
                self.room += sum(len(chain.descriptors) for chain in batch)
                self.add()
            yield
        for chain in batch:
            self.put(HEADER + chain.head * ENTRY + INFLIGHT, "B", 0)
            yield
        self.put(OLD_FREE, "H", self.get(FREE))
        yield
        used_index, wrap = self.get(USED_IDX), self.get(WRAPS, "B")
        self.put(USED_IDX, "HHBB2x", used_index, used_index, wrap, wrap)
        yield

    def work(self) -> Iterator[None]:
        """All stores of some batches."""
        for _ in range(6):
            self.add()
            for _ in range(self.random.randint(0, len(self.waiting))):
                yield from self.take()
            if self.in_flight:
                yield from self.publish(self.random.randint(1, len(self.in_flight)))

    # Another process

    def recover(self) -> PackedRecovery:
        return recover(bytes(self.record), self.size, self.flags_of)

    def flags_of(self, slot: int) -> int:
        return int(DESCRIPTOR.unpack(self.ring[slot])[3])

    def apply(self, found: PackedRecovery) -> Iterator[None]:
        for slot, descriptor in found.slots:
            self.ring[slot] = descriptor
            yield
        for offset, data in found.stores:
            self.record[offset : offset + len(data)] = data
            yield

    def check(self, found: PackedRecovery) -> None:
        """What is in flight, and nothing else, is to be served again."""
        assert found.heads == tuple(chain.head for chain in self.in_flight)
        assert found.used == self.used
        count = sum(len(chain.descriptors) for chain in self.in_flight)
        assert found.available == self.used.advanced(count, self.size)

    def check_continued(self, found: PackedRecovery) -> None:
        """After it, the ring and the record are those of a device that was not killed."""
        slot = self.used
        for chain in self.in_flight:
            for descriptor in chain.descriptors:
                assert self.ring[slot.slot] == descriptor
                slot = slot.advanced(1, self.size)
        again = self.recover()
        assert again[:3] == found[:3]
        assert not again.slots
        before = bytes(self.record)
        for _ in self.apply(again):
            assert bytes(self.record) == before


@pytest.mark.parametrize("size", SIZES)
def test_killed_at_each_store(size: int) -> None:
    for seed in range(4):
        stores = sum(1 for _ in Model(size, random.Random(seed)).work())
        assert stores > 10
        for killed in range(stores + 1):
            model = Model(size, random.Random(seed))
            for _ in islice(model.work(), killed):
                pass
            found = model.recover()
            model.check(found)
            for _ in model.apply(found):  # killed again at each store
                model.check(model.recover())
            model.check_continued(found)


@pytest.mark.parametrize("size", SIZES)
def test_device_continues_after_a_recovery(size: int) -> None:
    """Killed now and then, with everything that is to be served again still in flight."""
    chance = random.Random(size)
    model = Model(size, chance)
    for _ in range(200):
        for _ in islice(model.work(), chance.randrange(60)):
            pass
        found = model.recover()
        model.check(found)
        for _ in model.apply(found):
            pass
        model.check_continued(found)
        # As the next process does: from the recovered positions on, with smaller counters.
        model.counter = len(found.heads)
        model.taken = found.available
        model.waiting = []
        position, chain = model.taken, 0
        while position != model.added:
            chain += 1
            if not model.flags_of(position.slot) & NEXT:
                model.waiting.append(chain)
                chain = 0
            position = position.advanced(1, size)


def test_initial_record_is_that_of_the_text() -> None:
    record = initial(3, Position(2, 0))
    header = struct.pack("=QHHHHHHBB10x", 0, 1, 3, 0, 0, 2, 2, 0, 0)
    entries = b"".join(struct.pack("=BxHHHQ16x", 0, n + 1, 0, 0, 0) for n in range(3))
    assert record == header + entries
    assert len(record) <= stride(3)
    found = recover(record, 3, lambda _: 0)
    assert found[:4] == (Position(2, 0), Position(2, 0), (), ())


def busy() -> Model:
    """Chains of two and one descriptors in flight, and two free entries."""
    model = Model(5, random.Random(0))
    model.waiting, model.room = [2, 1], 2
    for _ in range(2):
        for _ in model.take():
            pass
    assert [chain.head for chain in model.in_flight] == [0, 2]
    return model


def entry(number: int, field: int) -> int:
    return HEADER + number * ENTRY + field


DAMAGE: dict[str, tuple[int, str, int]] = {
    "fresh": (8, "H", 0),
    "version": (8, "H", 2),
    "features": (0, "Q", 1),
    "fewer descriptors": (DESC_NUM, "H", 4),
    "more descriptors": (DESC_NUM, "H", 6),
    "used index": (USED_IDX, "H", 5),
    "old used index": (OLD_USED, "H", 65535),
    "wrap counter": (WRAPS, "B", 2),
    "old wrap counter": (WRAPS + 1, "B", 255),
    "mark": (entry(0, INFLIGHT), "B", 255),
    "free head": (OLD_FREE, "H", 6),
    "free head in a chain": (OLD_FREE, "H", 1),
    "no free entry": (OLD_FREE, "H", 5),
    "loop": (entry(4, FOLLOWING), "H", 3),
    "loop of one": (entry(3, FOLLOWING), "H", 3),
    "end of the list": (entry(4, FOLLOWING), "H", 6),
    "list into a chain": (entry(4, FOLLOWING), "H", 0),
    "empty chain": (entry(0, NUM), "H", 0),
    "short chain": (entry(0, NUM), "H", 1),
    "long chain": (entry(0, NUM), "H", 3),
    "longest chain": (entry(0, NUM), "H", 6),
    "last": (entry(0, LAST), "H", 0),
    "chain past the end": (entry(0, FOLLOWING), "H", 5),
    "chain into itself": (entry(0, FOLLOWING), "H", 0),
    "chain into another": (entry(0, FOLLOWING), "H", 2),
    "chain into free entries": (entry(0, FOLLOWING), "H", 3),
    "mark in a chain": (entry(1, INFLIGHT), "B", 1),
    "lost chain": (entry(2, INFLIGHT), "B", 0),
    "equal counters": (entry(2, COUNTER), "Q", 0),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_invalid_record_is_refused(damage: str) -> None:
    model = busy()
    model.recover()
    model.put(*DAMAGE[damage])
    with pytest.raises(InvalidRecordError, match=r"^expected .*, found "):
        model.recover()


def test_random_records_are_refused_or_consistent() -> None:
    chance = random.Random(1)
    survived = 0
    for _ in range(3000):
        model = busy()
        for _ in range(chance.randint(1, 3)):
            model.record[chance.randrange(len(model.record))] = chance.choice([0, 1, 2, 3, 5, 255])
        try:
            found = model.recover()
        except InvalidRecordError:
            continue
        survived += 1
        for _ in model.apply(found):
            pass
        assert model.recover()[:3] == found[:3]
    assert survived > 100
