# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.inflight cimport PackedInflight, packed_descriptor
from vhost_rpmb._fast.ring cimport Buffers, Chain, Ring

cdef extern from "packed.h" nogil:
    uint64_t make_packed_used(uint32_t length, uint16_t id, uint16_t flags)
    void store_packed_used(unsigned char *, uint64_t)
    void store_used_without_flags(unsigned char *, uint64_t)
    uint32_t load_area(const unsigned char *)
    uint32_t make_area(uint16_t position, uint16_t flags)


cdef struct Position:
    uint32_t slot
    uint32_t wrap  # 0 or 1


cdef struct Put:
    # A chain that is to be published: its used descriptor, but for the bits of the lap.
    uint64_t used
    uint32_t slots
    uint16_t entry  # in the in-flight record
    uint16_t flags


cdef class PackedRing(Ring):
    cdef PackedInflight inflight
    cdef Position _available
    cdef Position _used
    cdef uint32_t _outstanding  # slots of chains that were taken and not published
    cdef Put *_waiting  # room for the largest ring
    cdef uint32_t _waiting_count
    cdef uint32_t _waiting_slots
    cdef Position _first  # the used position before the batch published last
    cdef uint32_t _published  # slots of that batch
    cdef unsigned char *_descriptors
    cdef unsigned char *_driver_area
    cdef unsigned char *_device_area
    cdef uint64_t _descriptors_address  # guest physical
    cdef uint64_t _device_area_address

    cdef void resume(self, PackedInflight inflight) noexcept
    cdef unsigned char *slot(self, uint32_t slot) noexcept nogil
    cdef void write_slot(self, uint32_t slot, const char *descriptor) noexcept nogil
    cdef void _mark_slots(self, uint64_t first, uint64_t last) noexcept nogil
    cdef void _mark(self, uint64_t address, uint64_t length) noexcept nogil
    cdef void _store_area(self, uint32_t area) noexcept nogil
    cdef inline Position _advanced(self, Position position, uint32_t count) noexcept nogil:
        position.slot += count
        if position.slot >= self.size:
            position.slot -= self.size
            position.wrap ^= 1
        return position
    cdef int _take_again(self, Chain *chain, Buffers *buffers) except -1 nogil
    cdef int _judge(
        self, Chain *chain, Buffers *buffers, const packed_descriptor *entry, bint first
    ) except -2 nogil
    cdef int _add_table(
        self, Chain *chain, Buffers *buffers, uint64_t table, uint32_t entries
    ) except -2 nogil
