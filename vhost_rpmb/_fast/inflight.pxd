# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.memory cimport GuestMemory

cdef extern from "inflight.h" nogil:
    void record_taken(unsigned char *, uint16_t, uint64_t)
    void record_put(unsigned char *, uint16_t, uint16_t)
    void record_published(unsigned char *, const uint16_t *, uint32_t, uint16_t)


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
