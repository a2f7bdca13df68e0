# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The device side of a split virtqueue (virtio specification, "Split Virtqueues").

The guest may change any byte at any moment, so each is read once: a descriptor is copied, then
checked, then used.
"""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.memory cimport GuestMemory

from vhost_rpmb.virtio import rules

__all__ = ["Virtqueue"]

cdef extern from "ring.h":
    uint16_t load_index(const unsigned char *) noexcept nogil
    void store_index(unsigned char *, uint16_t) noexcept nogil
    void full_barrier() noexcept nogil
    cdef struct descriptor:
        uint64_t address
        uint32_t length
        uint16_t flags
        uint16_t next
    void load_descriptor(descriptor *, const unsigned char *) noexcept nogil
    void store_used(unsigned char *, uint32_t, uint32_t) noexcept nogil

cdef uint64_t _MAX_CHAIN_BYTES = <uint64_t>1 << 32


@cython.final
cdef class Virtqueue:
    """One split virtqueue as its device sees it.

    ``error`` is empty, or says why the ring is broken: nothing is processed any more until
    set_base() or reset().
    """

    def __init__(self, GuestMemory memory not None):
        self.memory = memory
        self.reset()

    def reset(self):
        """Forget everything but the guest memory: the state of a new queue."""
        self.size = 0
        self.set_addresses(0, 0, 0)
        self.set_features(0)
        self.watched = False
        self.take_faults()
        self.set_base(0)

    def set_size(self, size):
        """Set the number of descriptors; ValueError unless a power of two from 1 to 32768."""
        if not 0 < size <= VIRTQ_MAX_SIZE or size & (size - 1):
            raise ValueError(f"a queue size is a power of two from 1 to 32768, not {size}")
        self.size = size
        self.descriptors = NULL

    def set_addresses(self, descriptor_table, available_ring, used_ring):
        """Set the user addresses of the three parts; the next batch finds out what they hold."""
        self.addresses[0] = descriptor_table
        self.addresses[1] = available_ring
        self.addresses[2] = used_ring
        self.descriptors = NULL

    def set_base(self, index):
        """Set the available index to go on from, 0 to 65535; a broken queue works again."""
        if not 0 <= index <= 0xFFFF:
            raise ValueError(f"an available index has 16 bits, {index} has more")
        self.next_available = index
        self.next_used = 0
        self.started = False
        self.rule = RING_OK

    def set_features(self, features):
        """Set the negotiated virtio feature bits."""
        self.indirect = bool(features >> VIRTIO_F_INDIRECT_DESC & 1)
        self.event_index = bool(features >> VIRTIO_F_EVENT_IDX & 1)

    @property
    def base(self):
        """The available index that the next batch begins at."""
        return self.next_available

    @property
    def error(self):
        """Why the ring is broken; empty while it is not."""
        return rules.RING_RULES[self.rule]

    def take_faults(self):
        """Return how often each rule was broken by a chain since the last call."""
        cdef int rule
        faults = {}
        for rule in range(NUM_CHAIN_RULES):
            if self.faults[rule]:
                faults[rules.CHAIN_RULES[rule]] = self.faults[rule]
                self.faults[rule] = 0
        self.faulty = False
        return faults

    cdef bint memory_lost(self) noexcept nogil:
        """Tell whether what was read so far may be made up, and break the ring then."""
        if not self.memory.lost():
            return False
        if not self.rule:
            self.rule = RING_MEMORY_LOST
        return True

    # For the loop of this engine.

    cdef bint peek(self) noexcept nogil:
        """Tell whether there is something to process, be it an error."""
        if self.rule or self._map_parts():
            return True
        return load_index(self.available + 2) != self.next_available or self.memory.lost()

    cdef bint arm(self) noexcept nogil:
        """Ask for a kick for the next chain; tell whether there is something to process already."""
        if not self.rule and not self._map_parts():
            self._ask_for_kick()
            full_barrier()
        return self.peek()

    # For the device of this engine, in this order: open, pop ..., push ..., close.

    cdef uint32_t open(self) noexcept nogil:
        """Look at the ring and return how many chains are available; 0 and a rule if broken."""
        cdef uint16_t available
        self.unpushed = 0
        self.walked = 0
        if self.rule:
            self.descriptors = NULL  # nothing has looked whether the ring is still mapped
            return 0
        self.rule = self._map_parts()
        if self.rule:
            return 0
        if not self.started:
            self.next_used = load_index(self.used + 2)
            self.started = True
        available = <uint16_t>(load_index(self.available + 2) - self.next_available)
        if self.memory_lost():
            return 0
        if available > self.size:
            self.rule = RING_AVAILABLE_INDEX
            return 0
        return available

    cdef int _map_parts(self) noexcept nogil:
        """Find the parts of the ring, if they or the memory table changed; return a ring rule."""
        cdef uint64_t size = self.size
        if self.descriptors != NULL and self.generation == self.memory.generation:
            return RING_OK
        self.descriptors = NULL
        if not size:
            return RING_NO_SIZE
        cdef unsigned char *descriptors = self.memory.ring_part(
            self.addresses[0], size * VIRTQ_DESC_SIZE, 16
        )
        if descriptors == NULL:
            return RING_DESCRIPTOR_TABLE
        self.available = self.memory.ring_part(self.addresses[1], 6 + 2 * size, 2)
        if self.available == NULL:
            return RING_AVAILABLE
        self.used = self.memory.ring_part(self.addresses[2], 6 + 8 * size, 4)
        if self.used == NULL:
            return RING_USED
        self.descriptors = descriptors
        self.generation = self.memory.generation
        return RING_OK

    cdef bint pop(
        self,
        Chain *chain,
        Segments *readable,
        uint64_t max_readable,
        Segments *writable,
        uint64_t max_writable,
    ) except -1 nogil:
        """Take the next available chain; False (and a rule) if its head breaks the ring.

        The pieces of its buffers are appended to ``readable`` and ``writable``, as far as the first
        ``max_readable`` and ``max_writable`` bytes; the lengths in ``chain`` are of all of them. A
        broken chain appends nothing.
        """
        cdef size_t slot = self.next_available & (self.size - 1)
        cdef uint16_t head = load_index(self.available + 4 + 2 * slot)
        cdef size_t old_readable = readable.count
        cdef size_t old_writable = writable.count
        cdef int rule
        if head >= self.size:
            if not self.memory_lost():
                self.rule = RING_HEAD
            return False
        self.next_available += 1
        chain.head = head
        chain.readable = 0
        chain.writable = 0
        rule = self._walk(chain, readable, max_readable, writable, max_writable)
        chain.broken = rule != CHAIN_GOOD
        if chain.broken:
            self.faults[rule] += 1
            self.faulty = True
            chain.readable = 0
            chain.writable = 0
            readable.count = old_readable
            writable.count = old_writable
        return True

    cdef int _walk(
        self,
        Chain *chain,
        Segments *readable,
        uint64_t max_readable,
        Segments *writable,
        uint64_t max_writable,
    ) except -2 nogil:
        """Follow a chain through the descriptor table and at most one indirect table.

        Return CHAIN_GOOD, or the rule that the chain breaks.
        """
        cdef descriptor entry
        cdef unsigned char raw[VIRTQ_DESC_SIZE]
        cdef bint indirect = False
        cdef uint64_t table = 0
        cdef uint32_t index = chain.head
        cdef uint32_t entries = self.size
        cdef uint32_t count = 0
        cdef uint64_t total = 0
        cdef uint64_t wanted
        cdef int rule
        self.crossings = 0
        while True:
            self.walked += 1
            if indirect:
                if not self.memory.copy_out(raw, table + index * VIRTQ_DESC_SIZE, VIRTQ_DESC_SIZE):
                    return CHAIN_INDIRECT_TABLE
                load_descriptor(&entry, raw)
            else:
                load_descriptor(&entry, self.descriptors + index * VIRTQ_DESC_SIZE)
            if entry.flags & VIRTQ_DESC_F_INDIRECT:
                if not self.indirect:
                    return CHAIN_INDIRECT_FEATURE
                if indirect or entry.flags & VIRTQ_DESC_F_NEXT:
                    return CHAIN_INDIRECT_FLAGS
                if not entry.length or entry.length % VIRTQ_DESC_SIZE:
                    return CHAIN_INDIRECT_LENGTH
                if entry.length // VIRTQ_DESC_SIZE > self.size:
                    return CHAIN_INDIRECT_SIZE
                rule = self._add_buffer(NULL, entry.address, entry.length, 0)
                if rule != CHAIN_GOOD:
                    return CHAIN_INDIRECT_TABLE if rule == CHAIN_BUFFER else rule
                indirect = True
                table = entry.address
                index = 0
                entries = entry.length // VIRTQ_DESC_SIZE
                continue
            count += 1
            if count > self.size:
                return CHAIN_TOO_LONG
            if not entry.length:
                return CHAIN_EMPTY_DESCRIPTOR
            total += entry.length
            if total > _MAX_CHAIN_BYTES:
                return CHAIN_BYTES
            if entry.flags & VIRTQ_DESC_F_WRITE:
                wanted = max_writable - min(max_writable, chain.writable)
                chain.writable += entry.length
                rule = self._add_buffer(writable, entry.address, entry.length, wanted)
            elif chain.writable:
                return CHAIN_ORDER
            else:
                wanted = max_readable - min(max_readable, chain.readable)
                chain.readable += entry.length
                rule = self._add_buffer(readable, entry.address, entry.length, wanted)
            if rule != CHAIN_GOOD:
                return rule
            if not entry.flags & VIRTQ_DESC_F_NEXT:
                return CHAIN_GOOD
            if entry.next >= entries:
                return CHAIN_NEXT
            index = entry.next

    cdef int _add_buffer(
        self, Segments *segments, uint64_t address, uint64_t length, uint64_t wanted
    ) except -2 nogil:
        """Check that a buffer lies in the regions, without too many borders in the chain so far.

        Append the pieces of its first ``wanted`` bytes. Return CHAIN_GOOD, CHAIN_BUFFER or
        CHAIN_CROSSINGS.
        """
        cdef uint64_t left = 0
        cdef unsigned char *host
        while True:
            host = self.memory.find(address, &left)
            if host == NULL:
                return CHAIN_BUFFER
            left = min(left, length)
            if wanted:
                _append(segments, host, min(left, wanted))
                wanted -= min(left, wanted)
            length -= left
            if not length:
                return CHAIN_GOOD
            address += left
            self.walked += 1
            self.crossings += 1
            if self.crossings > MAX_CROSSINGS:
                return CHAIN_CROSSINGS

    cdef void push(self, uint16_t head, uint32_t length) noexcept nogil:
        """Return a chain, ``length`` bytes of which were written; visible after close()."""
        cdef size_t slot = (self.next_used + self.unpushed) & (self.size - 1)
        store_used(self.used + 4 + 8 * slot, head, length)
        self.unpushed += 1

    cdef int close(self, bint drained) noexcept nogil:
        """Publish what was pushed; return the flags that this asks for.

        ``drained``: everything available was popped, so the driver shall kick for the next chain.
        """
        cdef int flags = 0
        cdef uint16_t old = self.next_used
        if self.descriptors != NULL and not self.memory_lost():
            if self.unpushed:
                self.next_used = <uint16_t>(old + self.unpushed)
                store_index(self.used + 2, self.next_used)
            if drained and not self.rule:
                if self.watched:
                    self._refuse_kicks()
                else:
                    self._ask_for_kick()
            full_barrier()
            if self.unpushed and self._wants_notification(old):
                flags |= NOTIFY
            if load_index(self.available + 2) != self.next_available:
                flags |= MORE
        if self.faulty:
            flags |= FAULTS
        self.memory_lost()
        if self.rule:
            flags = (flags & ~MORE) | BROKEN
        return flags

    cdef void _ask_for_kick(self) noexcept nogil:
        """Ask for an available buffer notification for the next chain."""
        if self.event_index:
            store_index(self.used + 4 + 8 * <size_t>self.size, self.next_available)
        else:
            store_index(self.used, 0)

    cdef void _refuse_kicks(self) noexcept nogil:
        """Ask for none; with the event index, the one before last stays asked for, and is past."""
        if not self.event_index:
            store_index(self.used, VIRTQ_USED_F_NO_NOTIFY)

    cdef bint _wants_notification(self, uint16_t old) noexcept nogil:
        """Tell whether the driver asked to hear of the step from ``old`` to the used index."""
        cdef uint16_t event
        if not self.event_index:
            return not load_index(self.available) & VIRTQ_AVAIL_F_NO_INTERRUPT
        event = load_index(self.available + 4 + 2 * <size_t>self.size)
        return <uint16_t>(self.next_used - event - 1) < <uint16_t>(self.next_used - old)


cdef int _append(Segments *segments, unsigned char *host, uint64_t length) except -1 nogil:
    cdef size_t capacity
    cdef Segment *items
    if segments.count == segments.capacity:
        capacity = 2 * segments.capacity + 64
        items = <Segment *>realloc(segments.items, capacity * sizeof(Segment))
        if items == NULL:
            with gil:
                raise MemoryError()
        segments.items = items
        segments.capacity = capacity
    segments.items[segments.count].host = host
    segments.items[segments.count].length = length
    segments.count += 1
    return 0
