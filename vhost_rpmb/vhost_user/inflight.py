# SPDX-License-Identifier: Apache-2.0
"""The in-flight region: memory of the front-end that outlives this process (INFLIGHT_SHMFD).

It records, for each vring, the chains that were taken and not answered; of a packed ring in the
layout of `vhost_rpmb.vhost_user.inflight_packed`. The layout of a split
ring's record, in the byte order of the machine, is that of the vhost-user text:

    0 u64 features (0), 8 u16 version (0: fresh, 1), 10 u16 desc_num, 12 u16 last_batch_head,
    14 u16 used_idx, then for each descriptor 16 bytes:
    0 u8 inflight, 6 u16 next, 8 u64 counter

An engine (`vhost_rpmb._pure.inflight`) stores in this order; a killed process leaves its stores
in program order, and nobody else accesses the region meanwhile:

- Taking a chain: its counter, then inflight = 1.
- Publishing a batch: the used elements, and for each chain next = last_batch_head and
  last_batch_head = head; the used index of the ring; inflight = 0 for each; used_idx.

So where used_idx is behind the ring's used index, the list from last_batch_head on has the chains
of a batch that was published, although some may still be marked. `recover` completes that. The
marked chains are to be served again, in the order of their counters. The next index in the
available ring follows from the used index and their number; SET_VRING_BASE is ignored, because
front-ends send different things there after a crash.

A region is read once, at the start of a vring, into private memory; a front-end that rewrites it
later changes nothing before the next start.
"""

from __future__ import annotations

import mmap
import struct

from vhost_rpmb import memfd
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.virtio import spec as virtio

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Memory

__all__ = [
    "VERSION",
    "InvalidRecordError",
    "Record",
    "Recovery",
    "Region",
    "check_header",
    "check_marks",
    "create",
    "stride",
]

_HEADER = struct.Struct("=QHHHH")  # features, version, desc_num, last_batch_head, used_idx
_ENTRY = struct.Struct("=B5xHQ")  # inflight, next, counter
_VERSION_AT = 8
_USED_INDEX = 14  # offset of used_idx
_COUNTER = 8  # offset in an entry
VERSION = 1
_U16 = struct.Struct("=H")
_U64 = struct.Struct("=Q")


def stride(queue_size: int) -> int:
    """Bytes of the record of one vring: room for that of a split and of a packed ring."""
    return (32 + 32 * queue_size + 63) & ~63


def create(num_queues: int, queue_size: int) -> tuple[wire.InflightDescription, int]:
    """Create a region; return its description and its descriptor, which the caller closes."""
    size = num_queues * stride(queue_size)
    return wire.InflightDescription(size, 0, num_queues, queue_size), memfd.create("inflight", size)


class InvalidRecordError(Exception):
    """A record breaks a rule: it is not what a back-end leaves behind."""


class Recovery(NamedTuple):
    """The state of a vring that follows from its record.

    ``base``: the next index in the available ring, behind ``heads``, which are to be served again.
    ``last``: the head that was answered last. ``cleared``: the record was of another ring.
    """

    base: int
    heads: tuple[int, ...]
    last: int
    cleared: bool


class Region:
    """A region that the front-end sent, mapped as the single region of ``memory``."""

    def __init__(self, memory: Memory, description: wire.InflightDescription, fd: int) -> None:
        """Map it; ValueError or OSError. The descriptor stays the caller's."""
        size, offset, num_queues, queue_size = description
        if not 0 < queue_size <= virtio.VIRTQ_MAX_SIZE:
            raise ValueError(f"expected a queue size of 1 to 32768, found {queue_size}")
        needed = num_queues * stride(queue_size)
        if size < needed:
            raise ValueError(f"expected an in-flight region of {needed} bytes, found {size}")
        if offset % mmap.ALLOCATIONGRANULARITY:
            raise ValueError(f"expected an offset of whole pages, found {offset}")
        # By its description it may be larger than its file, but is used to this length only.
        memory.add_region(0, needed, 0, offset, fd)
        self.memory = memory
        self._length = needed
        self._num_queues = num_queues
        self._queue_size = queue_size

    def record(self, index: int) -> Record | None:
        """The record of a vring; None if the region has none."""
        if index >= self._num_queues:
            return None
        return Record(self.memory, index * stride(self._queue_size), self._queue_size)

    def clear(self) -> None:
        """Fill it with zeros: a fresh region."""
        self.memory.write(0, bytes(self._length))

    def close(self) -> None:
        """Unmap it; no virtqueue uses it any more."""
        self.memory.clear()


