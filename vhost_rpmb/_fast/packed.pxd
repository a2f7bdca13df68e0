# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.constants cimport VIRTQ_DESC_SIZE
from vhost_rpmb._fast.inflight cimport PackedInflight, packed_descriptor
from vhost_rpmb._fast.ring cimport Answered, Buffers, Chain, Ring

cdef extern from "packed.h" nogil:
    packed_descriptor make_packed(uint64_t address, uint64_t rest)
    uint64_t load_packed_rest(const unsigned char *slot)
    uint64_t make_packed_used(uint64_t token, uint32_t length)
    void store_packed_used(unsigned char *slot, uint64_t used)
    void publish_packed_used(unsigned char *slot, uint64_t used)
    uint32_t load_area(const unsigned char *)
    uint32_t make_area(uint16_t position, uint16_t flags)


cdef struct Position:
    uint32_t slot
    uint32_t wrap  # 0 or 1


cdef inline uint32_t flags_of(uint64_t rest) noexcept nogil:
    """Return the flags of a descriptor from its second half."""
    return <uint32_t>(rest >> 48)


cdef class PackedRing(Ring):
    cdef PackedInflight inflight
    cdef Position _available
    cdef Position _used
    cdef uint32_t _outstanding  # slots of chains that were taken and not published
    cdef Answered *_waiting  # to be published; room for the largest ring
    cdef uint32_t _waiting_count
    cdef Position _first  # the used position before the batch published last
    cdef uint32_t _published  # slots of that batch
    cdef unsigned char *_descriptors
    cdef unsigned char *_driver_area
    cdef unsigned char *_device_area
    cdef uint64_t _descriptors_address  # guest physical
    cdef uint64_t _device_area_address

    cdef void resume(self, PackedInflight inflight) noexcept
    cdef inline unsigned char *slot(self, uint32_t slot) noexcept nogil:
        """Return where a slot of a mapped ring is mapped."""
        return self._descriptors + slot * <size_t>VIRTQ_DESC_SIZE
    cdef void write_slot(self, uint32_t slot, const char *descriptor) noexcept nogil
    cdef void _mark_slots(self, uint64_t first, uint64_t last) noexcept nogil
    cdef void _mark(self, uint64_t address, uint64_t length) noexcept nogil
    cdef void _store_area(self, uint32_t area) noexcept nogil
    cdef void _put_waiting(self) noexcept nogil
    cdef inline Position _advanced(self, Position position, uint32_t count) noexcept nogil:
        position.slot += count
        if position.slot >= self.size:
            position.slot -= self.size
            position.wrap ^= 1
        return position
    cdef inline uint32_t left(self) noexcept nogil:
        """Return how many slots are not of chains that were taken and not published."""
        return self.size - self._outstanding
    cdef inline uint32_t following(self, uint32_t slot) noexcept nogil:
        """Return the number of the slot behind one."""
        slot += 1
        if slot == self.size:
            slot = 0
        return slot
    cdef inline void step_over(
        self, Chain *chain, uint32_t slots, uint64_t rest, uint16_t head
    ) noexcept nogil:
        """Count the chain at the available position as taken; ``rest`` is of its last slot."""
        self.walked += slots
        self._available.slot += slots
        if self._available.slot >= self.size:
            self._available.slot -= self.size
            self._available.wrap ^= 1
        self._outstanding += slots
        chain.token = slots | <uint32_t>head << 16 | rest & <uint64_t>0xFFFF << 32
    cdef int _take_tracked(self, Chain *chain, Buffers *buffers) except -1 nogil
    cdef int _pass_over(
        self, Chain *chain, uint32_t slot, uint32_t slots, uint64_t rest
    ) noexcept nogil
    cdef int _take_again(self, Chain *chain, Buffers *buffers) except -1 nogil
    cdef int _judge(
        self, Chain *chain, Buffers *buffers, const packed_descriptor *entry, bint first
    ) except -2 nogil
    cdef int _add_table(
        self, Chain *chain, Buffers *buffers, uint64_t table, uint32_t entries
    ) except -2 nogil
