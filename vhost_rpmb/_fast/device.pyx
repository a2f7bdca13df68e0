# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, auto_pickle=False
"""The twin of vhost_rpmb._pure.device, where the docstrings are."""

cimport cython
from libc.stddef cimport size_t
from libc.stdint cimport uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memset

from cpython.bytes cimport PyBytes_FromStringAndSize

from vhost_rpmb._fast.batch cimport Batch, Register, View, Work, replay_write
from vhost_rpmb._fast.constants cimport *
from vhost_rpmb._fast.mac cimport Authenticator
from vhost_rpmb._fast.virtqueue cimport Virtqueue

from vhost_rpmb.rpmb.malformed import MalformedLog
from vhost_rpmb.rpmb.replay import Window
from vhost_rpmb.virtio.features import DEFAULT, check

__all__ = ["RpmbDevice"]

cdef extern from "byteorder.h":
    uint16_t load16(const unsigned char *) noexcept nogil
    uint32_t load32(const unsigned char *) noexcept nogil
    void store16(unsigned char *, uint16_t) noexcept nogil
    void store32(unsigned char *, uint32_t) noexcept nogil
    void clear_frame(unsigned char *) noexcept nogil


cdef extern from "journal.h" nogil:
    cdef struct journal_entry:
        uint64_t sequence
        uint32_t used
        uint8_t valid
        uint16_t req_resp
        uint16_t result
        uint16_t address
        uint32_t write_counter
    uint64_t journal_store(unsigned char *, uint64_t, journal_entry)
    bint journal_load(journal_entry *, const unsigned char *, size_t)

cdef extern from "<openssl/crypto.h>" nogil:
    int CRYPTO_memcmp(const void *, const void *, size_t)

cdef enum:
    JOURNAL_SIZE = 64  # bytes
    REGISTER_SIZE = 10  # bytes, of another host
    REPLAYED = 0x10000  # a write that is durable, and whose answer is owed


