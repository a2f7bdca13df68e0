# SPDX-License-Identifier: Apache-2.0
"""Driver side of a packed virtqueue (virtio specification, "Packed Virtqueues").

The flags of a slot say for which lap round the ring it is available or used; both sides count the
laps by one bit.
"""

import struct
from collections.abc import Sequence

from vhost_rpmb.driver.errors import QueueError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Chain, Ring, Segment, Used, full_barrier
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.position import AVAILABLE_OR_USED, Position

_DESCRIPTOR = struct.Struct("<QIHH")  # addr, len, id, flags
_LENGTH_AND_ID = struct.Struct("<IH")
_LENGTH_AT, _FLAGS_AT = 8, 14  # bytes, in a descriptor


class PackedRing(Ring):
    """A packed virtqueue; its parts are the descriptors and the two event areas.

    A chain's head is its buffer id here. ``first_index`` is the 32-bit vring base to start at.
    """

    _first_index = 0x8000_8000
    _alignments = (16, 4, 4)

    def _part_lengths(self) -> tuple[int, int, int]:
        return virtio.VIRTQ_DESC_SIZE * self.size, virtio.VIRTQ_EVENT_SIZE, virtio.VIRTQ_EVENT_SIZE

    def _start(self, first: int) -> None:
        self._next = self._used = Position.unpack(first >> 16)
        self._outstanding = 0  # slots
        self._heads: list[tuple[int, int]] = []  # not published: address and flags
        self._since = self._next
        self._added = 0  # slots since then

    @property
    def base(self) -> int:
        """The position of the first chain that is not used yet, for SET_VRING_BASE."""
        return self._used.pack() << 16 | self._used.pack()

    @property
    def free_descriptors(self) -> int:
        """The number of slots that are in no chain."""
        return self.size - self._outstanding

    def add(
        self,
        readable: Sequence[Segment],
        writable: Sequence[Segment] = (),
        *,
        indirect: bool | None = None,
    ) -> int:
        """Put a chain into the next slots; return its buffer id."""
        segments = [*readable, *writable]
        indirect, needed = self._fit(len(segments), indirect)
        chain = [
            (*segment, virtio.VIRTQ_DESC_F_WRITE if number >= len(readable) else 0)
            for number, segment in enumerate(segments)
        ]
        table = None
        if indirect:
            packed = b"".join(
                _DESCRIPTOR.pack(address, length, 0, flags) for address, length, flags in chain
            )
            table = self.memory.allocate(len(packed), 16)
            self.memory.write(table, packed)
            chain = [(table, len(packed), virtio.VIRTQ_DESC_F_INDIRECT)]
        identity = self._free.pop()
        slots = [self._next.advanced(number, self.size).slot for number in range(needed)]
        self.add_slots(identity, chain)
        self._chains[identity] = Chain(slots, table, sum(segment.length for segment in writable))
        return identity

    def add_slots(self, identity: int, chain: Sequence[tuple[int, int, int]]) -> None:
        """Store a chain of (address, length, flags) in the next slots, but the flags of its head.

        `publish` stores these. The caller manages the id of such a chain.
        """
        for number, (address, length, kind) in enumerate(chain, 1):
            following = virtio.VIRTQ_DESC_F_NEXT if number < len(chain) else 0
            flags = kind | following | self._next.available
            place = self._place(self._next.slot)
            self.memory.write(place, _DESCRIPTOR.pack(address, length, identity, flags)[:_FLAGS_AT])
            if number == 1:
                self._heads.append((place + _FLAGS_AT, flags))
            else:
                self.memory.store16(place + _FLAGS_AT, flags)
            self._next = self._next.advanced(1, self.size)
        self._outstanding += len(chain)
        self._added += len(chain)

    def publish(self) -> bool:
        """Make all added chains available to the device; return whether it wants a kick."""
        old, count = self._since, self._added
        for address, flags in reversed(self._heads):  # with the first one the device sees them all
            full_barrier()
            self.memory.store16(address, flags)
        self._heads.clear()
        self._since, self._added = self._next, 0
        full_barrier()
        event, asked_for = self.device_area
        if asked_for != virtio.RING_EVENT_FLAGS_DESC or not self.event_idx:
            return asked_for != virtio.RING_EVENT_FLAGS_DISABLE
        asked = Position.unpack(event)
        place = asked.slot + (0 if asked.wrap == old.wrap else self.size)
        return old.slot <= place < old.slot + count

    def collect(self) -> list[Used]:
        """The chains that were used since the last call; QueueError as of a split ring."""
        found = []
        while self._chains:
            place = self._place(self._used.slot)
            if self.memory.load16(place + _FLAGS_AT) & AVAILABLE_OR_USED != self._used.used:
                break
            full_barrier()
            raw = self.memory.read(place + _LENGTH_AT, _LENGTH_AND_ID.size)
            length, identity = _LENGTH_AND_ID.unpack(raw)
            chain = self._chains.get(identity)
            if chain is None:
                raise QueueError(f"the device returned buffer id {identity}: not in flight")
            used = Used(identity, length)
            self._forget(chain, used)
            self._used = self._used.advanced(len(chain.descriptors), self.size)
            self._outstanding -= len(chain.descriptors)
            self._free.append(identity)
            found.append(used)
        return found

    def _ask_for_call(self) -> None:
        if self.event_idx:
            self.set_driver_area(self._used.pack(), virtio.RING_EVENT_FLAGS_DESC)
        else:
            self.set_driver_area(0, virtio.RING_EVENT_FLAGS_ENABLE)
        full_barrier()

    def suppress_calls(self) -> None:
        """Ask the device for no notifications, until the next wait()."""
        self.set_driver_area(0, virtio.RING_EVENT_FLAGS_DISABLE)

    # Raw access

    def _place(self, slot: int) -> int:
        return self.descriptor_table + virtio.VIRTQ_DESC_SIZE * slot

    def read_slot(self, slot: int) -> tuple[int, ...]:
        """Address, length, id and flags of a slot."""
        raw = self.memory.read(self._place(slot), virtio.VIRTQ_DESC_SIZE)
        return _DESCRIPTOR.unpack(raw)

    def write_slot(self, slot: int, address: int, length: int, identity: int, flags: int) -> None:
        """Store any descriptor in a slot."""
        self.memory.write(self._place(slot), _DESCRIPTOR.pack(address, length, identity, flags))

    def set_driver_area(self, position: int, flags: int) -> None:
        """Store the driver event area: when the driver wants a call."""
        self.memory.store32(self.available_ring, position | flags << 16)

    @property
    def device_area(self) -> tuple[int, int]:
        """Position and flags of the device event area: when the device wants a kick."""
        value = self.memory.load32(self.used_ring)
        return value & 0xFFFF, value >> 16


def make_ring(
    memory: GuestMemory, size: int = 64, *, features: int = 0, first_index: int | None = None
) -> Ring:
    """A ring of the format that was negotiated."""
    packed = features >> virtio.VIRTIO_F_RING_PACKED & 1
    kind = PackedRing if packed else Ring
    return kind(memory, size, features=features, first_index=first_index)
