# SPDX-License-Identifier: Apache-2.0
"""The RPMB device: its requests and their results (virtio specification, "RPMB Device").

A batch of descriptor chains is copied out of guest memory, executed in order against a staged view,
made durable at once, and only then answered.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING

from vhost_rpmb._pure.batch import Batch, Register, View, Work
from vhost_rpmb._pure.journal import Journal
from vhost_rpmb._pure.mac import Authenticator
from vhost_rpmb._pure.virtqueue import Virtqueue
from vhost_rpmb.log import FRAMES, Logger
from vhost_rpmb.rpmb import limits, spec
from vhost_rpmb.rpmb.frame import Frame, take_write
from vhost_rpmb.rpmb.malformed import MalformedLog
from vhost_rpmb.rpmb.replay import Replay, Window
from vhost_rpmb.rpmb.results import count_frames, describe_answer, describe_request
from vhost_rpmb.virtio import features

if TYPE_CHECKING:
    from vhost_rpmb.storage.interface import DeviceStore

__all__ = ["RpmbDevice"]

_REPLAYED = -1  # a write that is durable, and whose answer is owed
_REGISTER = struct.Struct(">HHHI")  # response, result, address, write counter

logger = Logger(__name__)


class RpmbDevice:
    """A virtio RPMB device with one requestq.

    ``max_write_blocks`` (1 to 255 blocks of 256 bytes) and ``max_read_blocks`` (0 to 255, 0: no
    limit but the longest answer) bound one request; ``strict`` answers by the letter of the virtio
    text where eMMC software differs from it. ``virtio_features`` are the bits to offer
    (None: features.DEFAULT).
    """

    device_id = spec.VIRTIO_ID_RPMB
    num_queues = spec.RPMB_NUM_QUEUES
    served = 0  # chains answered so far, broken ones included

    def __init__(
        self,
        store: DeviceStore,
        *,
        max_write_blocks: int = 32,
        max_read_blocks: int = 255,
        strict: bool = False,
        virtio_features: int | None = None,
    ) -> None:
        if not 1 <= max_write_blocks <= 255:
            raise ValueError(f"the limit of a write is 1 to 255 blocks, not {max_write_blocks}")
        if not 0 <= max_read_blocks <= 255:
            raise ValueError(f"the limit of a read is 0 to 255 blocks, not {max_read_blocks}")
        size = len(store.image)
        if not size or size % spec.CAPACITY_UNIT or size > spec.MAX_CAPACITY:
            raise ValueError(f"an image has 1 to 128 units of 128 KiB, not {size} bytes")
        self._store = store
        self._confirm = store.confirm
        self._max_write_blocks = max_write_blocks
        self._max_read_blocks = max_read_blocks or limits.MAX_RESPONSE_FRAMES
        self._announced_read_blocks = max_read_blocks
        self._strict = strict
        self._features = features.DEFAULT if virtio_features is None else virtio_features
        features.check(self._features)
        self._capacity_blocks = size // spec.BLOCK_SIZE
        self._authenticator: Authenticator | None = None
        self._register: Register | None = None
        self._journal: Journal | None = None
        self.reload()
        self._batch = Batch()
        self._malformed = MalformedLog()

    @property
    def features(self) -> int:
        """The virtio feature bits that it offers."""
        return self._features

    @property
    def config(self) -> bytes:
        """The configuration space: capacity in 128 KiB units, max_wr_cnt, max_rd_cnt."""
        units = len(self._store.image) // spec.CAPACITY_UNIT
        return bytes((units, self._max_write_blocks, self._announced_read_blocks))

    @property
    def journal(self) -> memoryview | None:
        """A writable buffer of 64 bytes that survives the process, for the result register."""
        return None if self._journal is None else self._journal.buffer

    @journal.setter
    def journal(self, buffer: memoryview | None) -> None:
        self._journal = None if buffer is None else Journal(buffer)

    def restore_register(self, used_index: int) -> None:
        """Take the result register out of the journal: the one at the used index of the ring."""
        self._register = None if self._journal is None else self._journal.load(used_index)

    def clear_register(self) -> None:
        """Clear the result register and its journal: it belongs to one connection."""
        self._register = None
        if self._journal is not None:
            self._journal.clear()

    @property
    def register(self) -> bytes:
        """The result register, for another host: 10 bytes, none if it is empty."""
        return b"" if self._register is None else _REGISTER.pack(*self._register)

    @register.setter
    def register(self, packed: bytes) -> None:
        if len(packed) not in (0, _REGISTER.size):
            size = _REGISTER.size
            raise ValueError(f"a result register has 0 or {size} bytes, not {len(packed)}")
        self._register = Register(*_REGISTER.unpack(packed)) if packed else None

    def reload(self) -> None:
        """Take counter, key and replay record again: another daemon may have changed them."""
        key = self._store.key
        self._authenticator = Authenticator(key) if key is not None else None
        self._window = Window(self._store.replay)

    def reset(self) -> None:
        """Clear the result register and owe no answer (RESET_DEVICE); durable state stays."""
        self.clear_register()
        if self._window.left:
            self._window.close()
            self._store.settle()

    def process(self, queue: Virtqueue) -> int:
        """Serve one batch of what is available in the requestq; return NOTIFY, MORE, ... flags.

        Never raises for what a guest does.
        """
        batch = self._batch
        drained = batch.take(queue)
        if queue._memory_lost():
            batch.work.clear()  # the copied bytes may be invalid
        replay: Replay | None = None
        try:
            view, answers = self._execute(writable=True)
            if view.wrote:
                replay = self._window.record(
                    len(batch.work), b"".join(view.accepted), view.key_accepted
                )
                if not view.commit(replay):
                    replay = None
                    view, answers = self._execute(writable=False)
            if self._confirm is not None and batch.work:
                self._confirm()  # after the commit, which may have waited
        except BaseException:
            queue._abandon()  # the process ends
            raise
        self._authenticator = view.authenticator
        self._register = view.register
        batch.answer(queue, answers)
        if self._journal is not None and batch.work:
            self._journal.store(queue._position(), view.register)
        self.served += len(batch.work)
        flags = queue._close(drained)
        if replay is not None or self._window.left:
            self._answered(queue, replay)
        return flags

    def _answered(self, queue: Virtqueue, replay: Replay | None) -> None:
        """Note that the batch was published; ``replay``: the record of its commit, if any."""
        if not queue._memory_lost():
            self._window.answered(len(self._batch.work))
            if not self._window.left:
                self._store.settle()
        elif replay is not None:
            self._window.arm(replay)  # its chains may come again

    def _execute(self, writable: bool) -> tuple[View, list[bytes]]:
        """Execute the batch in order against a fresh view; return it and each chain's answer."""
        view = View(self._store, self._authenticator, self._register, writable)
        return view, [
            _ChainRun(self, view, work, owed=index < self._window.left).run()
            for index, work in enumerate(self._batch.work)
        ]


