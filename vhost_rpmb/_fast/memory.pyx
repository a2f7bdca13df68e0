# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.memory, where the docstrings are."""

import mmap
import os
import stat

cimport cython
from libc.errno cimport errno as c_errno
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy, memmove, memset

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from vhost_rpmb._fast.constants cimport (
    MAPPED_PER_AREA_BITS,
    MAX_MAPPED,
    MAX_RENEWED,
    MAX_TOUCHED_AREAS,
    VHOST_LOG_PAGE,
)

__all__ = ["GuestMemory", "GuestMemoryError"]

cdef extern from "<sys/mman.h>" nogil:
    enum:
        PROT_READ
        PROT_WRITE
        MAP_SHARED
    void *MAP_FAILED
    void *c_mmap "mmap"(void *, size_t, int, int, int, long long)
    int munmap(void *, size_t)

cdef extern from "ring.h" nogil:
    void set_bit(unsigned char *, unsigned int)

cdef extern from "guard.h":
    void compiler_barrier() noexcept nogil
    int guard_add(void *, size_t, int *) noexcept nogil
    int put_zeros(void *, size_t) noexcept nogil
    void renew_mapping(char *, size_t, size_t, int *) noexcept nogil
    void guard_remove(void *) noexcept nogil

_ADDRESS_END = 1 << 64
_FILE_END = 1 << 63
_PAGE_SIZE = mmap.ALLOCATIONGRANULARITY


class GuestMemoryError(Exception):
    pass


