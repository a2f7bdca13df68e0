# SPDX-License-Identifier: Apache-2.0
"""The record of one ring in an in-flight region (vhost-user, "Inflight I/O tracking").

The region outlives the process. A killed process leaves its stores in program order, so that order
is all that counts: see `vhost_rpmb.vhost_user.inflight` and `inflight_packed`, which read the
region after a start. The engine only writes it.
"""

from __future__ import annotations

import struct
import sys
from collections import deque
from collections.abc import Sequence

from vhost_rpmb._pure.memory import GuestMemory

__all__ = ["Inflight", "PackedInflight"]


class _Inflight:
    """The part that the records of both formats share.

    ``length``: of the record, in bytes. ``heads``: the chains to be served again, in this order.
    """

    def __init__(self, memory: GuestMemory, offset: int, length: int, heads: Sequence[int]) -> None:
        self.memory = memory
        self._offset = offset
        self._length = length
        self._counter = len(heads)  # those have the numbers below
        self._again = deque(heads)
        self._answered: list[int] = []

    def map(self) -> None:
        """Find the record in the region, whose memory is mapped."""
        found = self.memory._ring_part(self._offset, self._length, 8)
        assert found is not None
        self._bytes = found[1]
        self._halves = self._bytes.cast("H")
        self._words = self._bytes.cast("Q")

    def unmap(self) -> None:
        """Release the region."""
        self._words.release()
        self._halves.release()
        self._bytes.release()

    @property
    def waiting(self) -> int:
        """The number of chains that are still to be served again."""
        return len(self._again)

    def take_back(self, head: int) -> None:
        """Serve a chain that was taken again, before all others; it stays in flight."""
        self._again.appendleft(head)


_HEADER = 16  # bytes
_ENTRY = 16  # bytes of each descriptor
# Positions in units of the field's size: of the header, and of the entry of descriptor 0.
_LAST_BATCH_HEAD, _USED_INDEX = 6, 7
_TAKEN, _NEXT, _COUNTER = 16, 11, 3