@cython.final
cdef class RpmbDevice:
    device_id = VIRTIO_ID_RPMB
    num_queues = RPMB_NUM_QUEUES

    cdef uint64_t _features
    cdef readonly uint64_t served  # chains answered so far, broken ones included
    cdef uint32_t _blocks
    cdef uint32_t _max_write_blocks
    cdef uint32_t _max_read_blocks
    cdef uint32_t _announced_read_blocks
    cdef bint _strict
    # The state between batches.
    cdef uint32_t _counter
    cdef Authenticator _authenticator
    cdef Register _register
    cdef object _store
    cdef object _confirm
    cdef object _window
    cdef object _malformed
    cdef uint32_t _owed  # chains left in the window
    cdef unsigned char[::1] _journal
    cdef uint64_t _sequence  # of the latest entry in the journal
    # The batch at hand.
    cdef Batch _batch
    cdef View _view
    cdef bint _saw_key
    cdef bint _in_window  # the replay record may have the answers of the chain at hand

    def __init__(
        self,
        store,
        *,
        max_write_blocks=32,
        max_read_blocks=255,
        strict=False,
        virtio_features=None,
    ):
        if not 1 <= max_write_blocks <= 255:
            raise ValueError(f"the limit of a write is 1 to 255 blocks, not {max_write_blocks}")
        if not 0 <= max_read_blocks <= 255:
            raise ValueError(f"the limit of a read is 0 to 255 blocks, not {max_read_blocks}")
        size = len(store.image)
        if not size or size % CAPACITY_UNIT or size > MAX_CAPACITY:
            raise ValueError(f"an image has 1 to 128 units of 128 KiB, not {size} bytes")
        self._blocks = size // BLOCK_SIZE
        self._max_write_blocks = max_write_blocks
        self._max_read_blocks = max_read_blocks or MAX_RESPONSE_FRAMES
        self._announced_read_blocks = max_read_blocks
        self._strict = bool(strict)
        self._features = DEFAULT if virtio_features is None else virtio_features
        check(self._features)
        self._store = store
        self._confirm = store.confirm
        self.reload()
        self._journal = None
        self._batch = Batch()
        self._malformed = MalformedLog()
        self._view = View(store)

    @property
    def features(self):
        return self._features

    @property
    def config(self):
        units = self._blocks * BLOCK_SIZE // CAPACITY_UNIT
        return bytes((units, self._max_write_blocks, self._announced_read_blocks))

    @property
    def journal(self):
        return None if self._journal is None else self._journal.base

    @journal.setter
    def journal(self, buffer):
        cdef journal_entry entry
        cdef size_t index
        cdef unsigned char[::1] journal = buffer
        if journal is not None and journal.shape[0] != JOURNAL_SIZE:
            raise ValueError(f"a journal is a writable buffer of {JOURNAL_SIZE} bytes")
        self._journal = journal
        self._sequence = 0
        if journal is None:
            return
        for index in range(2):
            if journal_load(&entry, &journal[0], index):
                self._sequence = max(self._sequence, entry.sequence)

    def restore_register(self, uint32_t used_index):
        cdef journal_entry entry
        cdef size_t index
        cdef uint64_t newest = 0
        self._register.valid = False
        if self._journal is None:
            return
        for index in range(2):
            if (
                journal_load(&entry, &self._journal[0], index)
                and entry.used == used_index
                and entry.sequence > newest
            ):
                newest = entry.sequence
                self._register = Register(
                    entry.valid != 0,
                    entry.req_resp,
                    entry.result,
                    entry.address,
                    entry.write_counter,
                )

    def clear_register(self):
        self._register.valid = False
        if self._journal is not None:
            memset(&self._journal[0], 0, JOURNAL_SIZE)

    @property
    def register(self):
        cdef unsigned char packed[REGISTER_SIZE]
        if not self._register.valid:
            return b""
        store16(&packed[0], self._register.req_resp)
        store16(&packed[2], self._register.result)
        store16(&packed[4], self._register.address)
        store32(&packed[6], self._register.write_counter)
        return PyBytes_FromStringAndSize(<char *>&packed[0], REGISTER_SIZE)

    @register.setter
    def register(self, bytes packed not None):
        cdef const unsigned char *fields = packed
        if len(packed) not in (0, REGISTER_SIZE):
            raise ValueError(f"a result register has 0 or {REGISTER_SIZE} bytes, not {len(packed)}")
        self._register.valid = False
        if packed:
            self._register = Register(
                True, load16(fields), load16(fields + 2), load16(fields + 4), load32(fields + 6)
            )

    def reload(self):
        self._counter = self._store.counter
        key = self._store.key
        self._authenticator = None if key is None else Authenticator(key)
        self._window = Window(self._store.replay)
        self._owed = self._window.left

    def reset(self):
        self.clear_register()
        if self._owed:
            self._window.close()
            self._owed = 0
            self._store.settle()

    def process(self, Virtqueue queue not None):
        cdef Batch batch = self._batch
        cdef View view = self._view
        cdef bint drained = batch.take(queue)
        cdef int flags
        cdef object replay = None
        if queue.memory_lost():
            batch.count = 0  # the copied bytes may be invalid
        try:
            self._execute(True)
            if view.wrote:
                replay = self._window.record(batch.count, view.accepted(), view.key_accepted)
                if not view.commit(replay):
                    replay = None
                    self._execute(False)
            if self._confirm is not None and batch.count:
                self._confirm()  # after the commit, which may have waited
            self._counter = view.counter
            self._authenticator = view.authenticator
            self._register = view.register
        finally:
            view.end()
            if self._saw_key:
                batch.wipe()
        batch.answer(queue)
        if self._journal is not None and batch.count:
            self._write_journal(queue.position())
        self.served += batch.count
        flags = queue.close(drained)
        if replay is not None or self._owed:
            self._answered(queue, replay)
        return flags

    cdef int _answered(self, Virtqueue queue, object replay) except -1:
        if not queue.memory_lost():
            self._window.answered(self._batch.count)
            if not self._window.left:
                self._store.settle()
        elif replay is not None:
            self._window.arm(replay)  # its chains may come again
        self._owed = self._window.left
        return 0

    cdef void _write_journal(self, uint32_t used) noexcept:
        cdef journal_entry entry
        memset(&entry, 0, sizeof(entry))
        entry.used = used
        if self._register.valid:
            entry.valid = 1
            entry.req_resp = self._register.req_resp
            entry.result = self._register.result
            entry.address = self._register.address
            entry.write_counter = self._register.write_counter
        self._sequence = journal_store(&self._journal[0], self._sequence, entry)

    cdef int _execute(self, bint writable) except -1:
        cdef size_t index
        self._view.begin(self._counter, self._authenticator, self._register, writable)
        self._saw_key = False
        for index in range(self._batch.count):
            self._batch.work[index].answered = 0
            self._in_window = index < self._owed
            _run(self, &self._batch.work[index])
        return 0

    cdef inline unsigned char *_place(self, Work *work, uint32_t count) noexcept:
        """Return where the next ``count`` frames of the response go; NULL if there is no room.

        The bytes before FRAME_KEY_MAC are zeros, the others are of an earlier answer.
        """
        if count > work.room - work.answered:
            return NULL
        return self._batch.responses + work.response + <size_t>work.answered * FRAME_SIZE

    cdef unsigned char *_begin_answer(self, Work *work) noexcept:
        """Return one frame of the response, all zeros; NULL if there is no room for it."""
        cdef unsigned char *frame = self._place(work, 1)
        if frame != NULL:
            clear_frame(frame)
        return frame

    cdef int _end_answer(
        self, Work *work, unsigned char *frame, uint16_t result, uint16_t req_resp
    ) except -1:
        """Complete one frame about the present write counter."""
        return self._end_answer_about(self._view.counter, work, frame, result, req_resp)

    cdef int _end_answer_about(
        self,
        uint32_t counter,
        Work *work,
        unsigned char *frame,
        uint16_t result,
        uint16_t req_resp,
    ) except -1:
        """Complete one frame: result, type, and its MAC if a key is programmed."""
        cdef Authenticator authenticator = self._view.authenticator
        store16(frame + FRAME_RESULT, _with_expiry(result, counter))
        store16(frame + FRAME_REQ_RESP, req_resp)
        if authenticator is not None:
            authenticator.begin()
            authenticator.add(frame)
            authenticator.finish(frame + FRAME_KEY_MAC)
        work.answered += 1
        return 0

    cdef bint _bad_single_count(self, const unsigned char *frame) noexcept:
        cdef uint16_t block_count = load16(frame + FRAME_BLOCK_COUNT)
        return block_count != 1 if self._strict else block_count > 1

    cdef int _unknown(self, Work *work) except -1:
        cdef unsigned char *answer = self._begin_answer(work)
        if answer != NULL:
            self._end_answer(work, answer, VIRTIO_RPMB_RES_GENERAL_FAILURE, 0)
        return 0

    cdef int _program_key(self, const unsigned char *frame) except -1:
        cdef uint16_t result = VIRTIO_RPMB_RES_OK
        self._saw_key = True
        if self._bad_single_count(frame):
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        elif self._in_window and self._replays_key(frame + FRAME_KEY_MAC):
            self._view.key_accepted = True
        elif self._view.authenticator is not None or not self._view.writable:
            result = VIRTIO_RPMB_RES_WRITE_FAILURE
        else:
            self._view.program(frame + FRAME_KEY_MAC)
        self._view.register = Register(True, VIRTIO_RPMB_RESP_PROGRAM_KEY, result, 0, 0)
        return 0

    cdef bint _replays_key(self, const unsigned char *key) except -1:
        cdef bytes stored = self._store.key
        if stored is None or not self._window.has_key:
            return False
        return CRYPTO_memcmp(<const unsigned char *>stored, key, KEY_SIZE) == 0

    cdef int _get_write_counter(self, Work *work, const unsigned char *frame) except -1:
        cdef uint16_t result = VIRTIO_RPMB_RES_OK
        cdef unsigned char *answer = self._begin_answer(work)
        if answer == NULL:
            return 0
        memcpy(answer + FRAME_NONCE, frame + FRAME_NONCE, NONCE_SIZE)
        if self._view.authenticator is None:
            result = VIRTIO_RPMB_RES_NO_AUTH_KEY
        elif self._bad_single_count(frame):
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        else:
            store32(answer + FRAME_WRITE_COUNTER, self._view.counter)
        return self._end_answer(work, answer, result, VIRTIO_RPMB_RESP_GET_COUNTER)

    cdef uint32_t _data_write(self, const unsigned char *first, uint32_t left) except 0:
        """Execute a write request; return how many of the ``left`` frames it consumed."""
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
        cdef uint32_t result = self._judge_write(first, count, sound)
        cdef uint32_t counter
        if result == VIRTIO_RPMB_RES_OK:
            self._view.write(address, first, count)
            self._view.accept(first, count)
        counter = self._view.counter if self._view.authenticator is not None else 0
        if result == REPLAYED:
            self._view.accept(first, count)
            result = VIRTIO_RPMB_RES_OK
            counter = load32(first + FRAME_WRITE_COUNTER) + 1
        self._view.register = Register(
            True, VIRTIO_RPMB_RESP_DATA_WRITE, <uint16_t>result, address, counter
        )
        if sound:
            return count
        run = 1
        while run < left and (
            load16(first + <size_t>run * FRAME_SIZE + FRAME_REQ_RESP) == VIRTIO_RPMB_REQ_DATA_WRITE
        ):
            run += 1
        return run

    cdef uint32_t _judge_write(
        self, const unsigned char *first, uint32_t count, bint sound
    ) except? 0xFFFF:
        cdef bint in_range = load16(first + FRAME_ADDRESS) + count <= self._blocks
        if self._view.authenticator is None:
            return VIRTIO_RPMB_RES_NO_AUTH_KEY
        if not sound:
            return VIRTIO_RPMB_RES_GENERAL_FAILURE
        if self._view.counter == MAX_WRITE_COUNTER:
            if (
                self._in_window
                and in_range
                and self._verify(first, count)
                and self._replays_write(first, count)
            ):
                return REPLAYED
            if self._strict:
                return VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
            # OP-TEE reads the bare bit as OK.
            return VIRTIO_RPMB_RES_WRITE_FAILURE | VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
        if not in_range:
            return VIRTIO_RPMB_RES_ADDR_FAILURE
        if not self._verify(first, count):
            return VIRTIO_RPMB_RES_AUTH_FAILURE
        if load32(first + FRAME_WRITE_COUNTER) != self._view.counter:
            if self._in_window and self._replays_write(first, count):
                return REPLAYED
            return VIRTIO_RPMB_RES_COUNT_FAILURE
        if not self._view.writable:
            return VIRTIO_RPMB_RES_WRITE_FAILURE
        return VIRTIO_RPMB_RES_OK

    cdef bint _verify(self, const unsigned char *first, uint32_t count) except -1:
        cdef Authenticator authenticator = self._view.authenticator
        cdef uint32_t index
        authenticator.begin()
        for index in range(count):
            authenticator.add(first + <size_t>index * FRAME_SIZE)
        return authenticator.check(first + <size_t>(count - 1) * FRAME_SIZE + FRAME_KEY_MAC)

    cdef bint _replays_write(self, const unsigned char *first, uint32_t count) except -1:
        cdef unsigned char write[REPLAY_WRITE_SIZE]
        replay_write(write, first, count)
        return self._window.has_write(
            PyBytes_FromStringAndSize(<const char *>write, REPLAY_WRITE_SIZE)
        )

    cdef int _data_read(self, Work *work, const unsigned char *frame) except -1:
        cdef uint32_t address = load16(frame + FRAME_ADDRESS)
        cdef uint32_t asked = load16(frame + FRAME_BLOCK_COUNT)
        cdef uint32_t room = work.room - work.answered
        cdef uint32_t count = asked
        cdef uint32_t frames = 1
        cdef uint32_t index
        cdef uint16_t result = VIRTIO_RPMB_RES_OK
        cdef uint16_t answered
        cdef const unsigned char *block = NULL
        cdef unsigned char *answer
        cdef Authenticator authenticator = self._view.authenticator
        if not count and not self._strict:
            count = min(room, self._max_read_blocks)
        if authenticator is None:
            result = VIRTIO_RPMB_RES_NO_AUTH_KEY
        elif not 0 < count <= self._max_read_blocks:
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        elif address + count > self._blocks:
            result = VIRTIO_RPMB_RES_ADDR_FAILURE
        elif count > room:
            result = VIRTIO_RPMB_RES_GENERAL_FAILURE
        else:
            for index in range(count):
                block = self._view.read(address + index)
                if block == NULL:
                    result = VIRTIO_RPMB_RES_READ_FAILURE
                    break
            else:
                asked = frames = count
        answer = self._place(work, frames)
        if answer == NULL:
            return 0
        answered = _with_expiry(result, self._view.counter)
        if authenticator is not None:
            authenticator.begin()
        for index in range(frames):
            if index:
                answer += FRAME_SIZE
            memset(answer + FRAME_KEY_MAC, 0, MAC_SIZE)
            if result == VIRTIO_RPMB_RES_OK:
                if frames > 1:  # of a single one, the block was found above
                    block = self._view.read(address + index)
                memcpy(answer + FRAME_DATA, block, BLOCK_SIZE)
            else:
                memset(answer + FRAME_DATA, 0, BLOCK_SIZE)
            memcpy(answer + FRAME_NONCE, frame + FRAME_NONCE, NONCE_SIZE)
            store32(answer + FRAME_WRITE_COUNTER, 0)
            store16(answer + FRAME_ADDRESS, <uint16_t>address)
            store16(answer + FRAME_BLOCK_COUNT, <uint16_t>asked)
            store16(answer + FRAME_RESULT, answered)
            store16(answer + FRAME_REQ_RESP, VIRTIO_RPMB_RESP_DATA_READ)
            if authenticator is not None:
                authenticator.add(answer)
        if authenticator is not None:
            authenticator.finish(answer + FRAME_KEY_MAC)
        work.answered += frames
        return 0

    cdef int _result_read(self, Work *work, const unsigned char *frame) except -1:
        cdef Register *register = &self._view.register
        cdef unsigned char *answer
        cdef uint32_t counter = self._view.counter
        if not register.valid or self._bad_single_count(frame):
            return self._unknown(work)
        answer = self._begin_answer(work)
        if answer == NULL:
            return 0
        store32(answer + FRAME_WRITE_COUNTER, register.write_counter)
        store16(answer + FRAME_ADDRESS, register.address)
        if (
            register.req_resp == VIRTIO_RPMB_RESP_DATA_WRITE
            and register.result == VIRTIO_RPMB_RES_OK
        ):
            counter = register.write_counter
        return self._end_answer_about(
            counter, work, answer, register.result, register.req_resp
        )


