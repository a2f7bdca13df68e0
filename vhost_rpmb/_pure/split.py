# SPDX-License-Identifier: Apache-2.0
"""The split ring (virtio specification, "Split Virtqueues").

The guest may change any byte at any moment, so each is read once: a descriptor is copied, then
checked, then used.
"""

from __future__ import annotations

import struct
import sys

from vhost_rpmb._pure.barrier import full_barrier
from vhost_rpmb._pure.inflight import Inflight
from vhost_rpmb._pure.memory import GuestMemory
from vhost_rpmb._pure.ring import BrokenChainError, BrokenRingError, Chain, Ring
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio

__all__ = ["SplitRing"]

_DESCRIPTOR = struct.Struct("<QIHH")  # addr, len, flags, next
_USED_ELEMENT = struct.Struct("<II")  # id, len


class _Index:
    """A 16-bit little-endian field that both sides use at once, read and written in one access.

    A memoryview of format H moves its two bytes by one load or store; struct's "<H" does not.
    """

    def __init__(self, part: memoryview, offset: int) -> None:
        self._cell = part[offset : offset + 2].cast("H")

    def load(self) -> int:
        return self._swap(self._cell[0])

    def store(self, value: int) -> None:
        self._cell[0] = self._swap(value)

    def release(self) -> None:
        self._cell.release()

    @staticmethod
    def _swap(value: int) -> int:
        return value if sys.byteorder == "little" else (value & 0xFF) << 8 | value >> 8


