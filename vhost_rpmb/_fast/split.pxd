# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.inflight cimport Inflight
from vhost_rpmb._fast.ring cimport Buffers, Chain, Ring


cdef class SplitRing(Ring):
    cdef Inflight inflight
    cdef uint16_t _next_available
    cdef uint16_t _next_used
    cdef uint16_t _published  # the used index before the batch published last
    cdef uint32_t _unpublished
    cdef bint _started
    cdef unsigned char *_descriptors
    cdef unsigned char *_available
    cdef unsigned char *_used

    cdef void resume(self, uint16_t used, Inflight inflight) noexcept
    cdef void _mark_published(self) noexcept nogil
    cdef void _mark(self, uint64_t offset, uint64_t length) noexcept nogil
    cdef void _store_used(self, size_t offset, uint16_t value) noexcept nogil