class _ChainRun:
    """The execution of one chain: requests in order, each answer appended while room lasts."""

    def __init__(self, device: RpmbDevice, view: View, work: Work, owed: bool) -> None:
        self._owed = owed  # the replay record may have its answers
        self._device = device
        self._view = view
        self._work = work
        self._room = work.room
        self._answers: list[bytes] = []
        self._left_out = 0  # frames of the answer at hand, if there was no room for it
        self._result = spec.VIRTIO_RPMB_RES_OK  # of the request at hand
        self._log = logger.enabled(FRAMES)

    def run(self) -> bytes:
        frames = self._work.frames
        if self._work.broken:
            return b""
        if frames is None:
            self._answer(Frame(result=spec.VIRTIO_RPMB_RES_GENERAL_FAILURE))
            if self._view.writable:  # the first time
                self._device._malformed.report(self._work.length)
            if self._log:
                logger.debug(
                    "request: expected whole frames of %d bytes, 1 to %d of them, found %d bytes: "
                    "GENERAL_FAILURE",
                    spec.FRAME_SIZE,
                    limits.MAX_REQUEST_FRAMES,
                    self._work.length,
                )
                self._log_answer(0)
            return b"".join(self._answers)
        index = 0
        while index < len(frames):
            frame = Frame.unpack(frames[index])
            handler = _HANDLERS.get(frame.req_resp, _ChainRun._unknown)
            answered = len(self._answers)
            index += handler(self, frame, frames[index:])
            if self._log:
                logger.debug("%s", describe_request(frame, self._result))
                self._log_answer(answered)
        return b"".join(self._answers)

    def _log_answer(self, answered: int) -> None:
        """Log the answer behind the first ``answered`` frames, or that it was left out."""
        for answer in self._answers[answered : answered + 1]:
            logger.debug("%s", describe_answer(Frame.unpack(answer), len(self._answers) - answered))
        if self._left_out:
            logger.debug(
                "answer left out: expected room for %s, found room for %s",
                count_frames(self._left_out),
                count_frames(self._room),
            )
            self._left_out = 0

    def _answer(self, *frames: Frame, counter: int | None = None) -> None:
        """Append one response, with a MAC if a key is programmed, if there is room for it.

        ``counter``: the write counter that it is about, if not the present one.
        """
        self._result = frames[0].result
        if len(frames) > self._room:
            self._left_out = len(frames)
            return
        self._room -= len(frames)
        expired = 0
        if (self._view.counter if counter is None else counter) == spec.MAX_WRITE_COUNTER:
            expired = spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
        packed = [frame._replace(result=frame.result | expired).pack() for frame in frames]
        authenticator = self._view.authenticator
        if authenticator is not None:
            mac = authenticator.mac(packed)
            packed[-1] = packed[-1][: spec.FRAME_KEY_MAC] + mac + packed[-1][spec.FRAME_DATA :]
        self._answers.extend(packed)

    def _bad_single_count(self, block_count: int) -> bool:
        """Judge the block_count of a request that is about one frame; eMMC software leaves it 0."""
        return block_count != 1 if self._device._strict else block_count > 1

    # Each handler takes its first frame and all frames from it on, and returns how many it used up.

    def _unknown(self, frame: Frame, _: list[bytes]) -> int:
        self._answer(Frame(result=spec.VIRTIO_RPMB_RES_GENERAL_FAILURE))
        return 1

    def _program_key(self, frame: Frame, _: list[bytes]) -> int:
        view = self._view
        if self._bad_single_count(frame.block_count):
            result = spec.VIRTIO_RPMB_RES_GENERAL_FAILURE
        elif self._owed and self._replays_key(frame.key_mac):
            view.key_accepted = True
            result = spec.VIRTIO_RPMB_RES_OK
        elif view.authenticator is not None or not view.writable:
            result = spec.VIRTIO_RPMB_RES_WRITE_FAILURE
        else:
            view.program(frame.key_mac)
            result = spec.VIRTIO_RPMB_RES_OK
        view.register = Register(spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, result)
        self._result = result
        return 1

    def _replays_key(self, key: bytes) -> bool:
        """Whether the commit of the replay record programmed this key; in constant time."""
        stored = self._device._store.key
        return (
            self._device._window.has_key and stored is not None and hmac.compare_digest(key, stored)
        )

    def _get_write_counter(self, frame: Frame, _: list[bytes]) -> int:
        result, counter = spec.VIRTIO_RPMB_RES_OK, 0
        if self._view.authenticator is None:
            result = spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
        elif self._bad_single_count(frame.block_count):
            result = spec.VIRTIO_RPMB_RES_GENERAL_FAILURE
        else:
            counter = self._view.counter
        self._answer(
            Frame(
                nonce=frame.nonce,
                write_counter=counter,
                result=result,
                req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER,
            )
        )
        return 1

    def _data_write(self, first: Frame, rest: list[bytes]) -> int:
        view = self._view
        frames, sound, length = take_write(first, rest, self._device._max_write_blocks)
        result = self._judge_write(first, frames, rest[: first.block_count], sound)
        if result == spec.VIRTIO_RPMB_RES_OK:
            view.write(first.address, [frame.data for frame in frames])
            view.accepted.append(_replay_write(frames))
        counter = view.counter if view.authenticator is not None else 0
        if result == _REPLAYED:
            view.accepted.append(_replay_write(frames))
            result, counter = spec.VIRTIO_RPMB_RES_OK, first.write_counter + 1
        view.register = Register(spec.VIRTIO_RPMB_RESP_DATA_WRITE, result, first.address, counter)
        self._result = result
        return length

    def _judge_write(self, first: Frame, frames: list[Frame], raw: list[bytes], sound: bool) -> int:
        """Name the first check that a write request fails, or OK, or _REPLAYED.

        ``sound``: the count is allowed, and that many frames are there and agree. Only where the
        write counter is at fault, and only for a MAC that was verified, the replay record is asked.
        """
        view, device = self._view, self._device
        if view.authenticator is None:
            return spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
        if not sound:
            return spec.VIRTIO_RPMB_RES_GENERAL_FAILURE
        in_range = first.address + len(frames) <= device._capacity_blocks
        if view.counter == spec.MAX_WRITE_COUNTER:
            if (
                self._owed
                and in_range
                and view.authenticator.verify(raw, frames[-1].key_mac)
                and device._window.has_write(_replay_write(frames))
            ):
                return _REPLAYED
            if device._strict:
                return spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
            return (  # OP-TEE reads the bare bit as OK
                spec.VIRTIO_RPMB_RES_WRITE_FAILURE | spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
            )
        if not in_range:
            return spec.VIRTIO_RPMB_RES_ADDR_FAILURE
        if not view.authenticator.verify(raw, frames[-1].key_mac):
            return spec.VIRTIO_RPMB_RES_AUTH_FAILURE
        if first.write_counter != view.counter:
            if self._owed and device._window.has_write(_replay_write(frames)):
                return _REPLAYED
            return spec.VIRTIO_RPMB_RES_COUNT_FAILURE
        if not view.writable:
            return spec.VIRTIO_RPMB_RES_WRITE_FAILURE
        return spec.VIRTIO_RPMB_RES_OK

    def _data_read(self, frame: Frame, _: list[bytes]) -> int:
        view, device = self._view, self._device
        count = frame.block_count
        if not count and not device._strict:
            count = min(self._room, device._max_read_blocks)
        result = spec.VIRTIO_RPMB_RES_OK
        blocks: list[bytes | None] = []
        if view.authenticator is None:
            result = spec.VIRTIO_RPMB_RES_NO_AUTH_KEY
        elif not 0 < count <= device._max_read_blocks:
            result = spec.VIRTIO_RPMB_RES_GENERAL_FAILURE
        elif frame.address + count > device._capacity_blocks:
            result = spec.VIRTIO_RPMB_RES_ADDR_FAILURE
        elif count > self._room:
            result = spec.VIRTIO_RPMB_RES_GENERAL_FAILURE
        else:
            blocks = [view.read(frame.address + number) for number in range(count)]
            if None in blocks:
                result = spec.VIRTIO_RPMB_RES_READ_FAILURE
        response = Frame(
            nonce=frame.nonce,
            address=frame.address,
            block_count=frame.block_count,
            result=result,
            req_resp=spec.VIRTIO_RPMB_RESP_DATA_READ,
        )
        if result == spec.VIRTIO_RPMB_RES_OK:
            self._answer(
                *(response._replace(data=block, block_count=count) for block in blocks if block)
            )
        else:
            self._answer(response)
        return 1

    def _result_read(self, frame: Frame, _: list[bytes]) -> int:
        register = self._view.register
        if register is None or self._bad_single_count(frame.block_count):
            return self._unknown(frame, [])
        self._answer(
            Frame(
                write_counter=register.write_counter,
                address=register.address,
                result=register.result,
                req_resp=register.req_resp,
            ),
            counter=register.write_counter if _is_written(register) else None,
        )
        return 1


_HANDLERS: dict[int, Callable[[_ChainRun, Frame, list[bytes]], int]] = {
    spec.VIRTIO_RPMB_REQ_PROGRAM_KEY: _ChainRun._program_key,
    spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER: _ChainRun._get_write_counter,
    spec.VIRTIO_RPMB_REQ_DATA_WRITE: _ChainRun._data_write,
    spec.VIRTIO_RPMB_REQ_DATA_READ: _ChainRun._data_read,
    spec.VIRTIO_RPMB_REQ_RESULT_READ: _ChainRun._result_read,
}


def _replay_write(frames: list[Frame]) -> bytes:
    """Return a write request as a replay record has it."""
    return frames[0].write_counter.to_bytes(4, "big") + frames[-1].key_mac


def _is_written(register: Register) -> bool:
    """Whether a register is about a successful write: its counter may be of an earlier time."""
    return (
        register.req_resp == spec.VIRTIO_RPMB_RESP_DATA_WRITE
        and register.result == spec.VIRTIO_RPMB_RES_OK
    )
