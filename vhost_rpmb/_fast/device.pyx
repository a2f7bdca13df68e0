# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The RPMB device: what each request is answered (virtio specification, "RPMB Device").

A batch of descriptor chains is copied out of guest memory, executed in order against a staged view,
made durable at once, and only then answered. No Python object is made on the way, but for what a
write hands to the store.
"""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint16_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcmp, memcpy, memset

from cpython.bytes cimport PyBytes_FromStringAndSize

from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.mac cimport Authenticator, new_authenticator
from vhost_rpmb._fast.memory cimport GuestMemory
from vhost_rpmb._fast.virtqueue cimport Chain, Segments, Virtqueue

__all__ = ["RpmbDevice"]

cdef extern from "<openssl/crypto.h>" nogil:
    void OPENSSL_cleanse(void *, size_t)

cdef extern from "byteorder.h":
    uint16_t load16(const unsigned char *) noexcept nogil
    uint32_t load32(const unsigned char *) noexcept nogil
    void store16(unsigned char *, uint16_t) noexcept nogil
    void store32(unsigned char *, uint32_t) noexcept nogil

cdef struct Work:
    # One chain of a batch: where its frames and answer lie in the arenas.
    uint16_t head
    bint broken
    bint whole  # its device-readable bytes are whole frames, and were copied
    size_t request  # offset of its frames, bytes
    uint32_t frames
    uint32_t room  # frames
    size_t response  # offset of its answer, bytes
    uint32_t answered  # frames
    size_t segment  # the first of its writable ones

cdef struct Register:
    # The result register: what RESULT_READ answers.
    bint valid
    uint16_t req_resp
    uint16_t result
    uint16_t address
    uint32_t write_counter

cdef struct Staged:
    # A block of 256 bytes that waits to be made durable, where its frame has it.
    uint16_t address
    const unsigned char *data


@cython.final
cdef class RpmbDevice:
    """A virtio RPMB device with one requestq.

    ``max_write_blocks`` (1 to 255 blocks of 256 bytes) and ``max_read_blocks`` (0 to 255, 0: no
    limit but the longest answer) bound one request; ``strict`` answers by the letter of the virtio
    text where eMMC software differs from it.
    """

    device_id = VIRTIO_ID_RPMB
    num_queues = RPMB_NUM_QUEUES
    features = (
        <uint64_t>1 << VIRTIO_F_VERSION_1
        | <uint64_t>1 << VIRTIO_F_INDIRECT_DESC
        | <uint64_t>1 << VIRTIO_F_EVENT_IDX
    )

    cdef readonly uint64_t served  # chains answered so far, broken ones included
    cdef object _store
    cdef const unsigned char[::1] _image
    cdef const unsigned char[::1] _damaged
    cdef uint32_t _blocks
    cdef uint32_t _max_write_blocks
    cdef uint32_t _max_read_blocks
    cdef uint32_t _announced_read_blocks
    cdef bint _strict
    # What holds between batches.
    cdef uint32_t _counter
    cdef Authenticator _authenticator
    cdef Register _register
    # The staged view of the batch at hand.
    cdef bint _writable
    cdef bint _wrote
    cdef bint _saw_key
    cdef uint32_t _view_counter
    cdef Authenticator _view_authenticator
    cdef const unsigned char *_new_key
    cdef Register _view_register
    cdef Staged *_staged
    cdef size_t _staged_count
    cdef size_t _staged_capacity
    cdef uint32_t *_staged_at  # by address: 1 + its latest index in _staged, 0 for none
    # The arenas, kept from batch to batch.
    cdef Work *_work
    cdef size_t _work_count
    cdef size_t _work_capacity
    cdef unsigned char *_requests
    cdef size_t _requests_size
    cdef size_t _requests_capacity
    cdef unsigned char *_responses
    cdef size_t _responses_size
    cdef size_t _responses_capacity
    cdef Segments _readable
    cdef Segments _segments

    def __init__(self, store, *, max_write_blocks=32, max_read_blocks=255, strict=False):
        if not 1 <= max_write_blocks <= 255:
            raise ValueError(f"the limit of a write is 1 to 255 blocks, not {max_write_blocks}")
        if not 0 <= max_read_blocks <= 255:
            raise ValueError(f"the limit of a read is 0 to 255 blocks, not {max_read_blocks}")
        size = len(store.image)
        if not size or size % CAPACITY_UNIT or size > MAX_CAPACITY:
            raise ValueError(f"an image has 1 to 128 units of 128 KiB, not {size} bytes")
        self._store = store
        self._image = store.image
        self._damaged = store.damaged
        self._blocks = size // BLOCK_SIZE
        self._max_write_blocks = max_write_blocks
        self._max_read_blocks = max_read_blocks or MAX_RESPONSE_FRAMES
        self._announced_read_blocks = max_read_blocks
        self._strict = bool(strict)
        self._counter = store.counter
        if store.key is not None:
            self._authenticator = Authenticator(store.key)
        free(self._staged_at)
        self._staged_at = <uint32_t *>calloc(self._blocks, sizeof(uint32_t))
        if self._staged_at == NULL:
            raise MemoryError()

    def __dealloc__(self):
        free(self._staged)
        free(self._staged_at)
        free(self._work)
        free(self._requests)
        free(self._responses)
        free(self._readable.items)
        free(self._segments.items)

    @property
    def config(self):
        """The configuration space: capacity in 128 KiB units, max_wr_cnt, max_rd_cnt."""
        units = self._blocks * BLOCK_SIZE // CAPACITY_UNIT
        return bytes((units, self._max_write_blocks, self._announced_read_blocks))

    def reset(self):
        """Forget the result register (VHOST_USER_RESET_DEVICE); what must last, lasts."""
        self._register.valid = False

    def process(self, Virtqueue queue not None):
        """Serve one batch of what is available in the requestq; return NOTIFY, MORE, ... flags.

        Never raises for what a guest does.
        """
        cdef bint drained = self._take(queue)
        cdef size_t index
        if queue.memory_lost():
            self._work_count = 0  # who knows what was copied
        self._responses = _grow(
            self._responses, &self._responses_capacity, self._responses_size
        )
        try:
            self._execute(True)
            if self._wrote and not self._commit():
                self._execute(False)
            self._counter = self._view_counter
            self._authenticator = self._view_authenticator
            self._register = self._view_register
        finally:
            self._unstage()
            if self._saw_key:
                OPENSSL_cleanse(self._requests, self._requests_capacity)
        for index in range(self._work_count):
            self._scatter(queue.memory, &self._work[index])
            queue.push(self._work[index].head, self._work[index].answered * FRAME_SIZE)
        self.served += self._work_count
        return queue.close(drained)

    cdef bint _take(self, Virtqueue queue) except -1:
        """Copy the available chains out of guest memory, up to the limit of a batch.

        Return whether nothing is left.
        """
        cdef uint32_t available = queue.open()
        cdef uint32_t _
        cdef uint64_t frames = 0
        cdef Chain chain
        cdef Work *work
        self._work_count = 0
        self._requests_size = 0
        self._responses_size = 0
        self._segments.count = 0
        for _ in range(available):
            if frames >= MAX_BATCH_FRAMES or queue.walked >= MAX_BATCH_DESCRIPTORS:
                return False
            self._readable.count = 0
            work = self._add_work()
            work.segment = self._segments.count
            if not queue.pop(
                &chain,
                &self._readable,
                MAX_REQUEST_FRAMES * FRAME_SIZE,
                &self._segments,
                MAX_RESPONSE_FRAMES * FRAME_SIZE,
            ):
                return False
            work.head = chain.head
            work.broken = chain.broken
            work.room = <uint32_t>min(
                chain.writable // FRAME_SIZE, <uint64_t>MAX_RESPONSE_FRAMES
            )
            if not work.room:
                self._segments.count = work.segment
            work.response = self._responses_size
            self._responses_size += <size_t>work.room * FRAME_SIZE
            work.request = self._requests_size
            work.whole = (
                chain.readable % FRAME_SIZE == 0
                and 0 < chain.readable <= MAX_REQUEST_FRAMES * FRAME_SIZE
            )
            work.frames = 0
            if work.whole:
                self._gather(queue.memory, chain.readable)
                work.frames = <uint32_t>(chain.readable // FRAME_SIZE)
            frames += work.room + work.frames
            self._work_count += 1
        return True

    cdef Work *_add_work(self) except NULL:
        """Give a place behind the chains taken so far."""
        cdef size_t capacity
        cdef Work *items
        if self._work_count == self._work_capacity:
            capacity = 2 * self._work_capacity + 64
            items = <Work *>realloc(self._work, capacity * sizeof(Work))
            if items == NULL:
                raise MemoryError()
            self._work = items
            self._work_capacity = capacity
        return &self._work[self._work_count]

    cdef int _gather(self, GuestMemory memory, uint64_t length) except -1:
        """Copy the readable segments, ``length`` bytes in all, behind the requests."""
        cdef size_t index
        self._requests = _grow(
            self._requests, &self._requests_capacity, self._requests_size + length
        )
        for index in range(self._readable.count):
            memory.touch(self._readable.items[index].host, self._readable.items[index].length)
            memcpy(
                self._requests + self._requests_size,
                self._readable.items[index].host,
                self._readable.items[index].length,
            )
            self._requests_size += self._readable.items[index].length
        return 0

    cdef void _scatter(self, GuestMemory memory, Work *work) noexcept:
        """Write the answer of a chain into its device-writable buffers."""
        cdef const unsigned char *answer = self._responses + work.response
        cdef uint64_t length = <uint64_t>work.answered * FRAME_SIZE
        cdef uint64_t part
        cdef size_t index = work.segment
        while length:
            part = min(length, self._segments.items[index].length)
            memory.touch(self._segments.items[index].host, part)
            memcpy(self._segments.items[index].host, answer, part)
            answer += part
            length -= part
            index += 1

    cdef int _execute(self, bint writable) except -1:
        """Execute the batch in order against a fresh view.

        Not ``writable``: nothing can be made durable, so writes that would be done fail.
        """
        cdef size_t index
        self._unstage()
        self._writable = writable
        self._wrote = False
        self._saw_key = False
        self._view_counter = self._counter
        self._view_authenticator = self._authenticator
        self._view_register = self._register
        self._new_key = NULL
        for index in range(self._work_count):
            self._work[index].answered = 0
            self._run(&self._work[index])
        return 0

    cdef bint _commit(self) except -1:
        """Hand the staged blocks, the counter and a new key to the store."""
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
        return self._store.commit(self._view_counter, blocks, key)

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

    cdef void _unstage(self) noexcept:
        while self._staged_count:
            self._staged_count -= 1
            self._staged_at[self._staged[self._staged_count].address] = 0

    cdef const unsigned char *_read(self, uint32_t address) noexcept:
        """Return one block, or NULL if it is not what was stored."""
        if self._staged_at[address]:
            return self._staged[self._staged_at[address] - 1].data
        if self._damaged[address]:
            return NULL
        return &self._image[<size_t>address * BLOCK_SIZE]

    # One chain: requests in order, each answer appended while room lasts.

    cdef int _run(self, Work *work) except -1:
        cdef const unsigned char *frame = self._requests + work.request
        cdef uint32_t left = work.frames
        cdef uint32_t taken
        cdef uint16_t request
        if work.broken:
            return 0
        if not work.whole:
            return self._unknown(work)
        while left:
            taken = 1
            request = load16(frame + FRAME_REQ_RESP)
            if request == VIRTIO_RPMB_REQ_DATA_READ:
                self._data_read(work, frame)
            elif request == VIRTIO_RPMB_REQ_DATA_WRITE:
                taken = self._data_write(frame, left)
            elif request == VIRTIO_RPMB_REQ_GET_WRITE_COUNTER:
                self._get_write_counter(work, frame)
            elif request == VIRTIO_RPMB_REQ_RESULT_READ:
                self._result_read(work, frame)
            elif request == VIRTIO_RPMB_REQ_PROGRAM_KEY:
                self._program_key(frame)
            else:
                self._unknown(work)
            frame += <size_t>taken * FRAME_SIZE
            left -= taken
        return 0

    cdef unsigned char *_begin_answer(self, Work *work, uint32_t count) noexcept:
        """Give ``count`` frames of the response, all zeros; NULL if there is no room for them."""
        cdef unsigned char *frames
        if count > work.room - work.answered:
            return NULL
        frames = self._responses + work.response + <size_t>work.answered * FRAME_SIZE
        memset(frames, 0, <size_t>count * FRAME_SIZE)
        return frames

    cdef int _end_answer(
        self,
        Work *work,
        unsigned char *frames,
        uint32_t count,
        uint16_t result,
        uint16_t req_resp,
    ) except -1:
        """Complete one response: results, types, and its MAC if a key is programmed."""
        cdef uint32_t index
        cdef unsigned char *frame = frames
        cdef Authenticator authenticator = self._view_authenticator
        if self._view_counter == MAX_WRITE_COUNTER:
            result |= VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
        if authenticator is not None:
            authenticator.begin()
        for index in range(count):
            frame = frames + <size_t>index * FRAME_SIZE
            store16(frame + FRAME_RESULT, result)
            store16(frame + FRAME_REQ_RESP, req_resp)
            if authenticator is not None:
                authenticator.add(frame)
        if authenticator is not None:
            authenticator.finish(frame + FRAME_KEY_MAC)
        work.answered += count
        return 0

    cdef bint _bad_single_count(self, const unsigned char *frame) noexcept:
        """Judge the block_count of a request that is about one frame; eMMC software leaves it 0."""
        cdef uint16_t block_count = load16(frame + FRAME_BLOCK_COUNT)
        return block_count != 1 if self._strict else block_count > 1

    cdef int _unknown(self, Work *work) except -1:
        cdef unsigned char *answer = self._begin_answer(work, 1)
        if answer != NULL:
            self._end_answer(work, answer, 1, VIRTIO_RPMB_RES_GENERAL_FAILURE, 0)
        return 0

    cdef int _program_key(self, const unsigned char *frame) except -1:
        cdef uint16_t result = VIRTIO_RPMB_RES_OK
        self._saw_key = True
        if self._bad_single_count(frame):
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        elif self._view_authenticator is not None or not self._writable:
            result = VIRTIO_RPMB_RES_WRITE_FAILURE
        else:
            self._new_key = frame + FRAME_KEY_MAC
            self._view_authenticator = new_authenticator(self._new_key)
            self._wrote = True
        self._view_register = Register(True, VIRTIO_RPMB_RESP_PROGRAM_KEY, result, 0, 0)
        return 0

    cdef int _get_write_counter(self, Work *work, const unsigned char *frame) except -1:
        cdef uint16_t result = VIRTIO_RPMB_RES_OK
        cdef unsigned char *answer = self._begin_answer(work, 1)
        if answer == NULL:
            return 0
        memcpy(answer + FRAME_NONCE, frame + FRAME_NONCE, NONCE_SIZE)
        if self._view_authenticator is None:
            result = VIRTIO_RPMB_RES_NO_AUTH_KEY
        elif self._bad_single_count(frame):
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        else:
            store32(answer + FRAME_WRITE_COUNTER, self._view_counter)
        return self._end_answer(work, answer, 1, result, VIRTIO_RPMB_RESP_GET_COUNTER)

    cdef uint32_t _data_write(self, const unsigned char *first, uint32_t left) except 0:
        """Execute a write request; return how many of the ``left`` frames it used up."""
        cdef uint32_t count = load16(first + FRAME_BLOCK_COUNT)
        cdef uint16_t address = load16(first + FRAME_ADDRESS)
        cdef uint32_t index
        cdef uint32_t run
        cdef bint sound = 0 < count <= self._max_write_blocks and count <= left
        if sound:
            for index in range(1, count):
                if not _continues(first, first + <size_t>index * FRAME_SIZE):
                    sound = False
                    break
        cdef uint16_t result = self._judge_write(first, count, sound)
        if result == VIRTIO_RPMB_RES_OK:
            for index in range(count):
                self._stage(
                    <uint16_t>(address + index), first + <size_t>index * FRAME_SIZE + FRAME_DATA
                )
            self._view_counter += 1
            self._wrote = True
        self._view_register = Register(
            True,
            VIRTIO_RPMB_RESP_DATA_WRITE,
            result,
            address,
            self._view_counter if self._view_authenticator is not None else 0,
        )
        if sound:
            return count
        run = 1
        while run < left and (
            load16(first + <size_t>run * FRAME_SIZE + FRAME_REQ_RESP) == VIRTIO_RPMB_REQ_DATA_WRITE
        ):
            run += 1
        return run

    cdef uint16_t _judge_write(
        self, const unsigned char *first, uint32_t count, bint sound
    ) except? 0xFFFF:
        """Name the first check that a write request fails, or OK.

        ``sound``: the count is allowed, and that many frames are there and agree.
        """
        cdef Authenticator authenticator = self._view_authenticator
        cdef uint32_t index
        if authenticator is None:
            return VIRTIO_RPMB_RES_NO_AUTH_KEY
        if not sound:
            return VIRTIO_RPMB_RES_GENERAL_FAILURE
        if self._view_counter == MAX_WRITE_COUNTER:
            if self._strict:
                return VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
            # OP-TEE reads the bare bit as OK.
            return VIRTIO_RPMB_RES_WRITE_FAILURE | VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
        if load16(first + FRAME_ADDRESS) + count > self._blocks:
            return VIRTIO_RPMB_RES_ADDR_FAILURE
        authenticator.begin()
        for index in range(count):
            authenticator.add(first + <size_t>index * FRAME_SIZE)
        if not authenticator.check(first + <size_t>(count - 1) * FRAME_SIZE + FRAME_KEY_MAC):
            return VIRTIO_RPMB_RES_AUTH_FAILURE
        if load32(first + FRAME_WRITE_COUNTER) != self._view_counter:
            return VIRTIO_RPMB_RES_COUNT_FAILURE
        if not self._writable:
            return VIRTIO_RPMB_RES_WRITE_FAILURE
        return VIRTIO_RPMB_RES_OK

    cdef int _data_read(self, Work *work, const unsigned char *frame) except -1:
        cdef uint32_t address = load16(frame + FRAME_ADDRESS)
        cdef uint32_t asked = load16(frame + FRAME_BLOCK_COUNT)
        cdef uint32_t room = work.room - work.answered
        cdef uint32_t count = asked
        cdef uint32_t frames = 1
        cdef uint32_t index
        cdef uint16_t result = VIRTIO_RPMB_RES_OK
        cdef unsigned char *answers
        cdef unsigned char *answer
        cdef const unsigned char *block
        if not count and not self._strict:
            count = min(room, self._max_read_blocks)
        if self._view_authenticator is None:
            result = VIRTIO_RPMB_RES_NO_AUTH_KEY
        elif not 0 < count <= self._max_read_blocks:
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        elif address + count > self._blocks:
            result = VIRTIO_RPMB_RES_ADDR_FAILURE
        elif count > room:
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        else:
            for index in range(count):
                if self._read(address + index) == NULL:
                    result = VIRTIO_RPMB_RES_READ_FAILURE
                    break
            else:
                asked = frames = count
        answers = self._begin_answer(work, frames)
        if answers == NULL:
            return 0
        for index in range(frames):
            answer = answers + <size_t>index * FRAME_SIZE
            if result == VIRTIO_RPMB_RES_OK:
                block = self._read(address + index)
                memcpy(answer + FRAME_DATA, block, BLOCK_SIZE)
            memcpy(answer + FRAME_NONCE, frame + FRAME_NONCE, NONCE_SIZE)
            store16(answer + FRAME_ADDRESS, <uint16_t>address)
            store16(answer + FRAME_BLOCK_COUNT, <uint16_t>asked)
        return self._end_answer(work, answers, frames, result, VIRTIO_RPMB_RESP_DATA_READ)

    cdef int _result_read(self, Work *work, const unsigned char *frame) except -1:
        cdef Register *register = &self._view_register
        cdef unsigned char *answer
        if not register.valid or self._bad_single_count(frame):
            return self._unknown(work)
        answer = self._begin_answer(work, 1)
        if answer == NULL:
            return 0
        store32(answer + FRAME_WRITE_COUNTER, register.write_counter)
        store16(answer + FRAME_ADDRESS, register.address)
        return self._end_answer(work, answer, 1, register.result, register.req_resp)


cdef bint _continues(const unsigned char *first, const unsigned char *frame) noexcept:
    """Tell whether a frame belongs to the write request that ``first`` begins."""
    return (
        load16(frame + FRAME_REQ_RESP) == load16(first + FRAME_REQ_RESP)
        and memcmp(frame + FRAME_WRITE_COUNTER, first + FRAME_WRITE_COUNTER, 8) == 0
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
