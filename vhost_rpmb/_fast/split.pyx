# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.split, where the docstrings are."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.ring cimport CHAIN_GOOD, Answered, Buffers, Chain, Ring

__all__ = ["SplitRing"]

cdef extern from "ring.h" nogil:
    uint16_t load_index(const unsigned char *)
    void store_index(unsigned char *, uint16_t)
    cdef struct descriptor:
        uint64_t address
        uint32_t length
        uint16_t flags
        uint16_t next
    descriptor load_descriptor(const unsigned char *)
    void store_used(unsigned char *, uint32_t id, uint32_t length)


@cython.final
cdef class SplitRing(Ring):
    cdef uint32_t base(self) noexcept:
        if self.tracked:
            return <uint16_t>(self._next_available - self.inflight.waiting)
        return self._next_available

    cdef uint32_t used(self) noexcept nogil:
        return self._next_used if self._started else load_index(self._used + 2)

    cdef int set_base(self, uint32_t base) except -1:
        if base > 0xFFFF:
            raise ValueError(f"an available index has 16 bits, {base} has more")
        self.inflight = None
        self.region = None
        self.tracked = False
        self._next_available = <uint16_t>base
        self._next_used = 0
        self._published = 0
        self._unpublished = 0
        self._started = False
        return 0

    cdef int map(self) noexcept nogil:
        cdef uint64_t size = self.size
        cdef uint64_t address = 0
        if self.mapped and self.generation == self.memory.generation:
            return RING_OK
        self.mapped = False
        if not size:
            return RING_NO_SIZE
        if size & (size - 1):
            return RING_SPLIT_SIZE
        self._descriptors = self.memory.ring_part(
            self.addresses[0], size * VIRTQ_DESC_SIZE, 16, &address
        )
        if self._descriptors == NULL:
            return RING_DESCRIPTOR_TABLE
        self._available = self.memory.ring_part(self.addresses[1], 6 + 2 * size, 2, &address)
        if self._available == NULL:
            return RING_AVAILABLE
        self._used = self.memory.ring_part(self.addresses[2], 6 + 8 * size, 4, &address)
        if self._used == NULL:
            return RING_USED
        self.mapped = True
        self.generation = self.memory.generation
        return RING_OK

    cdef void resume(self, uint16_t used, Inflight inflight) noexcept:
        self._next_used = used
        self._published = used
        self._started = True
        self.inflight = inflight
        self.region = inflight.memory
        self.tracked = True

    cdef int look(self, uint32_t *available) noexcept nogil:
        self.walked = 0
        self._unpublished = 0
        if not self._started:
            self._next_used = load_index(self._used + 2)
            self._started = True
        available[0] = <uint16_t>(load_index(self._available + 2) - self._next_available)
        if self.tracked:
            available[0] += self.inflight.waiting
        return RING_AVAILABLE_INDEX if available[0] > self.size else RING_OK

    cdef int take(self, Chain *chain, Buffers *buffers) except -1 nogil:
        cdef size_t slot = self._next_available & (self.size - 1)
        cdef size_t readable = buffers.readable.count
        cdef size_t writable = buffers.writable.count
        cdef uint16_t head
        if self.tracked and self.inflight.waiting:
            head = self.inflight.take_again()
        else:
            head = load_index(self._available + 4 + 2 * slot)
            if head >= self.size:
                return RING_HEAD
            self._next_available += 1
            if self.tracked:
                self.inflight.take(head)
        chain.token = head
        chain.count = 0
        chain.readable = 0
        chain.writable = 0
        chain.fault = _walk(self, chain, buffers, head)
        if chain.fault != CHAIN_GOOD:
            chain.readable = 0
            chain.writable = 0
            buffers.readable.count = readable
            buffers.writable.count = writable
        return RING_OK

    cdef void mark(self) noexcept nogil:
        if self.marked:
            self._mark(0, 6 + 8 * <uint64_t>self.size)

    cdef void _mark_published(self) noexcept nogil:
        cdef uint64_t count = <uint16_t>(self._next_used - self._published)
        cdef uint64_t first = self._published & (self.size - 1)
        cdef uint64_t straight = min(count, self.size - first)
        self._mark(4 + 8 * first, 8 * straight)
        if straight < count:
            self._mark(4, 8 * (count - straight))

    cdef void _mark(self, uint64_t offset, uint64_t length) noexcept nogil:
        self.memory.mark_pages(self.marked_at + offset, length)

    cdef void take_back(self, uint64_t token) noexcept nogil:
        if self.tracked:
            self.inflight.take_back(<uint16_t>token)
        else:
            self._next_available -= 1

    cdef void put(self, const Answered *chains, size_t count) noexcept nogil:
        cdef uint32_t slot = self._next_used + self._unpublished
        cdef uint32_t last = self.size - 1
        cdef size_t index
        self.memory.touch(self._used, 6 + 8 * <uint64_t>self.size)
        for index in range(count):
            store_used(
                self._used + 4 + 8 * <size_t>(slot & last),
                <uint32_t>chains[index].token,
                chains[index].length,
            )
            slot += 1
            if self.tracked:
                self.inflight.put(<uint16_t>chains[index].token)
        self._unpublished += <uint32_t>count

    cdef uint32_t position(self) noexcept nogil:
        return <uint16_t>(self._next_used + self._unpublished)

    cdef void publish(self) noexcept nogil:
        self._published = self._next_used
        if self._unpublished:
            self._next_used = <uint16_t>(self._next_used + self._unpublished)
            self._unpublished = 0
            self._store_used(2, self._next_used)
            if self.marked:
                self._mark_published()
            if self.tracked:
                self.inflight.published(self._next_used)

    cdef void ask_for_kick(self) noexcept nogil:
        if self.event_index:
            self._store_used(4 + 8 * <size_t>self.size, self._next_available)
        else:
            self._store_used(0, 0)

    cdef void refuse_kicks(self) noexcept nogil:
        # With the event index, the event before the last one stays asked for, and is past.
        if not self.event_index:
            self._store_used(0, VIRTQ_USED_F_NO_NOTIFY)

    cdef void _store_used(self, size_t offset, uint16_t value) noexcept nogil:
        """Store a 16-bit field of the used ring."""
        store_index(self._used + offset, value)
        if self.marked:
            self._mark(offset, sizeof(value))

    cdef bint wants_notification(self) noexcept nogil:
        cdef uint16_t count = <uint16_t>(self._next_used - self._published)
        cdef uint16_t event
        if not count:
            return False
        if not self.event_index:
            return not load_index(self._available) & VIRTQ_AVAIL_F_NO_INTERRUPT
        event = load_index(self._available + 4 + 2 * <size_t>self.size)
        return <uint16_t>(self._next_used - event - 1) < count

    cdef bint changed(self) noexcept nogil:
        if self.tracked and self.inflight.waiting:
            return True
        return load_index(self._available + 2) != self._next_available


