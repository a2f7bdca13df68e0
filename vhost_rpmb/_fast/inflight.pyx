# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.inflight, where the docstrings are."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vhost_rpmb._fast.memory cimport GuestMemory

__all__ = ["Inflight", "PackedInflight"]

cdef extern from "inflight.h" nogil:
    cdef union packed_used:
        uint16_t slot
        uint8_t wrap
    cdef struct packed_entry:
        uint16_t next
        uint16_t last
        uint16_t count
        uint16_t id
        uint16_t flags
        uint32_t length
        uint64_t address
    cdef struct packed_record:
        uint16_t free_head
        packed_used used
        packed_entry entries[]

cdef enum:
    HEADER = 16
    ENTRY = 16
    PACKED_HEADER = 32
    PACKED_ENTRY = 32


@cython.final
cdef class Inflight:
    def __cinit__(self, GuestMemory memory not None, offset, size, last, heads):
        cdef uint64_t address = 0
        self.memory = memory
        self._record = memory.ring_part(offset, HEADER + ENTRY * <uint64_t>size, 8, &address)
        assert self._record != NULL and len(heads) <= size
        self._size = size
        self._last = last
        self._counter = <uint64_t>len(heads)
        self.waiting = <uint32_t>len(heads)
        self._answered = <uint16_t *>calloc(size, sizeof(uint16_t))
        self._again = <uint16_t *>calloc(size, sizeof(uint16_t))
        if self._answered == NULL or self._again == NULL:
            raise MemoryError()
        for index, head in enumerate(reversed(heads)):
            self._again[index] = head

    def __dealloc__(self):
        free(self._answered)
        free(self._again)


@cython.final
cdef class PackedInflight:
    def __cinit__(self, GuestMemory memory not None, offset, size, bytes record, heads):
        cdef uint64_t address = 0
        cdef size_t length = PACKED_HEADER + PACKED_ENTRY * <size_t>size
        cdef const packed_record *found = <const packed_record *><const char *>record
        cdef const packed_entry *entry
        cdef size_t index
        self.memory = memory
        self._record = memory.ring_part(offset, length, 8, &address)
        assert self._record != NULL and len(heads) <= size and <size_t>len(record) == length
        self._size = size
        self._counter = <uint64_t>len(heads)
        self.waiting = <uint32_t>len(heads)
        self.used = self._used = <uint16_t>(
            found.used.slot | (<uint32_t>1 << 15 if found.used.wrap else 0)
        )
        self._free = found.free_head
        self._entries = <PackedEntry *>calloc(size + 1, sizeof(PackedEntry))
        self._answered = <uint16_t *>calloc(size, sizeof(uint16_t))
        self._again = <uint16_t *>calloc(size, sizeof(uint16_t))
        if self._entries == NULL or self._answered == NULL or self._again == NULL:
            raise MemoryError()
        for index in range(self._size):
            entry = &found.entries[index]
            self._entries[index].next = entry.next
            self._entries[index].last = entry.last
            self._entries[index].count = entry.count
            self._entries[index].copy = packed_descriptor(
                entry.address, entry.length, entry.id, entry.flags
            )
        for index, head in enumerate(reversed(heads)):
            self._again[index] = head
            self.slots += self._entries[head].count

    def __dealloc__(self):
        free(self._entries)
        free(self._answered)
        free(self._again)