@cython.final
cdef class GuestMemory:
    def __cinit__(self, max_regions=509):
        self._max_regions = max_regions
        self._table = <Region *>calloc(self._max_regions + 1, sizeof(Region))
        if self._table == NULL:
            raise MemoryError()

    def __init__(self, max_regions=509):
        pass

    def __dealloc__(self):
        if self._table != NULL:
            while self._count:
                self._drop(self._count - 1)
            free(self._table)

    @property
    def regions(self):
        cdef size_t index
        return tuple(
            [
                (
                    self._table[index].guest_address,
                    self._table[index].size,
                    self._table[index].user_address,
                )
                for index in range(self._count)
            ]
        )

    def add_region(self, guest_address, size, user_address, mmap_offset, fd):
        if size == 0:
            raise ValueError("the memory region is empty")
        if guest_address + size >= _ADDRESS_END or user_address + size >= _ADDRESS_END:
            raise ValueError("the memory region reaches the end of the address space")
        if mmap_offset + size >= _FILE_END:
            raise ValueError("the memory region reaches past the end of its file")
        if self._count >= self._max_regions:
            raise ValueError(f"there are {self._max_regions} memory regions already")
        cdef size_t index = self._position(guest_address)
        cdef Region region
        region.guest_address = guest_address
        region.size = size
        region.user_address = user_address
        # Subtract form: no sum can wrap.
        if (
            index > 0
            and region.guest_address - self._table[index - 1].guest_address
            < self._table[index - 1].size
        ) or (
            index < self._count
            and self._table[index].guest_address - region.guest_address < region.size
        ):
            raise ValueError("the memory region overlaps another one")
        if sum([other[1] for other in self.regions]) + size > <uint64_t>MAX_MAPPED:
            raise ValueError("the memory regions have more than 64 TiB")
        status = os.fstat(fd)
        if stat.S_ISREG(status.st_mode) and mmap_offset + size > status.st_size:
            raise ValueError("the memory region reaches past the end of its file")
        # A huge-page file can be mapped from huge-page boundaries only, and in whole huge pages.
        granularity = max(status.st_blksize, _PAGE_SIZE)
        skipped = mmap_offset % granularity
        region.mapping_length = -(-(skipped + size) // granularity) * granularity
        region.mapping = c_mmap(
            NULL,
            region.mapping_length,
            PROT_READ | PROT_WRITE,
            MAP_SHARED,
            fd,
            mmap_offset - skipped,
        )
        if region.mapping == MAP_FAILED:
            raise OSError(c_errno, os.strerror(c_errno))
        if guard_add(region.mapping, region.mapping_length, &self._lost):
            munmap(region.mapping, region.mapping_length)
            raise OSError(c_errno, os.strerror(c_errno))
        region.host = <unsigned char *>region.mapping + <uint64_t>skipped
        memmove(
            &self._table[index + 1],
            &self._table[index],
            (self._count - index) * sizeof(Region),
        )
        self._table[index] = region
        self._count += 1
        self._changed()

    def remove_region(self, guest_address, size, user_address):
        cdef size_t index
        for index in range(self._count):
            if (
                self._table[index].guest_address == guest_address
                and self._table[index].size == size
                and self._table[index].user_address == user_address
            ):
                self._drop(index)
                return
        raise ValueError("there is no such memory region")

    def clear(self):
        while self._count:
            self._drop(self._count - 1)
        self._lost = 0

    def read(self, guest_address, length):
        data = PyBytes_FromStringAndSize(NULL, length)
        if not self.copy_out(<unsigned char *>PyBytes_AS_STRING(data), guest_address, length):
            raise GuestMemoryError(f"{guest_address:#x} is outside every memory region")
        return data

    def write(self, guest_address, bytes data):
        cdef uint64_t address = guest_address
        cdef uint64_t length = <uint64_t>len(data)
        cdef uint64_t done = 0
        cdef uint64_t left = 0
        cdef unsigned char *host
        for sure in (False, True):
            done = 0
            while done < length:
                host = self.find(address + done, &left)
                if host == NULL:
                    raise GuestMemoryError(f"{guest_address:#x} is outside every memory region")
                left = min(left, length - done)
                if sure:
                    self.put(address + done, host, PyBytes_AS_STRING(data) + done, left)
                done += left

    def set_log(self, GuestMemory log, bint marks_writes=False):
        self._log = log
        self._log_pages = log._table[0].size * 8 if log is not None else 0
        self._marks_writes = log is not None and marks_writes
        self._marked = False
        self._log_too_small = False

    def mark(self, uint64_t guest_address, uint64_t length):
        self.mark_pages(guest_address, length)

    def take_marked(self):
        marked = self._marked
        self._marked = False
        return marked

    @property
    def log_fault(self):
        if self._log is not None and self._log.lost():
            return "the file behind it was truncated"
        if self._log_too_small:
            return "it has no bit for some of the pages that were written"
        return ""

    cdef void mark_pages(self, uint64_t guest_address, uint64_t length) noexcept nogil:
        cdef uint64_t page = guest_address // VHOST_LOG_PAGE
        cdef uint64_t last = (guest_address + length - 1) // VHOST_LOG_PAGE
        cdef unsigned char *bits
        if self._log is None:
            return
        self._marked = True
        while page <= last:
            if page >= self._log_pages:
                self._log_too_small = True
                return
            bits = self._log._table[0].host + page // 8
            self._log.touch(bits, 1)
            set_bit(bits, page % 8)
            page += 1

    cdef bint lost(self) noexcept nogil:
        compiler_barrier()
        return self._lost != 0

    cdef size_t _position(self, uint64_t guest_address) noexcept nogil:
        """Return how many regions begin at or below an address."""
        cdef size_t low = 0
        cdef size_t high = self._count
        cdef size_t middle
        while low < high:
            middle = (low + high) // 2
            if self._table[middle].guest_address <= guest_address:
                low = middle + 1
            else:
                high = middle
        return low

    cdef unsigned char *search(self, uint64_t guest_address, uint64_t *left) noexcept nogil:
        """Do what find() does for an address outside the region that was found last."""
        cdef size_t position = self._position(guest_address)
        cdef uint64_t offset
        if position == 0:
            return NULL
        offset = guest_address - self._table[position - 1].guest_address
        if offset >= self._table[position - 1].size:
            return NULL
        self._recent = self._table[position - 1]
        left[0] = self._recent.size - offset
        return self._recent.host + offset

    cdef bint copy_out(
        self, unsigned char *target, uint64_t guest_address, uint64_t length
    ) noexcept nogil:
        """Copy ``length`` bytes to ``target``; False where some lie outside every region."""
        cdef uint64_t left = 0
        cdef unsigned char *host
        while length:
            host = self.find(guest_address, &left)
            if host == NULL:
                return False
            left = min(left, length)
            self.touch(host, left)
            memcpy(target, host, left)
            target += left
            guest_address += left
            length -= left
        compiler_barrier()
        return True

    cdef unsigned char *ring_part(
        self,
        uint64_t user_address,
        uint64_t length,
        uint64_t alignment,
        uint64_t *guest_address,
    ) noexcept nogil:
        """Return where ``length`` bytes at a user address are mapped, and their guest address.

        NULL if they are not all in one region, or not aligned to ``alignment`` bytes. Valid while
        ``generation`` stays.
        """
        cdef size_t index
        cdef uint64_t offset
        cdef unsigned char *host
        for index in range(self._count):
            if user_address < self._table[index].user_address:
                continue
            offset = user_address - self._table[index].user_address
            if offset < self._table[index].size:
                host = self._table[index].host + offset
                if (
                    length > self._table[index].size - offset
                    or user_address % alignment
                    or <uint64_t>host % alignment
                ):
                    return NULL
                self.touch(host, length)
                guest_address[0] = self._table[index].guest_address + offset
                return host
        return NULL

    cdef void touch_areas(self, uint64_t area, uint64_t last) noexcept nogil:
        while area <= last:
            if self._areas[area % KNOWN_AREAS] != <uint32_t>area:
                self._areas[area % KNOWN_AREAS] = <uint32_t>area
                self._touched += 1
            area += 1
        if self._touched >= self._max_touched:
            self.renew()

    cdef void renew(self) noexcept nogil:
        """Free the page tables of all regions: enough areas were touched since the last time.

        Once memory was lost, nothing in it counts, and all of it becomes zeros.
        """
        cdef size_t index
        self._touched = 0
        memset(self._areas, 0, sizeof(self._areas))
        for index in range(self._count):
            if self._lost:
                put_zeros(self._table[index].mapping, self._table[index].mapping_length)
                continue
            renew_mapping(
                <char *>self._table[index].mapping,
                self._table[index].mapping_length,
                MAX_RENEWED,
                &self._lost,
            )

    cdef void _changed(self) noexcept nogil:
        """Forget what was found in the table; set how many areas may be touched until a renewal."""
        cdef uint64_t mapped = 0
        cdef size_t index
        self.generation += 1
        self._recent.size = 0
        for index in range(self._count):
            mapped += self._table[index].size
        self._max_touched = MAX_TOUCHED_AREAS + (mapped >> MAPPED_PER_AREA_BITS)

    cdef void _drop(self, size_t index) noexcept:
        """Unmap one region and close the gap in the table."""
        guard_remove(self._table[index].mapping)
        munmap(self._table[index].mapping, self._table[index].mapping_length)
        memmove(
            &self._table[index],
            &self._table[index + 1],
            (self._count - index - 1) * sizeof(Region),
        )
        self._count -= 1
        self._changed()
