# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint32_t, uint64_t

from vhost_rpmb._fast.constants cimport NUM_CHAIN_RULES
from vhost_rpmb._fast.memory cimport GuestMemory
from vhost_rpmb._fast.ring cimport CHAIN_GOOD, Answered, Buffers, Chain, Ring, Segments


cdef class Virtqueue:
    cdef GuestMemory memory
    cdef Ring _ring
    cdef bint _packed
    cdef int _rule  # of rules.RING_RULES
    cdef uint64_t[NUM_CHAIN_RULES] _faults
    cdef bint _faulty
    cdef bint watched  # the loop polls the ring, so no kick is needed

    cdef bytes _gather(self, const Segments *readable, uint64_t length)
    cdef int _scatter(self, const Segments *writable, bytes data) except -1
    cdef bint memory_lost(self) noexcept nogil
    cdef bint peek(self) noexcept nogil
    cdef bint arm(self) noexcept nogil
    cdef uint32_t open(self) noexcept nogil
    cdef inline bint take(self, Chain *chain, Buffers *buffers) except -1 nogil:
        """Take the next chain; False where there is none, or the ring is broken."""
        cdef int rule = self._ring.take(chain, buffers)
        if rule or chain.fault != CHAIN_GOOD:
            return self.note(rule, chain)
        return True
    cdef bint note(self, int rule, const Chain *chain) noexcept nogil
    cdef inline size_t walked(self) noexcept nogil:
        return self._ring.walked
    cdef inline void put(self, const Answered *chains, size_t count) noexcept nogil:
        self._ring.put(chains, count)
    cdef inline uint32_t position(self) noexcept nogil:
        return self._ring.position()
    cdef int close(self, bint drained) noexcept nogil