class SplitRing(Ring):
    """A split ring as its device sees it; the methods are those of Ring."""

    def __init__(self, memory: GuestMemory) -> None:
        super().__init__(memory)
        self.inflight: Inflight | None = None
        self._parts: tuple[memoryview, memoryview, memoryview] | None = None
        self.set_base(0)

    @property
    def base(self) -> int:
        waiting = self.inflight.waiting if self.inflight is not None else 0
        return (self._next_available - waiting) & 0xFFFF

    @property
    def used(self) -> int:
        return self._next_used if self._started else self._used_index.load()

    def set_base(self, base: int) -> None:
        if base > 0xFFFF:
            raise ValueError(f"an available index has 16 bits, {base} has more")
        self.inflight = self.region = None
        self._next_available = base
        self._next_used = 0
        self._published = 0  # the used index before the batch published last
        self._unpublished = 0
        self._started = False

    def map(self) -> None:
        if not self.size:
            raise BrokenRingError(rules.RING_NO_SIZE)
        size = self.size
        if size & (size - 1):
            raise BrokenRingError(rules.RING_SPLIT_SIZE)
        wanted = (
            (rules.RING_DESCRIPTOR_TABLE, size * virtio.VIRTQ_DESC_SIZE, 16),
            (rules.RING_AVAILABLE, 6 + 2 * size, 2),
            (rules.RING_USED, 6 + 8 * size, 4),
        )
        _, parts = self._find_parts(wanted)
        self._parts = (parts[0], parts[1], parts[2])
        self._available_flags = _Index(parts[1], 0)
        self._available_index = _Index(parts[1], 2)
        self._used_event = _Index(parts[1], 4 + 2 * size)
        self._used_flags = _Index(parts[2], 0)
        self._used_index = _Index(parts[2], 2)
        self._available_event = _Index(parts[2], 4 + 8 * size)
        if self.inflight is not None:
            self.inflight.map()

    def unmap(self) -> None:
        if self._parts is None:
            return
        for index in (
            self._available_flags,
            self._available_index,
            self._used_event,
            self._used_flags,
            self._used_index,
            self._available_event,
        ):
            index.release()
        for part in self._parts:
            part.release()
        self._parts = None
        if self.inflight is not None:
            self.inflight.unmap()

    @property
    def mapped(self) -> bool:
        return self._parts is not None

    def resume(self, used: int, inflight: Inflight) -> None:
        """Continue behind a used index, and record what is in flight."""
        self._next_used = self._published = used
        self._started = True
        self.inflight = inflight
        self.region = inflight.memory

    def look(self) -> int:
        self.walked = 0
        self._unpublished = 0
        if not self._started:
            self._next_used = self._used_index.load()
            self._started = True
        available = (self._available_index.load() - self._next_available) & 0xFFFF
        if self.inflight is not None:
            available += self.inflight.waiting
        if available > self.size:
            raise BrokenRingError(rules.RING_AVAILABLE_INDEX)
        full_barrier()  # the index before the entries and descriptors
        return available

    def take(self) -> Chain:
        assert self._parts is not None
        descriptors, available, _ = self._parts
        if self.inflight is not None and self.inflight.waiting:
            head = self.inflight.take_again()
        else:
            offset = 4 + 2 * (self._next_available % self.size)
            head = int.from_bytes(available[offset : offset + 2], "little")
            if head >= self.size:
                raise BrokenRingError(rules.RING_HEAD)
            self._next_available = (self._next_available + 1) & 0xFFFF
            if self.inflight is not None:
                self.inflight.take(head)
        chain = Chain(head)
        try:
            self._walk(descriptors, chain)
        except BrokenChainError as broken:
            return Chain(head, fault=broken.rule)
        return chain

    def _walk(self, descriptors: memoryview, chain: Chain) -> None:
        """Follow a chain through the descriptor table and at most one indirect table."""
        indirect = False
        table = b""
        index, entries = chain.token, self.size
        self._crossings = 0
        while True:
            self.walked += 1
            start = index * virtio.VIRTQ_DESC_SIZE
            raw = (table if indirect else descriptors)[start : start + virtio.VIRTQ_DESC_SIZE]
            address, length, flags, following = _DESCRIPTOR.unpack(bytes(raw))
            if flags & virtio.VIRTQ_DESC_F_INDIRECT:
                self._check_table(address, length, flags, nested=indirect)
                table = self.memory.read(address, length)
                indirect = True
                index, entries = 0, length // virtio.VIRTQ_DESC_SIZE
                continue
            self._add(chain, address, length, bool(flags & virtio.VIRTQ_DESC_F_WRITE))
            if not flags & virtio.VIRTQ_DESC_F_NEXT:
                return
            if following >= entries:
                raise BrokenChainError(rules.CHAIN_NEXT)
            index = following

    def mark(self) -> None:
        self._mark(0, 6 + 8 * self.size)

    def _mark_published(self) -> None:
        """Mark the elements and the index of the batch that was published."""
        count = (self._next_used - self._published) & 0xFFFF
        first = self._published % self.size
        straight = min(count, self.size - first)
        self._mark(4 + 8 * first, 8 * straight)
        if straight < count:
            self._mark(4, 8 * (count - straight))
        self._mark(2, 2)

    def _mark(self, offset: int, length: int) -> None:
        """Mark a piece of the used ring."""
        if self.marked is not None:
            self.memory.mark(self.marked + offset, length)

    def take_back(self, token: int) -> None:
        if self.inflight is not None:
            self.inflight.take_back(token)
        else:
            self._next_available = (self._next_available - 1) & 0xFFFF

    def put(self, token: int, length: int) -> None:
        assert self._parts is not None
        slot = (self._next_used + self._unpublished) % self.size
        start = 4 + 8 * slot
        self._parts[2][start : start + 8] = _USED_ELEMENT.pack(token, length)
        self._unpublished += 1
        if self.inflight is not None:
            self.inflight.put(token)

    def position(self) -> int:
        return (self._next_used + self._unpublished) & 0xFFFF

    def publish(self) -> None:
        self._published = self._next_used
        if self._unpublished:
            self._next_used = (self._next_used + self._unpublished) & 0xFFFF
            self._unpublished = 0
            full_barrier()  # the elements and the buffers before the index
            self._used_index.store(self._next_used)
            self._mark_published()
            if self.inflight is not None:
                self.inflight.published(self._next_used)

    def ask_for_kick(self) -> None:
        if self.event_index:
            self._available_event.store(self._next_available)
            self._mark(4 + 8 * self.size, 2)
        else:
            self._used_flags.store(0)
            self._mark(0, 2)

    def wants_notification(self) -> bool:
        count = (self._next_used - self._published) & 0xFFFF
        if not count:
            return False
        if not self.event_index:
            return not self._available_flags.load() & virtio.VIRTQ_AVAIL_F_NO_INTERRUPT
        event = self._used_event.load()
        return (self._next_used - event - 1) & 0xFFFF < count

    def changed(self) -> bool:
        if self.inflight is not None and self.inflight.waiting:
            return True
        return self._available_index.load() != self._next_available
