# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.batch, where the docstrings are.

No Python object is made here, except for the changes that a write hands to the store.
"""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy

from cpython.bytes cimport PyBytes_FromStringAndSize

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.mac cimport Authenticator, new_authenticator
from vhost_rpmb._fast.memory cimport GuestMemory
from vhost_rpmb._fast.ring cimport CHAIN_GOOD, Answered, Buffers, Chain, Segment
from vhost_rpmb._fast.virtqueue cimport Virtqueue

__all__ = ["Batch", "View"]

cdef extern from "byteorder.h" nogil:
    void copy_frame(unsigned char *, const unsigned char *)

cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void *, size_t)


@cython.final
cdef class Batch:
    def __cinit__(self):
        self._buffers.readable.wanted = MAX_REQUEST_FRAMES * FRAME_SIZE
        self._buffers.writable.wanted = MAX_RESPONSE_FRAMES * FRAME_SIZE

    def __dealloc__(self):
        free(self.work)
        free(self._answered)
        free(self.requests)
        free(self.responses)
        free(self._buffers.readable.items)
        free(self._buffers.writable.items)

    cdef bint take(self, Virtqueue queue) except -1:
        cdef bint drained
        self.count = 0
        self._requests_size = 0
        self._responses_size = 0
        self._buffers.writable.count = 0
        drained = self._take(queue)
        if self._responses_size > self._responses_capacity:
            self._grow_responses()
        return drained

    cdef bint _take(self, Virtqueue queue) except -1:
        cdef uint32_t available = queue.open()
        cdef GuestMemory memory = queue.memory
        cdef Buffers *buffers = &self._buffers
        cdef uint32_t _
        cdef uint64_t frames = 0
        cdef Chain chain
        cdef Work *work
        for _ in range(available):
            if frames >= MAX_BATCH_FRAMES or queue.walked() >= MAX_BATCH_DESCRIPTORS:
                return False
            if self.count == self._capacity:
                self._grow_work()
            buffers.readable.count = 0
            work = &self.work[self.count]
            work.segment = buffers.writable.count
            if not queue.take(&chain, buffers):
                break
            self._answered[self.count].token = chain.token
            work.broken = chain.fault != CHAIN_GOOD
            work.room = <uint32_t>min(
                chain.writable // FRAME_SIZE, <uint64_t>MAX_RESPONSE_FRAMES
            )
            if not work.room:
                buffers.writable.count = work.segment
            work.response = self._responses_size
            self._responses_size += <size_t>work.room * FRAME_SIZE
            work.request = self._requests_size
            work.length = chain.readable
            work.whole = (
                chain.readable % FRAME_SIZE == 0
                and 0 < chain.readable <= MAX_REQUEST_FRAMES * FRAME_SIZE
            )
            work.frames = 0
            if work.whole:
                _gather(self, memory, chain.readable)
                work.frames = <uint32_t>(chain.readable // FRAME_SIZE)
            frames += work.room + work.frames
            self.count += 1
        return True

    cdef void answer(self, Virtqueue queue) noexcept:
        cdef GuestMemory memory = queue.memory
        cdef size_t index
        for index in range(self.count):
            _scatter(self, memory, &self.work[index])
            self._answered[index].length = self.work[index].answered * FRAME_SIZE
        if self.count:
            queue.put(self._answered, self.count)

    cdef void wipe(self) noexcept:
        """Erase the requests: one of them had a key."""
        OPENSSL_cleanse(self.requests, self._requests_capacity)

    cdef int _grow_responses(self) except -1:
        """Make room for the responses: all zeros, of which the device leaves those of the stuff."""
        cdef size_t size = max(self._responses_size, 2 * self._responses_capacity)
        free(self.responses)
        self._responses_capacity = 0
        self.responses = <unsigned char *>calloc(size, 1)
        if self.responses == NULL:
            raise MemoryError()
        self._responses_capacity = size
        return 0

    cdef int _grow_work(self) except -1:
        cdef size_t capacity = 2 * self._capacity + 64
        cdef Work *work = <Work *>realloc(self.work, capacity * sizeof(Work))
        cdef Answered *answered
        if work == NULL:
            raise MemoryError()
        self.work = work
        answered = <Answered *>realloc(self._answered, capacity * sizeof(Answered))
        if answered == NULL:
            raise MemoryError()
        self._answered = answered
        self._capacity = capacity
        return 0


@cython.final
cdef class View:
    def __cinit__(self, store):
        self._store = store
        self._image_view = store.image
        self._damaged_view = store.damaged
        self._blocks = <size_t>self._image_view.shape[0] // BLOCK_SIZE
        assert self._blocks and <size_t>self._damaged_view.shape[0] >= self._blocks
        self._image = &self._image_view[0]
        self._damaged = &self._damaged_view[0]
        self._staged_at = <uint32_t *>calloc(self._blocks, sizeof(uint32_t))
        if self._staged_at == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self._staged)
        free(self._staged_at)
        free(self._accepted)

    cdef void begin(
        self, uint32_t counter, Authenticator authenticator, Register register, bint writable
    ) noexcept:
        """Start from the state between batches."""
        self.end()
        self._new_key = NULL
        self._accepted_size = 0
        self.key_accepted = False
        self.counter = counter
        self.authenticator = authenticator
        self.register = register
        self.writable = writable
        self.wrote = False

    cdef int program(self, const unsigned char *key) except -1:
        self._new_key = key
        self.authenticator = new_authenticator(key)
        self.key_accepted = True
        self.wrote = True
        return 0

    cdef int write(self, uint16_t address, const unsigned char *frames, uint32_t count) except -1:
        cdef uint32_t index
        for index in range(count):
            self._stage(
                <uint16_t>(address + index), frames + <size_t>index * FRAME_SIZE + FRAME_DATA
            )
        self.counter += 1
        self.wrote = True
        return 0

    cdef int accept(self, const unsigned char *first, uint32_t count) except -1:
        """Note a write request that is answered OK."""
        cdef size_t size = self._accepted_size + REPLAY_WRITE_SIZE
        self._accepted = _grow(self._accepted, &self._accepted_capacity, size)
        replay_write(self._accepted + self._accepted_size, first, count)
        self._accepted_size = size
        return 0

    cdef bytes accepted(self):
        return PyBytes_FromStringAndSize(
            <const char *>self._accepted, <Py_ssize_t>self._accepted_size
        )

    cdef bint commit(self, object replay) except -1:
        cdef size_t index
        cdef Staged *staged
        cdef list blocks = []
        for index in range(self._staged_count):
            staged = &self._staged[index]
            if self._staged_at[staged.address] == index + 1:
                blocks.append(
                    (
                        staged.address,
                        PyBytes_FromStringAndSize(<const char *>staged.data, BLOCK_SIZE),
                    )
                )
        key = None
        if self._new_key != NULL:
            key = PyBytes_FromStringAndSize(<const char *>self._new_key, KEY_SIZE)
        return self._store.commit(self.counter, blocks, key, replay)

    cdef void end(self) noexcept:
        """Drop the staged blocks, before the memory of their frames is used again."""
        while self._staged_count:
            self._staged_count -= 1
            self._staged_at[self._staged[self._staged_count].address] = 0

    cdef int _stage(self, uint16_t address, const unsigned char *data) except -1:
        cdef size_t capacity
        cdef Staged *items
        if self._staged_count == self._staged_capacity:
            capacity = 2 * self._staged_capacity + 64
            items = <Staged *>realloc(self._staged, capacity * sizeof(Staged))
            if items == NULL:
                raise MemoryError()
            self._staged = items
            self._staged_capacity = capacity
        self._staged[self._staged_count].address = address
        self._staged[self._staged_count].data = data
        self._staged_count += 1
        self._staged_at[address] = <uint32_t>self._staged_count
        return 0


# Functions, because gcc inlines no method at -O2: the table of methods refers to it.

cdef inline int _gather(Batch batch, GuestMemory memory, uint64_t length) except -1:
    """Copy the readable segments, ``length`` bytes in all, behind the requests."""
    cdef const Segment *segment = batch._buffers.readable.items
    cdef size_t index
    cdef size_t start = batch._requests_size
    cdef unsigned char *target
    if start + length > batch._requests_capacity:
        batch.requests = _grow(batch.requests, &batch._requests_capacity, start + length)
    target = batch.requests + start
    batch._requests_size = start + length
    if length == FRAME_SIZE and segment.length == FRAME_SIZE:  # without its stuff bytes
        memory.touch(segment.host, FRAME_SIZE)
        copy_frame(target, segment.host)
        return 0
    for index in range(batch._buffers.readable.count):
        memory.touch(segment[index].host, segment[index].length)
        memcpy(target, segment[index].host, segment[index].length)
        target += segment[index].length
    return 0


cdef inline void _scatter(Batch batch, GuestMemory memory, const Work *work) noexcept:
    """Write the answer of a chain into its device-writable buffers."""
    cdef const unsigned char *answer = batch.responses + work.response
    cdef uint64_t length = <uint64_t>work.answered * FRAME_SIZE
    cdef uint64_t part
    cdef Segment *segment = batch._buffers.writable.items + work.segment
    if length and length <= segment.length:
        memory.put(segment.guest_address, segment.host, answer, length)
        return
    while length:
        part = min(length, segment.length)
        memory.put(segment.guest_address, segment.host, answer, part)
        answer += part
        length -= part
        segment += 1


cdef void replay_write(
    unsigned char *write, const unsigned char *first, uint32_t count
) noexcept:
    """Make the 36 bytes of a write request in a replay record out of its frames."""
    memcpy(write, first + FRAME_WRITE_COUNTER, REPLAY_WRITE_SIZE - MAC_SIZE)
    memcpy(
        write + REPLAY_WRITE_SIZE - MAC_SIZE,
        first + <size_t>(count - 1) * FRAME_SIZE + FRAME_KEY_MAC,
        MAC_SIZE,
    )


cdef unsigned char *_grow(unsigned char *arena, size_t *capacity, size_t size) except? NULL:
    """Make an arena hold at least ``size`` bytes."""
    cdef unsigned char *grown
    if size <= capacity[0]:
        return arena
    size = max(size, 2 * capacity[0])
    grown = <unsigned char *>realloc(arena, size)
    if grown == NULL:
        raise MemoryError()
    capacity[0] = size
    return grown
