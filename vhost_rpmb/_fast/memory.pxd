# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint64_t


cdef struct Region:
    uint64_t guest_address
    uint64_t size
    uint64_t user_address
    unsigned char *host  # where the region's first byte is mapped
    void *mapping
    size_t mapping_length


cdef class GuestMemory:
    cdef Region *_table  # by guest address
    cdef size_t _count
    cdef size_t _max_regions
    cdef int _lost  # set by the SIGBUS handler
    cdef uint64_t generation  # counts the changes of the table

    cdef bint lost(self) noexcept nogil
    cdef size_t _position(self, uint64_t guest_address) noexcept nogil
    cdef unsigned char *find(self, uint64_t guest_address, uint64_t *left) noexcept nogil
    cdef bint copy_out(
        self, unsigned char *target, uint64_t guest_address, uint64_t length
    ) noexcept nogil
    cdef unsigned char *ring_part(
        self, uint64_t user_address, uint64_t length, uint64_t alignment
    ) noexcept nogil
    cdef void _drop(self, size_t index) noexcept
