# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.constants cimport NUM_CHAIN_RULES
from vhost_rpmb._fast.memory cimport GuestMemory


cdef enum:
    CHAIN_GOOD = -1  # it breaks none of the rules


cdef struct Segment:
    # A piece of a buffer, in one region.
    unsigned char *host
    uint64_t length


cdef struct Segments:
    Segment *items
    size_t count
    size_t capacity


cdef struct Chain:
    uint16_t head
    bint broken
    uint64_t readable  # bytes
    uint64_t writable  # bytes


cdef class Virtqueue:
    cdef GuestMemory memory
    cdef uint32_t size
    cdef uint64_t[3] addresses
    cdef bint indirect
    cdef bint event_index
    cdef bint started
    cdef int rule  # of rules.RING_RULES
    cdef uint16_t next_available
    cdef uint16_t next_used
    cdef uint32_t unpushed
    cdef size_t walked
    cdef size_t crossings
    cdef uint64_t[NUM_CHAIN_RULES] faults
    cdef bint faulty
    cdef bint watched  # somebody watches the available ring, so no kick is needed
    # The parts of the ring, as mapped when ``generation`` was the memory's.
    cdef uint64_t generation
    cdef unsigned char *descriptors
    cdef unsigned char *available
    cdef unsigned char *used

    cdef bint memory_lost(self) noexcept nogil
    cdef bint peek(self) noexcept nogil
    cdef bint arm(self) noexcept nogil
    cdef uint32_t open(self) noexcept nogil
    cdef int _map_parts(self) noexcept nogil
    cdef bint pop(
        self,
        Chain *chain,
        Segments *readable,
        uint64_t max_readable,
        Segments *writable,
        uint64_t max_writable,
    ) except -1 nogil
    cdef int _walk(
        self,
        Chain *chain,
        Segments *readable,
        uint64_t max_readable,
        Segments *writable,
        uint64_t max_writable,
    ) except -2 nogil
    cdef int _add_buffer(
        self, Segments *segments, uint64_t address, uint64_t length, uint64_t wanted
    ) except -2 nogil
    cdef void push(self, uint16_t head, uint32_t length) noexcept nogil
    cdef int close(self, bint drained) noexcept nogil
    cdef void _ask_for_kick(self) noexcept nogil
    cdef void _refuse_kicks(self) noexcept nogil
    cdef bint _wants_notification(self, uint16_t old) noexcept nogil
