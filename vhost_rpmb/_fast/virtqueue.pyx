# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.virtqueue, where the docstrings are."""

cimport cython
from libc.stdint cimport uint32_t, uint64_t
from libc.stdlib cimport free
from libc.string cimport memcpy, memset

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.inflight cimport Inflight, PackedInflight
from vhost_rpmb._fast.memory cimport GuestMemory
from vhost_rpmb._fast.packed cimport PackedRing
from vhost_rpmb._fast.ring cimport (
    CHAIN_GOOD,
    NO_CHAIN,
    Answered,
    Buffers,
    Chain,
    Ring,
    Segment,
    Segments,
)
from vhost_rpmb._fast.split cimport SplitRing

from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio.flags import Unanswered

__all__ = ["Virtqueue"]

cdef extern from "ring.h" nogil:
    void full_barrier()


@cython.final
cdef class Virtqueue:
    def __init__(self, GuestMemory memory not None):
        self.memory = memory
        self.reset()

    def reset(self):
        self._ring = SplitRing(self.memory)
        self._packed = False
        self.watched = False
        self.take_faults()
        self._rule = RING_OK

    def set_size(self, size):
        cdef uint32_t base
        if not 0 < size <= VIRTQ_MAX_SIZE:
            raise ValueError(f"a queue size is a number from 1 to 32768, not {size}")
        if size != self._ring.size:
            base = self._ring.base()
            self._ring.size = size
            self._ring.set_base(base)
        self._ring.mapped = False

    def set_addresses(self, descriptor_table, available_ring, used_ring):
        self._ring.addresses[0] = descriptor_table
        self._ring.addresses[1] = available_ring
        self._ring.addresses[2] = used_ring
        self._ring.mapped = False

    def mark_ring(self, address):
        if address is not None and address >= <uint64_t>LOG_ADDRESS_END:
            raise ValueError(f"expected a log address that a log reaches, found 0x{address:x}")
        self._ring.marked = address is not None
        self._ring.marked_at = address or 0

    def mark_written(self):
        if not self._ring.map():
            self._ring.mark()

    def set_base(self, base):
        if not 0 <= base <= 0xFFFFFFFF:
            raise ValueError(f"a vring base has 32 bits, {base} has more")
        self._ring.set_base(base)
        self._rule = RING_OK

    def set_features(self, features):
        cdef Ring before = self._ring
        cdef bint packed = features >> VIRTIO_F_RING_PACKED & 1
        if packed != self._packed:
            self._packed = packed
            self._ring = PackedRing(self.memory) if packed else SplitRing(self.memory)
            self._ring.size = before.size
            self._ring.addresses = before.addresses
            self._ring.marked = before.marked
            self._ring.marked_at = before.marked_at
        self._ring.indirect = bool(features >> VIRTIO_F_INDIRECT_DESC & 1)
        self._ring.event_index = bool(features >> VIRTIO_F_EVENT_IDX & 1)

    @property
    def packed(self):
        return self._packed

    @property
    def base(self):
        return self._ring.base()

    @property
    def used(self):
        cdef uint32_t used
        if self._ring.map():
            return None
        used = self._ring.used()
        return None if self.memory.lost() else used

    @property
    def error(self):
        return rules.RING_RULES[self._rule]

    def take_faults(self):
        cdef int rule
        faults = {}
        for rule in range(NUM_CHAIN_RULES):
            if self._faults[rule]:
                faults[rules.CHAIN_RULES[rule]] = self._faults[rule]
                self._faults[rule] = 0
        self._faulty = False
        return faults

    def resume(self, used_index, GuestMemory region not None, offset, last, heads):
        cdef SplitRing ring = self._ring
        ring.resume(used_index, Inflight(region, offset, ring.size, last, heads))

    def resume_packed(self, GuestMemory region not None, offset, bytes record, heads):
        cdef PackedRing ring = self._ring
        ring.resume(PackedInflight(region, offset, ring.size, record, heads))

    def read_slot(self, uint32_t slot):
        cdef PackedRing ring = self._ring
        assert not ring.map() and slot < ring.size
        return PyBytes_FromStringAndSize(<const char *>ring.slot(slot), VIRTQ_DESC_SIZE)

    def write_slot(self, uint32_t slot, bytes descriptor):
        cdef PackedRing ring = self._ring
        assert not ring.map() and slot < ring.size and len(descriptor) == VIRTQ_DESC_SIZE
        ring.write_slot(slot, PyBytes_AS_STRING(descriptor))

    def answer_chains(self, answer, uint64_t max_bytes, uint32_t max_chains):
        cdef uint32_t available = self.open()
        cdef bint drained = available <= max_chains
        cdef uint32_t _
        cdef Chain chain
        cdef Buffers buffers
        cdef Answered answered
        cdef bytes request
        cdef object written
        memset(&buffers, 0, sizeof(buffers))
        buffers.readable.wanted = buffers.writable.wanted = max_bytes
        try:
            for _ in range(min(available, max_chains)):
                buffers.readable.count = buffers.writable.count = 0
                if not self.take(&chain, &buffers):
                    drained = True
                    break
                request = self._gather(&buffers.readable, min(chain.readable, max_bytes))
                if self.memory_lost():
                    break  # the copied bytes may be invalid
                written = b""
                if chain.fault == CHAIN_GOOD:
                    written = answer(request, min(chain.writable, max_bytes))
                if written is Unanswered.LATER:
                    self._ring.take_back(chain.token)
                    break
                if isinstance(written, Unanswered):
                    continue
                self._scatter(&buffers.writable, written)
                answered = Answered(chain.token, <uint32_t>len(written))
                self.put(&answered, 1)
        finally:
            free(buffers.readable.items)
            free(buffers.writable.items)
        return self.close(drained)

    cdef bytes _gather(self, const Segments *readable, uint64_t length):
        cdef bytes data = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>length)
        cdef char *target = PyBytes_AS_STRING(data)
        cdef const Segment *segment
        cdef size_t index
        for index in range(readable.count):
            segment = &readable.items[index]
            self.memory.touch(segment.host, segment.length)
            memcpy(target, segment.host, segment.length)
            target += segment.length
        return data

    cdef int _scatter(self, const Segments *writable, bytes data) except -1:
        cdef const char *source = PyBytes_AS_STRING(data)
        cdef uint64_t left = <uint64_t>len(data)
        cdef uint64_t part
        cdef const Segment *segment
        cdef size_t index
        for index in range(writable.count):
            segment = &writable.items[index]
            part = min(left, segment.length)
            if not part:
                break
            self.memory.put(segment.guest_address, segment.host, source, part)
            source += part
            left -= part
        return 0

    cdef bint memory_lost(self) noexcept nogil:
        cdef int rule = RING_MEMORY_LOST
        if not self.memory.lost():
            if not self._ring.tracked or not self._ring.region.lost():
                return False
            rule = RING_INFLIGHT_LOST
        if not self._rule:
            self._rule = rule
        return True

    # For the loop of this engine.

    cdef bint peek(self) noexcept nogil:
        """Tell whether there is something to process, an error included."""
        if self._rule or self._ring.map():
            return True
        return self._ring.changed() or self.memory.lost()

    cdef bint arm(self) noexcept nogil:
        if self._rule or self._ring.map():
            return True
        self._ring.ask_for_kick()
        full_barrier()
        return self.peek()

    # For the device of this engine, in this order: open, take ..., put ..., close.

    cdef uint32_t open(self) noexcept nogil:
        cdef uint32_t available = 0
        cdef int rule
        if self._rule:
            self._ring.mapped = False  # the ring may be unmapped by now
            return 0
        self._rule = self._ring.map()
        if self._rule:
            return 0
        rule = self._ring.look(&available)
        if self.memory_lost():
            return 0
        self._rule = rule
        return 0 if rule else available

    cdef bint note(self, int rule, const Chain *chain) noexcept nogil:
        """Note what was not as it should be; tell whether a chain was taken."""
        if rule:
            if rule != NO_CHAIN and not self.memory_lost():
                self._rule = rule
            return False
        self._faults[chain.fault] += 1
        self._faulty = True
        return True

    cdef int close(self, bint drained) noexcept nogil:
        cdef int flags = 0
        if self._ring.mapped and not self.memory_lost():
            self._ring.publish()
            if drained and not self._rule:
                if self.watched:
                    self._ring.refuse_kicks()
                else:
                    self._ring.ask_for_kick()
            full_barrier()
            if self._ring.wants_notification():
                flags |= NOTIFY
            if self._ring.changed():
                flags |= MORE
        if self._faulty:
            flags |= FAULTS
        self.memory_lost()
        if self._rule:
            flags = (flags & ~MORE) | BROKEN
        return flags