# A function, because gcc inlines no method at -O2: the table of methods refers to it.
cdef inline int _walk(
    SplitRing ring, Chain *chain, Buffers *buffers, uint32_t index
) except -2 nogil:
    """Follow the chain from a head on; return CHAIN_GOOD, or the rule that it breaks."""
    cdef descriptor entry
    cdef unsigned char raw[VIRTQ_DESC_SIZE]
    cdef bint indirect = False
    cdef uint64_t table = 0
    cdef uint32_t entries = ring.size
    cdef int rule
    ring.crossings = 0
    while True:
        ring.walked += 1
        if indirect:
            if not ring.memory.copy_out(raw, table + index * VIRTQ_DESC_SIZE, VIRTQ_DESC_SIZE):
                return CHAIN_INDIRECT_TABLE
            entry = load_descriptor(raw)
        else:
            entry = load_descriptor(ring._descriptors + index * VIRTQ_DESC_SIZE)
        if entry.flags & VIRTQ_DESC_F_INDIRECT:
            rule = ring.check_table(entry.address, entry.length, entry.flags, indirect)
            if rule != CHAIN_GOOD:
                return rule
            indirect = True
            table = entry.address
            index = 0
            entries = entry.length // VIRTQ_DESC_SIZE
            continue
        rule = ring.add(
            chain, buffers, entry.address, entry.length, entry.flags & VIRTQ_DESC_F_WRITE
        )
        if rule != CHAIN_GOOD:
            return rule
        if not entry.flags & VIRTQ_DESC_F_NEXT:
            return CHAIN_GOOD
        if entry.next >= entries:
            return CHAIN_NEXT
        index = entry.next
