# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.constants cimport (
    CHAIN_BYTES,
    CHAIN_EMPTY_DESCRIPTOR,
    CHAIN_ORDER,
    CHAIN_TOO_LONG,
)
from vhost_rpmb._fast.memory cimport GuestMemory


cdef enum:
    CHAIN_GOOD = -1  # it breaks none of the rules
    NO_CHAIN = -2  # none is available
    MAX_CHAIN_BYTES = 0x100000000


cdef struct Segment:
    # A piece of a buffer, in one region.
    uint64_t guest_address
    unsigned char *host
    uint64_t length


cdef struct Segments:
    Segment *items
    size_t count
    size_t capacity
    uint64_t wanted  # bytes of one chain; the rest of its buffers is checked only


cdef struct Buffers:
    # Of the chains of a batch, one behind the other.
    Segments readable
    Segments writable


cdef struct Chain:
    uint64_t token
    int fault  # CHAIN_GOOD, or the number of the rule that it breaks
    uint32_t count  # descriptors that add() has checked
    uint64_t readable  # bytes
    uint64_t writable  # bytes


cdef struct Answered:
    # A chain that is given back.
    uint64_t token
    uint32_t length  # bytes written into it


cdef class Ring:
    cdef GuestMemory memory
    cdef uint32_t size
    cdef uint64_t[3] addresses
    cdef uint64_t marked_at
    cdef bint marked  # at ``marked_at``
    cdef bint indirect
    cdef bint event_index
    cdef bint mapped  # the parts were found when ``generation`` was the memory's
    cdef uint64_t generation
    cdef GuestMemory region
    cdef bint tracked  # there is ``region``
    cdef size_t walked
    cdef size_t crossings

    cdef uint32_t base(self) noexcept
    cdef int set_base(self, uint32_t base) except -1
    cdef uint32_t used(self) noexcept nogil
    cdef int map(self) noexcept nogil
    cdef int look(self, uint32_t *available) noexcept nogil
    cdef int take(self, Chain *chain, Buffers *buffers) except -1 nogil
    cdef void mark(self) noexcept nogil
    cdef void take_back(self, uint64_t token) noexcept nogil
    cdef void put(self, const Answered *chains, size_t count) noexcept nogil
    cdef uint32_t position(self) noexcept nogil
    cdef void publish(self) noexcept nogil
    cdef void ask_for_kick(self) noexcept nogil
    cdef void refuse_kicks(self) noexcept nogil
    cdef bint wants_notification(self) noexcept nogil
    cdef bint changed(self) noexcept nogil

    cdef int check_table(
        self, uint64_t address, uint32_t length, uint16_t flags, bint nested
    ) except -2 nogil
    cdef int add_out_of_line(
        self, Chain *chain, Buffers *buffers, uint64_t address, uint32_t length, bint writable
    ) except -2 nogil
    cdef inline int add(
        self, Chain *chain, Buffers *buffers, uint64_t address, uint32_t length, bint writable
    ) except -2 nogil:
        """Check a descriptor that is not indirect, and append its buffer."""
        if chain.count >= self.size:
            return CHAIN_TOO_LONG
        chain.count += 1
        return self.add_bounded(chain, buffers, address, length, writable)
    cdef inline int add_bounded(
        self, Chain *chain, Buffers *buffers, uint64_t address, uint32_t length, bint writable
    ) except -2 nogil:
        """Do what add() does, in a chain that cannot have more descriptors than the ring."""
        cdef uint64_t before
        if not length:
            return CHAIN_EMPTY_DESCRIPTOR
        if chain.readable + chain.writable + length > MAX_CHAIN_BYTES:
            return CHAIN_BYTES
        if writable:
            before = chain.writable
            chain.writable += length
            return self.add_buffer(&buffers.writable, address, length, before)
        if chain.writable:
            return CHAIN_ORDER
        before = chain.readable
        chain.readable += length
        return self.add_buffer(&buffers.readable, address, length, before)
    cdef inline int add_buffer(
        self, Segments *segments, uint64_t address, uint64_t length, uint64_t before
    ) except -2 nogil:
        """Check a buffer and append its pieces; ``before``: bytes of the buffers before it."""
        cdef unsigned char *host = self.memory.find_whole(address, length)
        cdef Segment *segment
        if (
            host == NULL
            or before + length > segments.wanted
            or segments.count == segments.capacity
        ):
            return self.add_pieces(
                segments, address, length, segments.wanted - min(before, segments.wanted)
            )
        segment = &segments.items[segments.count]
        segment.guest_address = address
        segment.host = host
        segment.length = length
        segments.count += 1
        return CHAIN_GOOD
    cdef int add_pieces(
        self, Segments *segments, uint64_t address, uint64_t length, uint64_t wanted
    ) except -2 nogil
