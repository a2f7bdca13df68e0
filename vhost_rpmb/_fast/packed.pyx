# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.packed, where the docstrings are."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.inflight cimport PackedInflight, load_packed, packed_descriptor
from vhost_rpmb._fast.memory cimport GuestMemory
from vhost_rpmb._fast.ring cimport CHAIN_GOOD, NO_CHAIN, Answered, Buffers, Chain, Ring

__all__ = ["PackedRing"]

cdef extern from "ring.h" nogil:
    uint64_t load_word(const unsigned char *)
    void store_word(unsigned char *, uint32_t)

cdef enum:
    START = 0x8000  # the position in the base of a new ring: slot 0 of the first lap
    AVAILABLE_OR_USED = VIRTQ_DESC_F_AVAIL | VIRTQ_DESC_F_USED


@cython.final
cdef class PackedRing(Ring):
    def __cinit__(self, GuestMemory memory not None):
        # Its pages are touched as far as batches reach only.
        self._waiting = <Answered *>malloc(VIRTQ_MAX_SIZE * sizeof(Answered))
        if self._waiting == NULL:
            raise MemoryError()
        self.set_base(START | <uint32_t>START << 16)

    def __dealloc__(self):
        free(self._waiting)

    cdef uint32_t base(self) noexcept:
        cdef uint32_t available = _pack(self._available)
        if self.tracked and self.inflight.waiting:
            available = _pack(self._used)
        return available | <uint32_t>_pack(self._used) << 16

    cdef uint32_t used(self) noexcept nogil:
        return _pack(self._used)

    cdef int set_base(self, uint32_t base) except -1:
        cdef uint32_t used = base >> 16
        if not used:
            used = base
        self.inflight = None
        self.region = None
        self.tracked = False
        self._used = Position(used & 0x7FFF, used >> 15 & 1)
        self._available = self._used
        self._outstanding = 0
        self._waiting_count = 0
        self._first = self._used
        self._published = 0
        self.mapped = False  # map() judges the position
        return 0

    cdef int map(self) noexcept nogil:
        cdef uint64_t size = self.size
        cdef uint64_t address = 0
        if self.mapped and self.generation == self.memory.generation:
            return RING_OK
        self.mapped = False
        if not size:
            return RING_NO_SIZE
        if self._used.slot >= size:
            return RING_POSITION
        self._descriptors = self.memory.ring_part(
            self.addresses[0], size * VIRTQ_DESC_SIZE, 16, &self._descriptors_address
        )
        if self._descriptors == NULL:
            return RING_DESCRIPTOR_TABLE
        self._driver_area = self.memory.ring_part(
            self.addresses[1], VIRTQ_EVENT_SIZE, 4, &address
        )
        if self._driver_area == NULL:
            return RING_DRIVER_AREA
        self._device_area = self.memory.ring_part(
            self.addresses[2], VIRTQ_EVENT_SIZE, 4, &self._device_area_address
        )
        if self._device_area == NULL:
            return RING_DEVICE_AREA
        self.mapped = True
        self.generation = self.memory.generation
        return RING_OK

    cdef void resume(self, PackedInflight inflight) noexcept:
        self.inflight = inflight
        self.region = inflight.memory
        self.tracked = True
        self._used = Position(inflight.used & 0x7FFF, inflight.used >> 15)
        self._available = self._advanced(self._used, inflight.slots)
        self._outstanding = inflight.slots
        self._first = self._used
        self.mapped = False

    cdef void write_slot(self, uint32_t slot, const char *descriptor) noexcept nogil:
        self.memory.store(self.slot(slot), descriptor, VIRTQ_DESC_SIZE)
        self._mark_slots(slot, slot)

    cdef int look(self, uint32_t *available) noexcept nogil:
        cdef uint64_t rest
        self.walked = 0
        self._waiting_count = 0
        available[0] = self.inflight.waiting if self.tracked else 0
        if _is_available(self, self.slot(self._available.slot), &rest):
            available[0] += self.left()
        return RING_OK

    cdef int take(self, Chain *chain, Buffers *buffers) except -1 nogil:
        cdef size_t readable = buffers.readable.count
        cdef size_t writable = buffers.writable.count
        cdef int rule
        self.crossings = 0
        chain.count = 0
        chain.readable = 0
        chain.writable = 0
        if self.tracked:
            rule = self._take_tracked(chain, buffers)
        else:
            rule = _take(self, chain, buffers)
        if rule or chain.fault != CHAIN_GOOD:
            chain.readable = 0
            chain.writable = 0
            buffers.readable.count = readable
            buffers.writable.count = writable
        return rule

    cdef int _take_tracked(self, Chain *chain, Buffers *buffers) except -1 nogil:
        """Take the next chain of the in-flight record, or a new one, which is recorded."""
        cdef packed_descriptor entry
        cdef uint32_t left = self.left()
        cdef uint32_t slot = self._available.slot
        cdef uint32_t slots = 0
        cdef uint64_t rest
        cdef uint16_t head
        chain.fault = CHAIN_GOOD
        if self.inflight.waiting:
            return self._take_again(chain, buffers)
        if not _is_available(self, self.slot(self._available.slot), &rest):
            return NO_CHAIN
        head = self.inflight.begin()
        while True:
            entry = make_packed(load_word(self.slot(slot)), rest)
            self.inflight.add(&entry)
            slots += 1
            if chain.fault == CHAIN_GOOD:
                chain.fault = _add(self, chain, buffers, entry.address, rest, slots == 1)
            if not entry.flags & VIRTQ_DESC_F_NEXT:
                break
            if slots == left:
                return RING_ENDLESS_CHAIN
            slot = self.following(slot)
            rest = load_packed_rest(self.slot(slot))
        self.inflight.end()
        self.step_over(chain, slots, rest, head)
        return RING_OK

    cdef int _pass_over(
        self, Chain *chain, uint32_t slot, uint32_t slots, uint64_t rest
    ) noexcept nogil:
        """Count the other slots of a broken chain, whose descriptor in ``slot`` has ``rest``."""
        while flags_of(rest) & VIRTQ_DESC_F_NEXT:
            if slots == self.left():
                return RING_ENDLESS_CHAIN
            slot = self.following(slot)
            rest = load_packed_rest(self.slot(slot))
            slots += 1
        self.step_over(chain, slots, rest, 0)
        return RING_OK

    cdef int _take_again(self, Chain *chain, Buffers *buffers) except -1 nogil:
        """Take the next chain of the in-flight record, as it was when it was taken first."""
        cdef packed_descriptor *entry = NULL
        cdef uint32_t head = self.inflight.take_again()
        cdef uint32_t number = head
        cdef uint32_t slots = self.inflight.count(head)
        cdef uint32_t index
        for index in range(slots):
            entry = self.inflight.copy(number)
            if chain.fault == CHAIN_GOOD:
                chain.fault = self._judge(chain, buffers, entry, not index)
            number = self.inflight.following(number)
        self.walked += slots
        chain.token = slots | head << 16 | <uint64_t>entry.id << 32
        return RING_OK

    cdef int _judge(
        self, Chain *chain, Buffers *buffers, const packed_descriptor *entry, bint first
    ) except -2 nogil:
        """Check the next descriptor of a chain; return CHAIN_GOOD, or the rule that it breaks."""
        cdef int rule
        if not entry.flags & VIRTQ_DESC_F_INDIRECT:
            return self.add_out_of_line(
                chain, buffers, entry.address, entry.length, entry.flags & VIRTQ_DESC_F_WRITE
            )
        rule = self.check_table(entry.address, entry.length, entry.flags, not first)
        if rule != CHAIN_GOOD:
            return rule
        return self._add_table(chain, buffers, entry.address, entry.length // VIRTQ_DESC_SIZE)

    cdef int _add_table(
        self, Chain *chain, Buffers *buffers, uint64_t table, uint32_t entries
    ) except -2 nogil:
        cdef packed_descriptor entry
        cdef unsigned char raw[VIRTQ_DESC_SIZE]
        cdef uint32_t index
        cdef int rule
        for index in range(entries):
            self.walked += 1
            if not self.memory.copy_out(raw, table + index * VIRTQ_DESC_SIZE, VIRTQ_DESC_SIZE):
                return CHAIN_INDIRECT_TABLE
            entry = load_packed(raw)
            rule = self.add_out_of_line(
                chain, buffers, entry.address, entry.length, entry.flags & VIRTQ_DESC_F_WRITE
            )
            if rule != CHAIN_GOOD:
                return rule
        return CHAIN_GOOD

    cdef void mark(self) noexcept nogil:
        self._mark_slots(0, self.size - 1)
        self._mark(self._device_area_address, VIRTQ_EVENT_SIZE)

    cdef void _mark_slots(self, uint64_t first, uint64_t last) noexcept nogil:
        cdef uint64_t start
        if last < first:
            self._mark_slots(first, self.size - 1)
            first = 0
        start = self._descriptors_address + first * VIRTQ_DESC_SIZE
        self._mark(start, (last - first + 1) * VIRTQ_DESC_SIZE)

    cdef void _mark(self, uint64_t address, uint64_t length) noexcept nogil:
        if self.marked:
            self.memory.mark_pages(address, length)

    cdef void take_back(self, uint64_t token) noexcept nogil:
        cdef uint32_t slots = _slots(token)
        if self.tracked:
            self.inflight.take_back(_head(token))
            return
        if slots > self._available.slot:
            self._available.slot += self.size
            self._available.wrap ^= 1
        self._available.slot -= slots
        self._outstanding -= slots

    cdef void put(self, const Answered *chains, size_t count) noexcept nogil:
        cdef Answered *waiting = &self._waiting[self._waiting_count]
        cdef size_t index
        for index in range(count):
            waiting[index] = chains[index]
        self._waiting_count += <uint32_t>count

    cdef uint32_t position(self) noexcept nogil:
        cdef Position position = self._used
        cdef uint32_t index
        for index in range(self._waiting_count):
            position = self._advanced(position, _slots(self._waiting[index].token))
        return _pack(position)

    cdef void publish(self) noexcept nogil:
        cdef const Answered *waiting = self._waiting
        cdef const Answered *end = waiting + self._waiting_count
        cdef unsigned char *head = self.slot(self._used.slot)
        cdef uint32_t slot = self._used.slot
        cdef uint32_t last = slot
        cdef uint64_t toggled = <uint64_t>AVAILABLE_OR_USED << 48
        cdef uint64_t lap = toggled if self._used.wrap else 0
        cdef uint64_t first
        self._first = self._used
        self._published = 0
        if waiting == end:
            return
        if self.tracked:
            self._put_waiting()
        self.memory.touch(self._descriptors, self.size * <uint64_t>VIRTQ_DESC_SIZE)
        first = make_packed_used(waiting.token, waiting.length) | lap
        while True:
            slot += _slots(waiting.token)
            if slot >= self.size:
                slot -= self.size
                lap ^= toggled
            waiting += 1
            if waiting == end:
                break
            last = slot
            store_packed_used(
                self.slot(slot), make_packed_used(waiting.token, waiting.length) | lap
            )
        publish_packed_used(head, first)
        if self.marked:
            self._mark_slots(self._first.slot, last)
        self._used = Position(slot, lap != 0)
        self._published = slot - self._first.slot
        if self._used.wrap != self._first.wrap:
            self._published += self.size
        self._outstanding -= self._published
        self._waiting_count = 0
        if self.tracked:
            self.inflight.published()

    cdef void _put_waiting(self) noexcept nogil:
        """Record the chains to be published, before the ring has any of them."""
        cdef Position position = self._used
        cdef uint32_t index
        cdef uint64_t token
        for index in range(self._waiting_count):
            token = self._waiting[index].token
            position = self._advanced(position, _slots(token))
            self.inflight.put(_head(token), _pack(position))

    cdef void ask_for_kick(self) noexcept nogil:
        cdef uint32_t area = make_area(0, RING_EVENT_FLAGS_ENABLE)
        if self.event_index:
            area = make_area(_pack(self._available), RING_EVENT_FLAGS_DESC)
        self._store_area(area)

    cdef void refuse_kicks(self) noexcept nogil:
        self._store_area(make_area(0, RING_EVENT_FLAGS_DISABLE))

    cdef void _store_area(self, uint32_t area) noexcept nogil:
        store_word(self._device_area, area)
        self._mark(self._device_area_address, VIRTQ_EVENT_SIZE)

    cdef bint wants_notification(self) noexcept nogil:
        cdef uint32_t area
        cdef uint32_t place
        if not self._published:
            return False
        area = load_area(self._driver_area)
        if area >> 16 == RING_EVENT_FLAGS_DISABLE:
            return False
        if area >> 16 != RING_EVENT_FLAGS_DESC or not self.event_index:
            return True
        place = area & 0x7FFF
        if (area >> 15 & 1) != self._first.wrap:
            place += self.size
        return self._first.slot <= place < self._first.slot + self._published

    cdef bint changed(self) noexcept nogil:
        cdef uint64_t rest
        if self.tracked and self.inflight.waiting:
            return True
        return _is_available(self, self.slot(self._available.slot), &rest)


# The token of a chain: from the lowest bits on its slots, its entry in the in-flight record and
# its buffer id, where a descriptor has it too.

cdef inline uint16_t _slots(uint64_t token) noexcept nogil:
    return <uint16_t>token


cdef inline uint16_t _head(uint64_t token) noexcept nogil:
    return <uint16_t>(token >> 16)


cdef inline uint16_t _pack(Position position) noexcept nogil:
    """Return a position as a vring base and an event area have it."""
    return <uint16_t>(position.slot | position.wrap << 15)


# Functions, because gcc inlines no method at -O2: the table of methods refers to it.

cdef inline bint _is_available(
    PackedRing ring, const unsigned char *place, uint64_t *rest
) noexcept nogil:
    """Tell whether the driver made the next slot available, and all slots are not taken.

    ``place``: that of the slot.
    """
    cdef uint32_t wanted = VIRTQ_DESC_F_USED
    if ring._available.wrap:
        wanted = VIRTQ_DESC_F_AVAIL
    if ring._outstanding >= ring.size:
        return False
    rest[0] = load_packed_rest(place)
    return flags_of(rest[0]) & AVAILABLE_OR_USED == wanted


cdef inline int _take(PackedRing ring, Chain *chain, Buffers *buffers) except -1 nogil:
    """Take the chain at the available position."""
    cdef uint32_t left = ring.left()
    cdef uint32_t slot = ring._available.slot
    cdef const unsigned char *place = ring.slot(slot)
    cdef uint32_t slots = 0
    cdef uint64_t rest
    cdef uint64_t address
    cdef int fault
    if not _is_available(ring, place, &rest):
        return NO_CHAIN
    while True:
        address = load_word(place)
        slots += 1
        fault = _add(ring, chain, buffers, address, rest, slots == 1)
        if fault != CHAIN_GOOD:
            chain.fault = fault
            return ring._pass_over(chain, slot, slots, rest)
        if not flags_of(rest) & VIRTQ_DESC_F_NEXT:
            break
        if slots == left:
            return RING_ENDLESS_CHAIN
        slot = ring.following(slot)
        place = ring.slot(slot)
        rest = load_packed_rest(place)
    ring.step_over(chain, slots, rest, 0)
    chain.fault = CHAIN_GOOD
    return RING_OK


cdef inline int _add(
    PackedRing ring, Chain *chain, Buffers *buffers, uint64_t address, uint64_t rest, bint first
) except -2 nogil:
    """Check the next descriptor of a chain whose slots bound it; return as _judge() does."""
    cdef packed_descriptor entry
    if flags_of(rest) & VIRTQ_DESC_F_INDIRECT:
        entry = make_packed(address, rest)
        return ring._judge(chain, buffers, &entry, first)
    return ring.add_bounded(
        chain, buffers, address, <uint32_t>rest, flags_of(rest) & VIRTQ_DESC_F_WRITE
    )
