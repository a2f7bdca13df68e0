# SPDX-License-Identifier: Apache-2.0
"""Driver side of a split virtqueue (virtio specification, "Split Virtqueues").

`Ring.add`, `Ring.flush` and `Ring.wait` are the operations of a conforming driver. The methods
under "Raw access" store any value, so that tests can build malformed rings.
"""

import os
import select
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.errors import BackendError, QueueError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.virtio import spec as virtio

_DESCRIPTOR = struct.Struct("<QIHH")
_USED_ELEMENT = struct.Struct("<II")
_AVAILABLE_RING = 4  # bytes: flags and index come first
_USED_RING = 4  # bytes, the same

_lock = threading.Lock()


def full_barrier() -> None:
    """Order all loads and stores before against all after it, as other processes see them.

    Locking a CPython lock is an atomic acquire, unlocking it an atomic release, each of them a
    full barrier on x86. On machines with weaker ordering an acquire is not moved ahead of an
    earlier release, so the second round orders everything before the first against all after.
    """
    for _ in range(2):
        _lock.acquire()
        _lock.release()


class Segment(NamedTuple):
    """A piece of guest memory: guest physical address and length in bytes."""

    address: int
    length: int


class Used(NamedTuple):
    """A used ring element: the head index of the chain and the bytes written into it."""

    head: int
    length: int


class Chain(NamedTuple):
    """A chain that is not used yet: its descriptors in the ring, and its room for an answer."""

    descriptors: list[int]
    indirect_table: int | None
    writable: int  # bytes


