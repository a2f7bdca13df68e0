# SPDX-License-Identifier: Apache-2.0
"""Requests of a chain, and answers that differ from those of the real device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from vhost_rpmb.injection.script import WRITES, Action, Rule
from vhost_rpmb.rpmb import limits, spec
from vhost_rpmb.rpmb.frame import RESULT_READ, Frame, cut, take_write
from vhost_rpmb.rpmb.mac import Authenticator
from vhost_rpmb.storage.interface import DeviceStore

__all__ = ["Answers", "Request", "split"]

_RESPONSES = {
    spec.VIRTIO_RPMB_REQ_PROGRAM_KEY: spec.VIRTIO_RPMB_RESP_PROGRAM_KEY,
    spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER: spec.VIRTIO_RPMB_RESP_GET_COUNTER,
    spec.VIRTIO_RPMB_REQ_DATA_WRITE: spec.VIRTIO_RPMB_RESP_DATA_WRITE,
    spec.VIRTIO_RPMB_REQ_DATA_READ: spec.VIRTIO_RPMB_RESP_DATA_READ,
}

Run = Callable[[bytes, int], bytes]  # a request and its room in frames, to its answer


class Request(NamedTuple):
    """One request of a chain."""

    raw: bytes  # all of its frames
    first: Frame
    blocks: range  # that it is about

    @property
    def req_resp(self) -> int:
        """The type."""
        return self.first.req_resp


def split(raw: bytes, room: int, max_write_blocks: int, max_read_blocks: int) -> Iterator[Request]:
    """Cut the bytes of a chain into requests as the device does; none if it refuses them.

    ``room``: for all answers, in frames. A read of block count 0 is about as many blocks, up to the
    maximum (0: none): OP-TEE reads so.
    """
    if len(raw) % spec.FRAME_SIZE or len(raw) > limits.MAX_REQUEST_FRAMES * spec.FRAME_SIZE:
        return
    frames = cut(raw)
    while frames:
        first = Frame.unpack(frames[0])
        count, blocks = 1, first.block_count
        if first.req_resp == spec.VIRTIO_RPMB_REQ_DATA_WRITE:
            count = take_write(first, frames, max_write_blocks).length
        elif not blocks and first.req_resp == spec.VIRTIO_RPMB_REQ_DATA_READ:
            blocks = min(room, max_read_blocks or room)
        addressed = range(first.address, first.address + max(blocks, 1))
        yield Request(b"".join(frames[:count]), first, addressed)
        frames = frames[count:]


class Answers:
    """Makes answers with the present key; keeps a result register that a rule has altered.

    ``register`` is the frame that answers RESULT_READ, None where the device's own is right.
    """

    def __init__(self, store: DeviceStore) -> None:
        self._store = store
        self.register: bytes | None = None

    def answer(self, request: Request, rules: Sequence[Rule], run: Run, room: int) -> bytes:
        """Return the answer to one request under the first rule of each kind; may exceed the room.

        ``run`` lets the device execute a request.
        """
        answer = next((rule for rule in rules if rule.action is Action.ANSWER), None)
        corrupt = next((rule.field for rule in rules if rule.action is Action.CORRUPT), "")
        if request.req_resp in WRITES:
            self._write(request, answer, corrupt, run)
            return b""
        if request.req_resp == spec.VIRTIO_RPMB_REQ_RESULT_READ:
            raw = run(request.raw, room)
            if self.register is not None and request.first.block_count <= 1:
                raw = self.register
            if answer is not None and raw:
                raw = self._pack([Frame.unpack(raw)._replace(result=answer.result)])
        elif answer is not None:
            raw = self._pack([_failure(request.first, answer.result)])
        else:
            raw = run(request.raw, room)
        return self._corrupt(raw, corrupt) if corrupt else raw

    def _write(self, request: Request, answer: Rule | None, corrupt: str, run: Run) -> None:
        """Execute a write or a key, or do not; set the register."""
        first = request.first
        self.register = None
        if answer is None or answer.after:
            run(request.raw, 0)
            if answer is None and not corrupt:
                return
            frame = Frame.unpack(run(RESULT_READ, 1))
        else:
            frame = _failure(first, answer.result)
            if first.req_resp == spec.VIRTIO_RPMB_REQ_DATA_WRITE and self._store.key is not None:
                done = answer.result == spec.VIRTIO_RPMB_RES_OK
                counter = first.write_counter + 1 if done else self._store.counter
                frame = frame._replace(write_counter=min(counter, spec.MAX_WRITE_COUNTER))
        if answer is not None:
            frame = frame._replace(result=answer.result)
        raw = self._pack([frame])
        self.register = self._corrupt(raw, corrupt) if corrupt else raw

    def _corrupt(self, raw: bytes, field: str) -> bytes:
        """Change one bit of a field in each frame; the MAC covers it, unless it is the MAC."""
        frames = [Frame.unpack(each) for each in cut(raw)]
        if not frames:
            return raw
        if field == "mac":
            last = frames[-1]
            mac = bytes((last.key_mac[0] ^ 1,)) + last.key_mac[1:]
            return b"".join(frame.pack() for frame in (*frames[:-1], last._replace(key_mac=mac)))
        if field == "nonce":
            changed = [
                frame._replace(nonce=bytes((frame.nonce[0] ^ 1,)) + frame.nonce[1:])
                for frame in frames
            ]
        else:
            changed = [frame._replace(**{field: getattr(frame, field) ^ 1}) for frame in frames]
        return self._pack(changed)

    def _pack(self, frames: list[Frame]) -> bytes:
        """Return the bytes of an answer: with its MAC, and the bit of an expired counter."""
        if self._store.counter == spec.MAX_WRITE_COUNTER:
            expired = spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
            frames = [frame._replace(result=frame.result | expired) for frame in frames]
        packed = [frame._replace(key_mac=bytes(spec.MAC_SIZE)).pack() for frame in frames]
        if self._store.key is not None:
            mac = Authenticator(self._store.key).mac(packed)
            packed[-1] = frames[-1]._replace(key_mac=mac).pack()
        return b"".join(packed)


def _failure(request: Frame, result: int) -> Frame:
    """Return the one frame that reports a result, without write counter and data."""
    response = Frame(result=result, req_resp=_RESPONSES[request.req_resp])
    if request.req_resp == spec.VIRTIO_RPMB_REQ_DATA_WRITE:
        return response._replace(address=request.address)
    if request.req_resp == spec.VIRTIO_RPMB_REQ_DATA_READ:
        response = response._replace(address=request.address, block_count=request.block_count)
    return response if request.req_resp in WRITES else response._replace(nonce=request.nonce)
