# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.ring, where the docstrings are."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport realloc

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.memory cimport GuestMemory

__all__ = ["Ring"]


cdef class Ring:
    def __cinit__(self, GuestMemory memory not None):
        self.memory = memory

    # A format implements these. map(), look() and take() return a number of rules.RING_RULES.

    cdef uint32_t base(self) noexcept:
        return 0

    cdef int set_base(self, uint32_t base) except -1:
        return 0

    cdef uint32_t used(self) noexcept nogil:
        return 0

    cdef int map(self) noexcept nogil:
        """Find the parts, if they or the memory table changed."""
        return RING_NO_SIZE

    cdef int look(self, uint32_t *available) noexcept nogil:
        return RING_OK

    cdef int take(self, Chain *chain, Buffers *buffers) except -1 nogil:
        """Take the next available chain; NO_CHAIN if there is none.

        The pieces of its buffers are appended to ``buffers``, as far as the first ``wanted`` bytes;
        the lengths in ``chain`` are of all of them. A broken chain appends nothing.
        """
        return RING_OK

    cdef void mark(self) noexcept nogil:
        pass

    cdef void take_back(self, uint64_t token) noexcept nogil:
        pass

    cdef void put(self, const Answered *chains, size_t count) noexcept nogil:
        pass

    cdef uint32_t position(self) noexcept nogil:
        return 0

    cdef void publish(self) noexcept nogil:
        pass

    cdef void ask_for_kick(self) noexcept nogil:
        pass

    cdef void refuse_kicks(self) noexcept nogil:
        """Ask for no notifications while the loop polls the ring."""

    cdef bint wants_notification(self) noexcept nogil:
        return False

    cdef bint changed(self) noexcept nogil:
        return False

    # The checks of chains: each returns CHAIN_GOOD or a number of rules.CHAIN_RULES.

    @cython.final
    cdef int check_table(
        self, uint64_t address, uint32_t length, uint16_t flags, bint nested
    ) except -2 nogil:
        cdef int rule
        if not self.indirect:
            return CHAIN_INDIRECT_FEATURE
        if nested or flags & VIRTQ_DESC_F_NEXT:
            return CHAIN_INDIRECT_FLAGS
        if not length or length % VIRTQ_DESC_SIZE:
            return CHAIN_INDIRECT_LENGTH
        if length // VIRTQ_DESC_SIZE > self.size:
            return CHAIN_INDIRECT_SIZE
        rule = self.add_pieces(NULL, address, length, 0)
        return CHAIN_INDIRECT_TABLE if rule == CHAIN_BUFFER else rule

    @cython.final
    cdef int add_out_of_line(
        self, Chain *chain, Buffers *buffers, uint64_t address, uint32_t length, bint writable
    ) except -2 nogil:
        """Do what add() does; for callers that are not of the hot path."""
        return self.add(chain, buffers, address, length, writable)

    @cython.final
    cdef int add_pieces(
        self, Segments *segments, uint64_t address, uint64_t length, uint64_t wanted
    ) except -2 nogil:
        """Check a buffer and append the pieces of its first ``wanted`` bytes."""
        cdef uint64_t left = 0
        cdef unsigned char *host
        while True:
            host = self.memory.find(address, &left)
            if host == NULL:
                return CHAIN_BUFFER
            left = min(left, length)
            if wanted:
                _append(segments, address, host, min(left, wanted))
                wanted -= min(left, wanted)
            length -= left
            if not length:
                return CHAIN_GOOD
            address += left
            self.walked += 1
            self.crossings += 1
            if self.crossings > MAX_CROSSINGS:
                return CHAIN_CROSSINGS


cdef int _append(
    Segments *segments, uint64_t guest_address, unsigned char *host, uint64_t length
) except -1 nogil:
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
    segments.items[segments.count].guest_address = guest_address
    segments.items[segments.count].host = host
    segments.items[segments.count].length = length
    segments.count += 1
    return 0