class Ring(Closing):
    """A split virtqueue of ``size`` descriptors in guest memory, with its eventfds.

    ``features`` are the negotiated feature bits: with VIRTIO_F_INDIRECT_DESC chains of two and
    more segments go through an indirect table, with VIRTIO_F_EVENT_IDX notifications follow the
    event index. ``first_index`` is where both ring indices start. A context manager.
    """

    _first_index = 0
    _alignments = (16, 2, 4)  # of the three parts

    def __init__(
        self,
        memory: GuestMemory,
        size: int = 64,
        *,
        features: int = 0,
        first_index: int | None = None,
    ) -> None:
        self.memory = memory
        self.size = size
        self.indirect = bool(features >> virtio.VIRTIO_F_INDIRECT_DESC & 1)
        self.event_idx = bool(features >> virtio.VIRTIO_F_EVENT_IDX & 1)
        self._fds: list[int] = []
        self._broken = False  # the error eventfd was signalled since the last reset
        # Edge-triggered, so that the eventfds are never read: the back-end shares their flags and
        # counters, and could make a read block.
        self._events = select.epoll()
        self._lengths = self._part_lengths()
        self.descriptor_table, self.available_ring, self.used_ring = map(
            memory.allocate, self._lengths, self._alignments
        )
        self._chains: dict[int, Chain] = {}
        self._offered: Counter[int] = Counter()
        self.reset(first_index)
        try:
            for _ in range(3):
                self._fds.append(os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK))
        except BaseException:
            self.close()
            raise
        self.kick_fd, self.call_fd, self.error_fd = self._fds
        self._room = select.poll()
        self._room.register(self.kick_fd, select.POLLOUT)
        for fd in (self.call_fd, self.error_fd):
            self._events.register(fd, select.EPOLLIN | select.EPOLLET)

    def _part_lengths(self) -> tuple[int, int, int]:
        return virtio.VIRTQ_DESC_SIZE * self.size, 6 + 2 * self.size, 6 + 8 * self.size

    def close(self) -> None:
        """Close the eventfds and free the ring memory."""
        self._events.close()
        while self._fds:
            os.close(self._fds.pop())
        self._drop_chains()
        for address in (self.descriptor_table, self.available_ring, self.used_ring):
            self.memory.free(address)

    def reset(self, first_index: int | None = None) -> None:
        """Drop all chains and signals of the device, and zero the ring memory.

        Only while the back-end has the vring stopped.
        """
        first = self._first_index if first_index is None else first_index
        self._drop_chains()
        self._consume_events()
        self._broken = False
        addresses = (self.descriptor_table, self.available_ring, self.used_ring)
        for address, length in zip(addresses, self._lengths, strict=True):
            self.memory.write(address, bytes(length))
        self._free = list(reversed(range(self.size)))
        self._start(first)

    def _start(self, first: int) -> None:
        """Begin at an index, in memory of zeros."""
        self._next_available = first
        self._published = first
        self._next_used = first
        self.memory.store16(self.available_ring + 2, first)
        self.memory.store16(self.used_ring + 2, first)

    # Operations of a driver

    @property
    def base(self) -> int:
        """The index of the first chain that is not used yet, for SET_VRING_BASE."""
        return self._next_used

    @property
    def free_descriptors(self) -> int:
        """The number of entries of the descriptor table that are in no chain."""
        return len(self._free)

    @property
    def in_flight(self) -> int:
        """The number of chains that were added or offered and are not used yet."""
        return len(self._chains) + self._offered.total()

    def add(
        self,
        readable: Sequence[Segment],
        writable: Sequence[Segment] = (),
        *,
        indirect: bool | None = None,
    ) -> int:
        """Put a chain into the descriptor table and the available ring; return its head index.

        The device does not see it before `publish` or `flush`. ``indirect`` overrides the choice
        by the features. QueueError when too few descriptors are free.
        """
        segments = [*readable, *writable]
        indirect, needed = self._fit(len(segments), indirect)
        table = (
            self.memory.allocate(virtio.VIRTQ_DESC_SIZE * len(segments), 16) if indirect else None
        )
        indices = [self._free.pop() for _ in range(needed)]
        links = range(len(segments)) if indirect else indices
        for position, segment in enumerate(segments):
            last = position == len(segments) - 1
            flags = 0 if last else virtio.VIRTQ_DESC_F_NEXT
            if position >= len(readable):
                flags |= virtio.VIRTQ_DESC_F_WRITE
            self.write_descriptor(
                links[position],
                segment.address,
                segment.length,
                flags,
                0 if last else links[position + 1],
                table=table,
            )
        head = indices[0]
        if table is not None:
            length = virtio.VIRTQ_DESC_SIZE * len(segments)
            self.write_descriptor(head, table, length, virtio.VIRTQ_DESC_F_INDIRECT, 0)
        self._chains[head] = Chain(indices, table, sum(segment.length for segment in writable))
        self._append(head)
        return head

    def _fit(self, segments: int, indirect: bool | None) -> tuple[bool, int]:
        """Whether a chain is in an indirect table, and its descriptors; QueueError: too many."""
        if indirect is None:
            indirect = self.indirect and segments > 1
        needed = 1 if indirect else segments
        if not 0 < needed <= self.free_descriptors:
            raise QueueError(
                f"a chain of {needed} descriptors does not fit: {self.free_descriptors} of "
                f"{self.size} descriptors are free"
            )
        return indirect, needed

    def publish(self) -> bool:
        """Make all added chains available to the device; return whether it wants a kick."""
        old, new = self._published, self._next_available
        full_barrier()
        self.memory.store16(self.available_ring + 2, new)
        self._published = new
        full_barrier()
        if self.event_idx:
            return _need_event(self.available_event, new, old)
        return not self.used_flags & virtio.VIRTQ_USED_F_NO_NOTIFY

    def kick(self) -> None:
        """Signal the kick eventfd, requested or not; a full counter counts as signalled.

        The back-end shares its flags and its counter. If it clears O_NONBLOCK and fills the counter
        between poll and write, the write blocks until a signal interrupts it: BackendError then.
        """
        if not self._room.poll(0):
            return
        try:
            os.eventfd_write(self.kick_fd, 1)
        except BlockingIOError:
            pass  # full in the meantime
        except InterruptedError:
            raise BackendError("the back-end made a kick wait") from None

    def flush(self) -> None:
        """Publish all added chains and kick the device if it asks for that."""
        if self.publish():
            self.kick()

    def collect(self) -> list[Used]:
        """The chains that were used since the last call, without waiting.

        QueueError if the device returned a chain that was not in flight, or claims to have
        written more bytes than the chain has.
        """
        ahead = (self.used_index - self._next_used) & 0xFFFF
        if not ahead:
            return []
        if ahead > self.in_flight:
            raise QueueError(
                f"the used index moved by {ahead}, but only {self.in_flight} chains are in flight"
            )
        full_barrier()
        used = []
        for _ in range(ahead):
            element = self.used_element(self._next_used % self.size)
            self._next_used = (self._next_used + 1) & 0xFFFF
            self._retire(element)
            used.append(element)
        return used

    def wait(self, timeout: float, *, peer: int | None = None) -> list[Used]:
        """Chains that were used, at least one, in the device's order.

        Sleeps on the call eventfd. ``peer``: the vhost-user socket, to detect a disconnect.
        BackendError after ``timeout`` seconds or after a disconnect, QueueError if the error
        eventfd is signalled; chains that were used before that are returned first.
        """
        deadline = time.monotonic() + timeout
        poll = select.poll()
        poll.register(self._events, select.POLLIN)
        if peer is not None:
            poll.register(peer, select.POLLRDHUP)
        gone = False
        while True:
            self._ask_for_call()
            if used := self.collect():
                return used
            if self._broken:
                raise QueueError("the device reports the queue broken (error eventfd)")
            if gone:
                raise BackendError(
                    f"the back-end closed the connection with {self.in_flight} requests in flight"
                )
            left = deadline - time.monotonic()
            if left <= 0:
                raise BackendError(
                    f"the device did not answer a request within {timeout:g} s; "
                    f"{self.in_flight} in flight"
                )
            gone = any(fd == peer for fd, _events in poll.poll(left * 1000))
            self._consume_events()

    def _consume_events(self) -> None:
        """Consume the edges of the eventfds; a call has no further effect."""
        if any(fd == self.error_fd for fd, _events in self._events.poll(0)):
            self._broken = True

    def _ask_for_call(self) -> None:
        if self.event_idx:
            self.set_used_event(self._next_used)
        else:
            self.set_available_flags(0)
        full_barrier()

    def suppress_calls(self) -> None:
        """Ask the device for no notifications, until the next wait()."""
        if self.event_idx:
            # The index just passed is reached again after 65,536 chains only.
            self.set_used_event((self._next_used - 1) & 0xFFFF)
        else:
            self.set_available_flags(virtio.VIRTQ_AVAIL_F_NO_INTERRUPT)

    def _append(self, head: int) -> None:
        self.write_available(self._next_available % self.size, head)
        self._next_available = (self._next_available + 1) & 0xFFFF

    def _retire(self, used: Used) -> None:
        chain = self._chains.get(used.head)
        if chain is None:
            if not self._offered[used.head]:
                raise QueueError(f"the device returned head index {used.head}: not in flight")
            self._offered[used.head] -= 1
            return
        self._forget(chain, used)
        self._free += reversed(chain.descriptors)

    def _forget(self, chain: Chain, used: Used) -> None:
        """Forget a chain that was used; QueueError if more was written than it has room for."""
        if used.length > chain.writable:
            raise QueueError(
                f"expected at most {chain.writable} bytes written, found {used.length}"
            )
        del self._chains[used.head]
        if chain.indirect_table is not None:
            self.memory.free(chain.indirect_table)

    def _drop_chains(self) -> None:
        for chain in self._chains.values():
            if chain.indirect_table is not None:
                self.memory.free(chain.indirect_table)
        self._chains.clear()
        self._offered.clear()

    # Raw access

    def write_descriptor(
        self,
        index: int,
        address: int,
        length: int,
        flags: int = 0,
        next_index: int = 0,
        *,
        table: int | None = None,
    ) -> None:
        """Store a descriptor at ``index`` of the descriptor table, or of an indirect ``table``."""
        place = self.descriptor_table if table is None else table
        packed = _DESCRIPTOR.pack(address, length, flags, next_index)
        self.memory.write(place + virtio.VIRTQ_DESC_SIZE * index, packed)

    def offer(self, head: int) -> None:
        """Append any head index (16 bits) to the available ring; `publish` makes it visible.

        The caller manages the descriptors of such a chain.
        """
        self._offered[head] += 1
        self._append(head)

    def write_available(self, position: int, head: int) -> None:
        """Store a head index at ``position`` of the available ring."""
        self.memory.store16(self.available_ring + _AVAILABLE_RING + 2 * position, head)

    def set_available_index(self, index: int) -> None:
        """Store the available index; `add` and `publish` continue from it."""
        self._next_available = self._published = index
        full_barrier()
        self.memory.store16(self.available_ring + 2, index)

    def set_available_flags(self, flags: int) -> None:
        """Store the flags of the available ring."""
        self.memory.store16(self.available_ring, flags)

    def set_used_event(self, index: int) -> None:
        """Store used_event: the used index after which the driver wants a call."""
        self.memory.store16(self.available_ring + _AVAILABLE_RING + 2 * self.size, index)

    @property
    def used_index(self) -> int:
        """The index of the used ring, as the device stored it."""
        return self.memory.load16(self.used_ring + 2)

    @property
    def used_flags(self) -> int:
        """The flags of the used ring, as the device stored them."""
        return self.memory.load16(self.used_ring)

    @property
    def available_event(self) -> int:
        """avail_event: the available index after which the device wants a kick."""
        return self.memory.load16(self.used_ring + _USED_RING + 8 * self.size)

    def used_element(self, position: int) -> Used:
        """The element at ``position`` of the used ring."""
        raw = self.memory.read(self.used_ring + _USED_RING + 8 * position, _USED_ELEMENT.size)
        return Used(*_USED_ELEMENT.unpack(raw))


def _need_event(event: int, new: int, old: int) -> bool:
    """Whether moving an index from ``old`` to ``new`` passed ``event``, all modulo 65,536."""
    return (new - event - 1) & 0xFFFF < (new - old) & 0xFFFF