def check_header(features: int, version: int, count: int, size: int) -> None:
    """InvalidRecordError unless the record of a ring of ``size`` begins so, in either layout."""
    for name, expected, found in (
        ("version", VERSION, version),
        ("feature bits", 0, features),
        ("number of descriptors", size, count),
    ):
        if found != expected:
            raise InvalidRecordError(f"expected {name} {expected}, found {found}")


def check_marks(marks: set[int]) -> None:
    """InvalidRecordError unless these are marks of entries."""
    if marks - {0, 1}:
        raise InvalidRecordError(f"expected inflight 0 or 1, found {max(marks)}")


class Record:
    """The record of one vring, at ``offset`` of the region."""

    def __init__(self, memory: Memory, offset: int, queue_size: int) -> None:
        self.memory = memory
        self.offset = offset
        self._queue_size = queue_size

    def check_size(self, size: int) -> None:
        """InvalidRecordError if it has no room for a ring of ``size`` descriptors."""
        if size > self._queue_size:
            raise InvalidRecordError(
                f"expected a record for {size} descriptors, found room for {self._queue_size}"
            )

    def read(self, length: int) -> bytes:
        """Return its first bytes."""
        return self.memory.read(self.offset, length)

    def store(self, offset: int, data: bytes) -> None:
        """Store bytes in it."""
        self.memory.write(self.offset + offset, data)

    def clear(self) -> None:
        """Make it fresh: the ring begins where SET_VRING_BASE says."""
        self.store(_VERSION_AT, _U16.pack(0))

    def recover(self, size: int, used_index: int, base: int) -> Recovery:
        """Return the state of a split ring of this size, and complete what was interrupted.

        ``used_index``: of the ring. ``base``: by SET_VRING_BASE. InvalidRecordError changes
        nothing. May be interrupted at any store itself.
        """
        self.check_size(size)
        raw = self.read(_HEADER.size + size * _ENTRY.size)
        features, version, count, last, recorded = _HEADER.unpack_from(raw)
        if not version:
            return self._initialise(size, used_index, base)
        check_header(features, version, count, size)
        if last >= size:
            raise InvalidRecordError(f"expected a head below {size}, found {last}")
        entries = [_ENTRY.unpack_from(raw, offset) for offset in _places(size)]
        check_marks({mark for mark, _, _ in entries})
        ahead = (used_index - recorded) & 0xFFFF
        if ahead > size:
            return self._clear(size, used_index, base)
        published = _walk([following for _, following, _ in entries], last, ahead)
        marked = sorted(
            (counter, head)
            for head, (mark, _, counter) in enumerate(entries)
            if mark and head not in published
        )
        if len({counter for counter, _ in marked}) < len(marked):
            raise InvalidRecordError("expected different counters, found two that are equal")
        heads = tuple(head for _, head in marked)
        for head in published:
            self.store(_HEADER.size + head * _ENTRY.size, b"\0")
        self.store(_USED_INDEX, _U16.pack(used_index))
        # From 0 on, so that no counter ever reaches its end. Each one shrinks or stays, which keeps
        # their order at any interruption.
        for counter, head in enumerate(heads):
            self.store(_HEADER.size + head * _ENTRY.size + _COUNTER, _U64.pack(counter))
        return Recovery((used_index + len(heads)) & 0xFFFF, heads, last, cleared=False)

    def _initialise(self, size: int, used_index: int, base: int) -> Recovery:
        """Begin a fresh record; its version is stored last."""
        # Of what lies between the used index and the base nothing was answered, and a back-end that
        # answers in order leaves nothing there when it stops: it was killed before it came here.
        if (base - used_index) & 0xFFFF <= size:
            base = used_index
        self.store(0, _HEADER.pack(0, 0, size, 0, used_index) + bytes(size * _ENTRY.size))
        self.store(_VERSION_AT, _U16.pack(VERSION))
        return Recovery(base, (), 0, cleared=False)

    def _clear(self, size: int, used_index: int, base: int) -> Recovery:
        """Begin a record anew that does not fit the ring's used index."""
        self.store(_HEADER.size, bytes(size * _ENTRY.size))
        self.store(_USED_INDEX, _U16.pack(used_index))
        return Recovery(base, (), 0, cleared=True)


def _places(size: int) -> range:
    return range(_HEADER.size, _HEADER.size + size * _ENTRY.size, _ENTRY.size)


def _walk(following: list[int], head: int, count: int) -> set[int]:
    """The first ``count`` heads of the list that begins at ``head``."""
    found: set[int] = set()
    for _ in range(count):
        if head >= len(following):
            raise InvalidRecordError(f"expected a head below {len(following)}, found {head}")
        if head in found:
            raise InvalidRecordError(f"expected a list of {count} heads, found a loop at {head}")
        found.add(head)
        head = following[head]
    return found