class Inflight(_Inflight):
    """The record of a split ring of ``size`` descriptors at ``offset`` of the region ``memory``.

    ``last``: the head that the record names as the last one answered. ``heads``: those to be served
    again, in this order, before any other.
    """

    def __init__(
        self, memory: GuestMemory, offset: int, size: int, last: int, heads: Sequence[int]
    ) -> None:
        super().__init__(memory, offset, _HEADER + _ENTRY * size, heads)
        self._last = last

    def take_again(self) -> int:
        """Return the next head to be served again; the region has it in flight already."""
        return self._again.popleft()

    def take(self, head: int) -> None:
        """Record that a chain is in flight."""
        self._words[_COUNTER + _ENTRY // 8 * head] = self._counter
        self._counter += 1
        self._bytes[_TAKEN + _ENTRY * head] = 1

    def put(self, head: int) -> None:
        """Record a chain of the batch that is published next."""
        self._halves[_NEXT + _ENTRY // 2 * head] = self._last
        self._halves[_LAST_BATCH_HEAD] = head
        self._last = head
        self._answered.append(head)

    def published(self, used_index: int) -> None:
        """Record that the batch is published, after the used index was stored."""
        for head in self._answered:
            self._bytes[_TAKEN + _ENTRY * head] = 0
        self._answered.clear()
        self._halves[_USED_INDEX] = used_index


_PACKED_HEADER = 32  # bytes
_PACKED_ENTRY = 32  # bytes of each descriptor
# Positions in units of the field's size: of the header, and of entry 0.
_FREE_HEAD, _OLD_FREE_HEAD, _USED_SLOT, _BOTH_USED = 6, 7, 8, 2
_PACKED_TAKEN, _FOLLOWING, _LAST, _NUM, _PACKED_COUNTER = 32, 17, 18, 19, 5
_USED_WRAP = 20
_COPY_AT = 48
_USED = struct.Struct("=HHBB2x")  # used_idx, old_used_idx, and both wrap counters
_HEADER_FIELDS = struct.Struct("=12xH2xH2xB")  # free_head, used_idx, used_wrap_counter
_ENTRY_FIELDS = struct.Struct("=2xHHH")  # next, last, num
_COPY = struct.Struct("=HHIQ")  # id, flags, len, addr
_DESCRIPTOR = struct.Struct("<QIHH")  # in the ring: addr, len, id, flags


class PackedInflight(_Inflight):
    """The record of a packed ring of ``size`` descriptors at ``offset`` of the region ``memory``.

    ``record``: the bytes of the record, checked; what the region has by now is not read. ``heads``:
    the first entries of the chains to be served again, in this order, before any other. ``used``:
    the ring's used position, as in a vring base; ``slots``: how many slots from there on those
    chains have.
    """

    def __init__(
        self, memory: GuestMemory, offset: int, size: int, record: bytes, heads: Sequence[int]
    ) -> None:
        super().__init__(memory, offset, _PACKED_HEADER + _PACKED_ENTRY * size, heads)
        free, slot, wrap = _HEADER_FIELDS.unpack_from(record)
        self.used = self._used = slot | wrap << 15
        self._free: int = free
        places = range(_PACKED_HEADER, self._length, _PACKED_ENTRY)
        entries = [_ENTRY_FIELDS.unpack_from(record, place) for place in places]
        self._following = [following for following, _, _ in entries]
        self._last = [last for _, last, _ in entries]
        self._copies: dict[int, list[bytes]] = {}  # of the chains in flight
        for head in heads:
            entry, self._copies[head] = head, []
            for _ in range(entries[head][2]):
                place = _COPY_AT + _PACKED_ENTRY * entry
                identity, flags, length, address = _COPY.unpack_from(record, place)
                self._copies[head].append(_DESCRIPTOR.pack(address, length, identity, flags))
                entry = self._following[entry]
        self.slots = sum(len(copies) for copies in self._copies.values())

    def take_again(self) -> tuple[int, list[bytes]]:
        """Return the next chain to be served again: its entry, and its descriptors."""
        head = self._again.popleft()
        return head, self._copies[head]

    def take(self, descriptors: list[bytes]) -> int:
        """Record that a chain is in flight; return its first entry."""
        entry = self._free
        head = entry
        at = _PACKED_ENTRY // 2 * head
        self._halves[_NUM + at] = 0
        self._words[_PACKED_COUNTER + _PACKED_ENTRY // 8 * head] = self._counter
        self._counter += 1
        self._bytes[_PACKED_TAKEN + _PACKED_ENTRY * head] = 1
        for number, descriptor in enumerate(descriptors, 1):
            entry = self._free
            address, length, identity, flags = _DESCRIPTOR.unpack(descriptor)
            place = _COPY_AT + _PACKED_ENTRY * entry
            self._bytes[place : place + _COPY.size] = _COPY.pack(identity, flags, length, address)
            self._halves[_NUM + at] = number
            self._free = self._following[entry]
            self._halves[_FREE_HEAD] = self._free
        self._last[head] = entry
        self._halves[_LAST + at] = entry
        self._halves[_OLD_FREE_HEAD] = self._free
        self._copies[head] = descriptors
        return head

    def put(self, head: int, used: int) -> None:
        """Record a chain of the batch that is published next, and the used position behind it."""
        last = self._last[head]
        self._following[last] = self._free
        self._halves[_FOLLOWING + _PACKED_ENTRY // 2 * last] = self._free
        self._free = head
        self._halves[_FREE_HEAD] = head
        self._used = used
        self._halves[_USED_SLOT] = used & 0x7FFF
        self._bytes[_USED_WRAP] = used >> 15
        self._answered.append(head)

    def published(self) -> None:
        """Record that the batch is published, after the flags of its first descriptor."""
        for head in self._answered:
            self._bytes[_PACKED_TAKEN + _PACKED_ENTRY * head] = 0
            del self._copies[head]
        self._answered.clear()
        self._halves[_OLD_FREE_HEAD] = self._free
        slot, wrap = self._used & 0x7FFF, self._used >> 15
        both = _USED.pack(slot, slot, wrap, wrap)
        self._words[_BOTH_USED] = int.from_bytes(both, sys.byteorder)  # in one store
