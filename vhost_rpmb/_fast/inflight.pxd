# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.memory cimport GuestMemory

cdef extern from "packed.h" nogil:
    cdef struct packed_descriptor:
        uint64_t address
        uint32_t length
        uint16_t id
        uint16_t flags
    packed_descriptor load_packed(const unsigned char *)

cdef extern from "inflight.h" nogil:
    void record_taken(unsigned char *, uint16_t, uint64_t)
    void record_put(unsigned char *, uint16_t, uint16_t)
    void record_published(unsigned char *, const uint16_t *, uint32_t, uint16_t)
    void packed_begin(unsigned char *, uint16_t, uint64_t)
    void packed_add(
        unsigned char *, uint16_t, uint16_t, uint16_t, uint16_t, const packed_descriptor *
    )
    void packed_end(unsigned char *, uint16_t, uint16_t, uint16_t)
    void packed_put(unsigned char *, uint16_t, uint16_t, uint16_t, uint16_t)
    void packed_published(unsigned char *, const uint16_t *, uint32_t, uint16_t, uint16_t)


cdef class Inflight:
    cdef GuestMemory memory
    cdef unsigned char *_record
    cdef uint64_t _counter
    cdef uint16_t _last
    cdef uint32_t _size
    cdef uint32_t _answered_count
    cdef uint32_t waiting
    cdef uint16_t *_answered
    cdef uint16_t *_again  # the last one is the next to be served

    cdef inline uint16_t take_again(self) noexcept nogil:
        self.waiting -= 1
        return self._again[self.waiting]
    cdef inline void take_back(self, uint16_t head) noexcept nogil:
        self._again[self.waiting] = head  # it has room for all descriptors
        self.waiting += 1
    cdef inline void take(self, uint16_t head) noexcept nogil:
        record_taken(self._record, head, self._counter)
        self._counter += 1
    cdef inline void put(self, uint16_t head) noexcept nogil:
        record_put(self._record, head, self._last)
        self._last = head
        if self._answered_count < self._size:
            self._answered[self._answered_count] = head
            self._answered_count += 1
    cdef inline void published(self, uint16_t used_index) noexcept nogil:
        record_published(self._record, self._answered, self._answered_count, used_index)
        self._answered_count = 0


cdef struct PackedEntry:
    # What the engine knows of an entry, whatever the region has by now.
    uint16_t next
    uint16_t last
    uint16_t count  # of the chain that begins here
    packed_descriptor copy


cdef class PackedInflight:
    cdef GuestMemory memory
    cdef uint16_t used  # position of the ring at the start
    cdef uint32_t slots  # of the chains in flight at the start
    cdef uint32_t waiting
    cdef unsigned char *_record
    cdef uint64_t _counter
    cdef uint32_t _size
    cdef uint16_t _used
    cdef uint16_t _free
    cdef uint16_t _next_free  # while a chain is taken
    cdef uint32_t _answered_count
    cdef PackedEntry *_entries
    cdef uint16_t *_answered
    cdef uint16_t *_again  # the last one is the next to be served

    cdef inline uint16_t take_again(self) noexcept nogil:
        self.waiting -= 1
        return self._again[self.waiting]
    cdef inline void take_back(self, uint16_t head) noexcept nogil:
        self._again[self.waiting] = head  # it has room for all entries
        self.waiting += 1
    cdef inline uint32_t count(self, uint32_t head) noexcept nogil:
        return self._entries[head].count
    cdef inline packed_descriptor *copy(self, uint32_t number) noexcept nogil:
        return &self._entries[number].copy
    cdef inline uint32_t following(self, uint32_t number) noexcept nogil:
        return self._entries[number].next

    # Taking a chain: begin, add ..., end. Without the end nothing is recorded.
    cdef inline uint16_t begin(self) noexcept nogil:
        self._next_free = self._free
        self._entries[self._free].count = 0
        return self._free
    cdef inline void add(self, const packed_descriptor *descriptor) noexcept nogil:
        self._entries[self._next_free].copy = descriptor[0]
        self._next_free = self._entries[self._next_free].next
        self._entries[self._free].count += 1
    cdef inline void end(self) noexcept nogil:
        cdef uint16_t number = self._free
        cdef uint16_t last = number
        cdef uint16_t count
        packed_begin(self._record, self._free, self._counter)
        self._counter += 1
        for count in range(1, self._entries[self._free].count + 1):
            last = number
            number = self._entries[last].next
            packed_add(
                self._record, self._free, last, count, number, &self._entries[last].copy
            )
        self._entries[self._free].last = last
        packed_end(self._record, self._free, last, number)
        self._free = number

    cdef inline void put(self, uint16_t head, uint16_t used) noexcept nogil:
        cdef uint16_t last = self._entries[head].last
        packed_put(self._record, head, last, self._free, used)
        self._entries[last].next = self._free
        self._free = head
        self._used = used
        if self._answered_count < self._size:
            self._answered[self._answered_count] = head
            self._answered_count += 1
    cdef inline void published(self) noexcept nogil:
        packed_published(
            self._record, self._answered, self._answered_count, self._free, self._used
        )
        self._answered_count = 0
