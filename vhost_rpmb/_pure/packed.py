# SPDX-License-Identifier: Apache-2.0
"""The packed ring (virtio specification, "Packed Virtqueues").

Driver and device go round one ring of descriptors, each with a wrap counter that toggles where its
position passes the last slot. The flags of a slot say for which lap it is available or used. Used
descriptors overwrite available ones, in order from the used position on.

A chain has an extent, its slots, even where it breaks a rule: it is walked to its end first. One
without an end breaks the ring. The guest may change any byte at any moment, so each is read once.
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from typing import NamedTuple

from vhost_rpmb._pure.barrier import full_barrier
from vhost_rpmb._pure.inflight import PackedInflight
from vhost_rpmb._pure.memory import GuestMemory
from vhost_rpmb._pure.ring import BrokenChainError, BrokenRingError, Chain, Ring
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.position import AVAILABLE_OR_USED, Position

__all__ = ["PackedRing"]

_DESCRIPTOR = struct.Struct("<QIHH")  # addr, len, id, flags
_USED = struct.Struct("<IHH")  # len, id, flags, at 8 of a descriptor
_USED_AT = 8
_USED_LENGTH_AND_ID = 6  # bytes
_CELLS = virtio.VIRTQ_DESC_SIZE // 2  # 16-bit fields of a descriptor
_FLAGS = 7  # the last of them
_START = 0x8000_8000  # the base of a new ring: slot 0 of the first lap


class _Taken(NamedTuple):
    """The token of a chain: its slots, entry in the in-flight record and buffer id, as a number."""

    slots: int
    entry: int
    identity: int

    @classmethod
    def unpack(cls, token: int) -> _Taken:
        return cls(token & 0xFFFF, token >> 16 & 0xFFFF, token >> 32)

    def pack(self) -> int:
        return self.slots | self.entry << 16 | self.identity << 32


class _Area:
    """An event area: 16 bits of a position and 16 of flags, read and written in one access."""

    def __init__(self, part: memoryview) -> None:
        self._cell = part.cast("I")

    def load(self) -> tuple[int, int]:
        value = self._swap(self._cell[0])
        return value & 0xFFFF, value >> 16

    def store(self, position: int, flags: int) -> None:
        self._cell[0] = self._swap(position | flags << 16)

    def release(self) -> None:
        self._cell.release()

    @staticmethod
    def _swap(value: int) -> int:
        return int.from_bytes(value.to_bytes(4, "little"), sys.byteorder)


class PackedRing(Ring):
    """A packed ring as its device sees it; the methods are those of Ring."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self.inflight: PackedInflight | None = None
        self._parts: list[memoryview] = []
        self.set_base(_START)

    @property
    def base(self) -> int:
        waiting = self.inflight is not None and self.inflight.waiting
        available = self._used if waiting else self._available
        return available.pack() | self._used.pack() << 16

    @property
    def used(self) -> int:
        return self._used.pack()

    def set_base(self, base: int) -> None:
        self.inflight = self.region = None
        # There are front-ends that pass the available position alone. What lies between the two
        # was not answered, and is in the ring.
        self._used = self._available = Position.unpack(base >> 16 or base)
        self._outstanding = 0  # slots of chains that were taken and not published
        self._waiting: list[tuple[_Taken, int]] = []  # to be published, with lengths
        self._published = self._used, 0  # the batch published last: position before it, slots

    def map(self) -> None:
        if not self.size:
            raise BrokenRingError(rules.RING_NO_SIZE)
        if self._used.slot >= self.size:
            raise BrokenRingError(rules.RING_POSITION)
        wanted = (
            (rules.RING_DESCRIPTOR_TABLE, self.size * virtio.VIRTQ_DESC_SIZE, 16),
            (rules.RING_DRIVER_AREA, virtio.VIRTQ_EVENT_SIZE, 4),
            (rules.RING_DEVICE_AREA, virtio.VIRTQ_EVENT_SIZE, 4),
        )
        places, parts = self._find_parts(wanted)
        self._parts = parts
        self._address, _, self._device_area_address = places
        self._cells = parts[0].cast("H")
        self._driver_area = _Area(parts[1])
        self._device_area = _Area(parts[2])
        if self.inflight is not None:
            self.inflight.map()

    def unmap(self) -> None:
        if not self._parts:
            return
        self._driver_area.release()
        self._device_area.release()
        for view in (self._cells, *self._parts):
            view.release()
        self._parts = []
        if self.inflight is not None:
            self.inflight.unmap()

    @property
    def mapped(self) -> bool:
        return bool(self._parts)

    def resume(self, inflight: PackedInflight) -> None:
        """Continue where the record of what is in flight says, and keep it."""
        self.inflight = inflight
        self.region = inflight.memory
        self._used = Position.unpack(inflight.used)
        self._available = self._used.advanced(inflight.slots, self.size)
        self._outstanding = inflight.slots
        self._published = self._used, 0

    def read_slot(self, slot: int) -> bytes:
        """Return the descriptor of a slot, of a ring that is mapped."""
        return self._descriptor(slot)

    def write_slot(self, slot: int, descriptor: bytes) -> None:
        """Store the descriptor of a slot, of a ring that is mapped."""
        start = slot * virtio.VIRTQ_DESC_SIZE
        self._parts[0][start : start + len(descriptor)] = descriptor
        self._mark_slots(slot, slot)

    def look(self) -> int:
        self.walked = 0
        self._waiting.clear()
        waiting = self.inflight.waiting if self.inflight is not None else 0
        return waiting + (self.size - self._outstanding if self._is_available() else 0)

    def take(self) -> Chain | None:
        if self.inflight is not None and self.inflight.waiting:
            entry, copies = self.inflight.take_again()
            return self._judge(copies, entry)
        if not self._is_available():
            return None
        copies = self._take_slots()
        entry = self.inflight.take(copies) if self.inflight is not None else 0
        self._available = self._available.advanced(len(copies), self.size)
        self._outstanding += len(copies)
        return self._judge(copies, entry)

    def _is_available(self) -> bool:
        """Tell whether the driver made the next slot available, and all slots are not taken."""
        self._head_flags = self._swap(self._cells[self._available.slot * _CELLS + _FLAGS])
        flags = self._head_flags & AVAILABLE_OR_USED
        return self._outstanding < self.size and flags == self._available.available

    def _take_slots(self) -> list[bytes]:
        """Copy the slots of the next chain; BrokenRingError if it has no end."""
        full_barrier()  # the flags of the head, which the driver writes last, before the rest
        slot = self._available.slot
        copies = [self._descriptor(slot)[:14] + self._head_flags.to_bytes(2, "little")]
        while _DESCRIPTOR.unpack(copies[-1])[3] & virtio.VIRTQ_DESC_F_NEXT:
            if len(copies) == self.size - self._outstanding:
                raise BrokenRingError(rules.RING_ENDLESS_CHAIN)
            slot = (slot + 1) % self.size
            copies.append(self._descriptor(slot))
        return copies

    def _judge(self, copies: list[bytes], entry: int) -> Chain:
        """Check the chain that these descriptors are."""
        token = _Taken(len(copies), entry, _DESCRIPTOR.unpack(copies[-1])[2]).pack()
        chain = Chain(token)
        self.walked += len(copies)
        self._crossings = 0
        try:
            for number, raw in enumerate(copies):
                address, length, _, flags = _DESCRIPTOR.unpack(raw)
                if not flags & virtio.VIRTQ_DESC_F_INDIRECT:
                    self._add(chain, address, length, bool(flags & virtio.VIRTQ_DESC_F_WRITE))
                    continue
                self._check_table(address, length, flags, nested=number > 0)
                self._add_table(chain, self.memory.read(address, length))
        except BrokenChainError as broken:
            return Chain(token, fault=broken.rule)
        return chain

    def _add_table(self, chain: Chain, table: bytes) -> None:
        """Check an indirect table: all its descriptors, in order; no flag but WRITE counts."""
        for address, length, _, flags in _DESCRIPTOR.iter_unpack(table):
            self.walked += 1
            self._add(chain, address, length, bool(flags & virtio.VIRTQ_DESC_F_WRITE))

    def _descriptor(self, slot: int) -> bytes:
        start = slot * virtio.VIRTQ_DESC_SIZE
        return bytes(self._parts[0][start : start + virtio.VIRTQ_DESC_SIZE])

    def mark(self) -> None:
        self._mark_slots(0, self.size - 1)
        self._mark(self._device_area_address, virtio.VIRTQ_EVENT_SIZE)

    def _mark_slots(self, first: int, last: int) -> None:
        """Mark the slots from one to another, perhaps over the ring's end."""
        if last < first:
            self._mark_slots(first, self.size - 1)
            first = 0
        start = self._address + first * virtio.VIRTQ_DESC_SIZE
        self._mark(start, (last - first + 1) * virtio.VIRTQ_DESC_SIZE)

    def _mark(self, address: int, length: int) -> None:
        """Mark a piece of the ring, by its own guest address: the used one is a part of it."""
        if self.marked is not None:
            self.memory.mark(address, length)

    def take_back(self, token: int) -> None:
        slots, entry, _ = _Taken.unpack(token)
        if self.inflight is not None:
            self.inflight.take_back(entry)
        else:
            self._available = self._available.moved_back(slots, self.size)
            self._outstanding -= slots

    def put(self, token: int, length: int) -> None:
        # Nothing is stored yet: the record has all chains of a batch before the ring has any.
        self._waiting.append((_Taken.unpack(token), length))

    def position(self) -> int:
        return self._used.advanced(_count(self._waiting), self.size).pack()

    def publish(self) -> None:
        first = last = position = self._used
        if self.inflight is not None:
            for taken, _ in self._waiting:
                position = position.advanced(taken.slots, self.size)
                self.inflight.put(taken.entry, position.pack())
        position = first
        for taken, length in self._waiting:
            written = virtio.VIRTQ_DESC_F_WRITE if length else 0
            flags = position.used | written
            start = position.slot * virtio.VIRTQ_DESC_SIZE + _USED_AT
            used = _USED.pack(length, taken.identity, flags)
            if position == first:
                first_flags, used = flags, used[:_USED_LENGTH_AND_ID]
            self._parts[0][start : start + len(used)] = used
            last = position
            position = position.advanced(taken.slots, self.size)
        slots = _count(self._waiting)
        self._published = first, slots
        if not slots:
            return
        full_barrier()  # everything before the flags that the driver polls
        cell = first.slot * _CELLS + _FLAGS
        self._cells[cell] = self._swap(first_flags)
        self._mark_slots(first.slot, last.slot)
        self._used = position
        self._outstanding -= slots
        self._waiting.clear()
        if self.inflight is not None:
            self.inflight.published()

    def ask_for_kick(self) -> None:
        if self.event_index:
            self._device_area.store(self._available.pack(), virtio.RING_EVENT_FLAGS_DESC)
        else:
            self._device_area.store(0, virtio.RING_EVENT_FLAGS_ENABLE)
        self._mark(self._device_area_address, virtio.VIRTQ_EVENT_SIZE)

    def wants_notification(self) -> bool:
        first, slots = self._published
        if not slots:
            return False
        event, flags = self._driver_area.load()
        if flags == virtio.RING_EVENT_FLAGS_DISABLE:
            return False
        if flags != virtio.RING_EVENT_FLAGS_DESC or not self.event_index:
            return True
        asked = Position.unpack(event)
        place = asked.slot if asked.wrap == first.wrap else asked.slot + self.size
        return first.slot <= place < first.slot + slots

    def changed(self) -> bool:
        if self.inflight is not None and self.inflight.waiting:
            return True
        return self._is_available()

    @staticmethod
    def _swap(value: int) -> int:
        return value if sys.byteorder == "little" else (value & 0xFF) << 8 | value >> 8


def _count(chains: Iterable[tuple[_Taken, int]]) -> int:
    """Return the number of slots of chains."""
    return sum(taken.slots for taken, _ in chains)