# A function, because gcc inlines no method at -O2: the table of methods refers to it.
cdef inline int _run(RpmbDevice device, Work *work) except -1:
    """Execute one chain: requests in order, each answer appended while room lasts."""
    cdef const unsigned char *frame = device._batch.requests + work.request
    cdef uint32_t left = work.frames
    cdef uint32_t taken
    cdef uint16_t request
    if work.broken:
        return 0
    if not work.whole:
        if device._view.writable:
            device._malformed.report(work.length)
        return device._unknown(work)
    while left:
        taken = 1
        request = load16(frame + FRAME_REQ_RESP)
        if request == VIRTIO_RPMB_REQ_DATA_READ:
            device._data_read(work, frame)
        elif request == VIRTIO_RPMB_REQ_DATA_WRITE:
            taken = device._data_write(frame, left)
        elif request == VIRTIO_RPMB_REQ_GET_WRITE_COUNTER:
            device._get_write_counter(work, frame)
        elif request == VIRTIO_RPMB_REQ_RESULT_READ:
            device._result_read(work, frame)
        elif request == VIRTIO_RPMB_REQ_PROGRAM_KEY:
            device._program_key(frame)
        else:
            device._unknown(work)
        frame += <size_t>taken * FRAME_SIZE
        left -= taken
    return 0


cdef inline uint16_t _with_expiry(uint16_t result, uint32_t counter) noexcept:
    """Return a result with the bit that says that the write counter is at its end."""
    if counter == MAX_WRITE_COUNTER:
        return result | VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    return result


cdef bint _continues(const unsigned char *first, const unsigned char *frame) noexcept:
    return (
        load16(frame + FRAME_REQ_RESP) == load16(first + FRAME_REQ_RESP)
        and memcmp(frame + FRAME_WRITE_COUNTER, first + FRAME_WRITE_COUNTER, 8) == 0
    )
