# SPDX-License-Identifier: Apache-2.0
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from vhost_rpmb._fast.constants cimport BLOCK_SIZE
from vhost_rpmb._fast.mac cimport Authenticator
from vhost_rpmb._fast.memory cimport GuestMemory
from vhost_rpmb._fast.ring cimport Answered, Buffers
from vhost_rpmb._fast.virtqueue cimport Virtqueue


cdef struct Work:
    # One chain of a batch: where its frames and answer are in the arenas.
    bint broken
    uint64_t length  # of its request, bytes
    bint whole  # its device-readable bytes are whole frames, and were copied
    size_t request  # offset of its frames, bytes
    uint32_t frames
    uint32_t room  # frames
    size_t response  # offset of its answer, bytes
    uint32_t answered  # frames
    size_t segment  # the first of its writable ones


cdef struct Register:
    # The result register: the content of the answer to RESULT_READ.
    bint valid
    uint16_t req_resp
    uint16_t result
    uint16_t address
    uint32_t write_counter


cdef struct Staged:
    # A block of 256 bytes that waits to be made durable, where its frame has it.
    uint16_t address
    const unsigned char *data


cdef class Batch:
    cdef Work *work
    cdef size_t count
    # The arenas, kept from batch to batch.
    cdef unsigned char *requests
    cdef unsigned char *responses
    cdef Answered *_answered  # by index of the chain
    cdef size_t _capacity
    cdef size_t _requests_size
    cdef size_t _requests_capacity
    cdef size_t _responses_size
    cdef size_t _responses_capacity
    cdef Buffers _buffers

    cdef bint take(self, Virtqueue queue) except -1
    cdef void answer(self, Virtqueue queue) noexcept
    cdef void wipe(self) noexcept
    cdef bint _take(self, Virtqueue queue) except -1
    cdef int _grow_responses(self) except -1
    cdef int _grow_work(self) except -1


cdef class View:
    cdef object _store
    cdef const unsigned char[::1] _image_view
    cdef const unsigned char[::1] _damaged_view
    cdef const unsigned char *_image  # both views keep their buffers
    cdef const unsigned char *_damaged
    cdef size_t _blocks
    cdef const unsigned char *_new_key
    cdef Staged *_staged
    cdef size_t _staged_count
    cdef size_t _staged_capacity
    cdef uint32_t *_staged_at  # by address: 1 + its latest index in _staged, 0 for none
    cdef Authenticator authenticator
    cdef Register register
    cdef uint32_t counter
    cdef bint writable
    cdef bint wrote
    cdef bint key_accepted
    cdef unsigned char *_accepted  # writes answered OK, as in `Replay.writes`
    cdef size_t _accepted_size
    cdef size_t _accepted_capacity

    cdef void begin(
        self, uint32_t counter, Authenticator authenticator, Register register, bint writable
    ) noexcept
    cdef int program(self, const unsigned char *key) except -1
    cdef int write(self, uint16_t address, const unsigned char *frames, uint32_t count) except -1
    cdef inline const unsigned char *read(self, uint32_t address) noexcept:
        """Return the content of a block; NULL where it is not what was stored."""
        if address >= self._blocks:
            return NULL
        if self._staged_at[address]:
            return self._staged[self._staged_at[address] - 1].data
        if self._damaged[address]:
            return NULL
        return self._image + <size_t>address * BLOCK_SIZE
    cdef int accept(self, const unsigned char *first, uint32_t count) except -1
    cdef bytes accepted(self)
    cdef bint commit(self, object replay) except -1
    cdef void end(self) noexcept
    cdef int _stage(self, uint16_t address, const unsigned char *data) except -1


cdef void replay_write(
    unsigned char *write, const unsigned char *first, uint32_t count
) noexcept
