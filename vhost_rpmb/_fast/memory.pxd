# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from vhost_rpmb._fast.constants cimport TOUCHED_AREA_BITS

cdef enum:
    KNOWN_AREAS = 256  # how many of the latest areas are told from new ones


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
    cdef size_t _touched  # areas since the mappings were made, some of them more than once
    cdef size_t _max_touched
    cdef uint32_t[KNOWN_AREAS] _areas  # by number: the latest one touched with these last bits
    cdef Region _recent  # a copy of the region found last, until the table changes; empty: none
    cdef GuestMemory _log
    cdef uint64_t _log_pages  # that have a bit
    cdef bint _marks_writes
    cdef bint _marked
    cdef bint _log_too_small

    cdef bint lost(self) noexcept nogil
    cdef inline void touch(self, const unsigned char *host, uint64_t length) noexcept nogil:
        """Count what an access costs in page tables, and free those of all regions in time."""
        cdef uint64_t area = <uint64_t>host >> TOUCHED_AREA_BITS
        cdef uint64_t last = (<uint64_t>host + length - 1) >> TOUCHED_AREA_BITS
        if area != last or self._areas[area % KNOWN_AREAS] != <uint32_t>area:
            self.touch_areas(area, last)
    cdef void touch_areas(self, uint64_t area, uint64_t last) noexcept nogil
    cdef void renew(self) noexcept nogil
    cdef void _changed(self) noexcept nogil

    # Buffers are written by put() only, rings by store() and by their indices. ``host`` is where
    # the address is mapped.
    cdef inline void put(
        self,
        uint64_t guest_address,
        unsigned char *host,
        const void *source,
        uint64_t length,
    ) noexcept nogil:
        self.store(host, source, length)
        if self._marks_writes:
            self.mark_pages(guest_address, length)
    cdef inline void store(
        self, unsigned char *host, const void *source, uint64_t length
    ) noexcept nogil:
        """Copy bytes in without marking them."""
        self.touch(host, length)
        memcpy(host, source, length)
    cdef void mark_pages(self, uint64_t guest_address, uint64_t length) noexcept nogil

    cdef size_t _position(self, uint64_t guest_address) noexcept nogil
    cdef inline unsigned char *find(self, uint64_t guest_address, uint64_t *left) noexcept nogil:
        """Return where an address is mapped, and the bytes left in its region; NULL outside."""
        cdef uint64_t offset = guest_address - self._recent.guest_address
        if offset >= self._recent.size:
            return self.search(guest_address, left)
        left[0] = self._recent.size - offset
        return self._recent.host + offset
    cdef inline unsigned char *find_whole(
        self, uint64_t guest_address, uint64_t length
    ) noexcept nogil:
        """Return where a range is mapped; NULL if it is not known to be whole in one region."""
        cdef uint64_t offset = guest_address - self._recent.guest_address
        if offset >= self._recent.size or length > self._recent.size - offset:
            return NULL
        return self._recent.host + offset
    cdef unsigned char *search(self, uint64_t guest_address, uint64_t *left) noexcept nogil
    cdef bint copy_out(
        self, unsigned char *target, uint64_t guest_address, uint64_t length
    ) noexcept nogil
    cdef unsigned char *ring_part(
        self,
        uint64_t user_address,
        uint64_t length,
        uint64_t alignment,
        uint64_t *guest_address,
    ) noexcept nogil
    cdef void _drop(self, size_t index) noexcept
