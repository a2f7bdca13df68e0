# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.inflight, where the docstrings are."""

cimport cython
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free

from vhost_rpmb._fast.memory cimport GuestMemory

__all__ = ["Inflight"]

cdef enum:
    HEADER = 16
    ENTRY = 16


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
