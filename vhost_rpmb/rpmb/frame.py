# SPDX-License-Identifier: Apache-2.0
"""RPMB frames: their layout, requests as a driver sends them and a device takes them, answers.

Frames are 512 bytes, big-endian (virtio specification, "RPMB Device"; JEDEC JESD84-B51 section
6.6.22). Every request asks for its answer in the same chain, so PROGRAM_KEY and DATA_WRITE end in a
RESULT_READ frame.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.errors import RpmbResultError, VerificationError

if TYPE_CHECKING:
    from vhost_rpmb.rpmb.mac import Authenticator

_LAYOUT = struct.Struct(">196x32s256s16sIHHHH")
_NO_MAC = bytes(spec.MAC_SIZE)


class Frame(NamedTuple):
    """One RPMB frame without its stuff bytes.

    ``key_mac`` 32 bytes, ``data`` 256 bytes, ``nonce`` 16 bytes; ``address`` and ``block_count``
    in blocks of 256 bytes.
    """

    key_mac: bytes = _NO_MAC
    data: bytes = bytes(spec.BLOCK_SIZE)
    nonce: bytes = bytes(spec.NONCE_SIZE)
    write_counter: int = 0
    address: int = 0
    block_count: int = 0
    result: int = 0
    req_resp: int = 0

    def pack(self) -> bytes:
        """Return the 512 bytes of the frame; the stuff bytes are zero."""
        return _LAYOUT.pack(*self)

    @classmethod
    def unpack(cls, raw: bytes) -> Frame:
        """Read a frame from exactly 512 bytes; raise ValueError for any other length."""
        if len(raw) != spec.FRAME_SIZE:
            raise ValueError(f"a frame has {spec.FRAME_SIZE} bytes, not {len(raw)}")
        return cls(*_LAYOUT.unpack(raw))


def cut(raw: bytes) -> list[bytes]:
    """Cut whole frames apart."""
    return [raw[start : start + spec.FRAME_SIZE] for start in range(0, len(raw), spec.FRAME_SIZE)]


class TakenWrite(NamedTuple):
    """The frames that a DATA_WRITE request uses up, from the first one on.

    ``frames``: as many as its block count says, if that is allowed. ``sound``: all of them are
    there and agree. ``length``: how many it uses up, also if it is not sound.
    """

    frames: list[Frame]
    sound: bool
    length: int


def take_write(first: Frame, rest: Sequence[bytes], max_write_blocks: int) -> TakenWrite:
    """Take a DATA_WRITE request off the frames of a chain, which begin with ``first``."""
    count = first.block_count
    frames: list[Frame] = []
    if 0 < count <= max_write_blocks:
        frames = [Frame.unpack(raw) for raw in rest[:count]]
    if 0 < len(frames) == count and all(_continues(first, frame) for frame in frames):
        return TakenWrite(frames, True, count)
    run = 1
    while run < len(rest) and Frame.unpack(rest[run]).req_resp == first.req_resp:
        run += 1
    return TakenWrite(frames, False, run)


def _continues(first: Frame, frame: Frame) -> bool:
    """Tell whether a frame belongs to the write request that ``first`` begins."""
    return (
        frame.req_resp == first.req_resp
        and frame.address == first.address
        and frame.block_count == first.block_count
        and frame.write_counter == first.write_counter
    )


_EXPIRED = spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
RESULT_READ = Frame(block_count=1, req_resp=spec.VIRTIO_RPMB_REQ_RESULT_READ).pack()


def program_key_request(key: bytes) -> bytes:
    """PROGRAM_KEY and RESULT_READ: 1,024 bytes, answered by 512. ``key`` has 32 bytes."""
    if len(key) != spec.KEY_SIZE:
        raise ValueError(f"a key has {spec.KEY_SIZE} bytes, not {len(key)}")
    request = Frame(key_mac=key, block_count=1, req_resp=spec.VIRTIO_RPMB_REQ_PROGRAM_KEY)
    return request.pack() + RESULT_READ


def counter_request(nonce: bytes) -> bytes:
    """GET_WRITE_COUNTER: 512 bytes, answered by 512. ``nonce`` has 16 bytes."""
    request_type = spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER
    return Frame(nonce=nonce, block_count=1, req_resp=request_type).pack()


def read_request(address: int, count: int, nonce: bytes) -> bytes:
    """DATA_READ of ``count`` blocks: 512 bytes, answered by 512 a block."""
    request_type = spec.VIRTIO_RPMB_REQ_DATA_READ
    return Frame(nonce=nonce, address=address, block_count=count, req_resp=request_type).pack()


def write_request(
    address: int, data: bytes, counter: int, authenticator: Authenticator | None
) -> bytes:
    """DATA_WRITE and RESULT_READ: 512 bytes a block and 512, answered by 512.

    ``data`` is a positive multiple of 256 bytes; ``counter`` the device's present write counter.
    Without an authenticator the MAC is zero.
    """
    count, rest = divmod(len(data), spec.BLOCK_SIZE)
    if rest or not count:
        raise ValueError(f"a write takes whole blocks of {spec.BLOCK_SIZE} bytes, not {len(data)}")
    frames = [
        Frame(
            data=data[start : start + spec.BLOCK_SIZE],
            write_counter=counter,
            address=address,
            block_count=count,
            req_resp=spec.VIRTIO_RPMB_REQ_DATA_WRITE,
        )
        for start in range(0, len(data), spec.BLOCK_SIZE)
    ]
    if authenticator is not None:
        mac = authenticator.mac(frame.pack() for frame in frames)
        frames[-1] = frames[-1]._replace(key_mac=mac)
    return b"".join(frame.pack() for frame in frames) + RESULT_READ


def check_program_key(answer: bytes, authenticator: Authenticator) -> None:
    """Check the answer to PROGRAM_KEY; ``authenticator`` has the key that was to be programmed."""
    _check("PROGRAM_KEY", answer, spec.VIRTIO_RPMB_RESP_PROGRAM_KEY, authenticator)


def check_counter(answer: bytes, nonce: bytes, authenticator: Authenticator | None) -> int:
    """Return the write counter of the answer to GET_WRITE_COUNTER."""
    response_type = spec.VIRTIO_RPMB_RESP_GET_COUNTER
    frames = _check("GET_WRITE_COUNTER", answer, response_type, authenticator, nonce=nonce)
    return frames[0].write_counter


def check_read(
    answer: bytes, address: int, count: int, nonce: bytes, authenticator: Authenticator | None
) -> bytes:
    """Return the data, 256 bytes a block, of the answer to DATA_READ."""
    response_type = spec.VIRTIO_RPMB_RESP_DATA_READ
    frames = _check("DATA_READ", answer, response_type, authenticator, nonce=nonce, count=count)
    for frame in frames:
        _expect("DATA_READ", "address", address, frame.address)
        _expect("DATA_READ", "block_count", count, frame.block_count)
    return b"".join(frame.data for frame in frames)


def check_write(
    answer: bytes, address: int, counter: int, authenticator: Authenticator | None
) -> int:
    """Return the new write counter of the answer to DATA_WRITE; ``counter`` is the one sent."""
    response_type = spec.VIRTIO_RPMB_RESP_DATA_WRITE
    frame = _check("DATA_WRITE", answer, response_type, authenticator)[0]
    # The write that takes the counter to its end answers OK with the expired bit, one refused
    # because of that end may answer the bare bit. Only the counter tells them apart.
    if frame.result == _EXPIRED and frame.write_counter == counter == spec.MAX_WRITE_COUNTER:
        raise RpmbResultError("DATA_WRITE", frame.result, authenticator is not None)
    _expect("DATA_WRITE", "address", address, frame.address)
    _expect("DATA_WRITE", "write_counter", counter + 1, frame.write_counter)
    return frame.write_counter


def _check(
    name: str,
    answer: bytes,
    response_type: int,
    authenticator: Authenticator | None,
    *,
    nonce: bytes = bytes(spec.NONCE_SIZE),
    count: int = 1,
) -> list[Frame]:
    """Return the frames of a good answer, after the checks that all answers have in common.

    Raises RpmbResultError for a failure that the device reports, VerificationError for an answer
    that cannot be the device's answer to this request.
    """
    if not answer or len(answer) % spec.FRAME_SIZE:
        raise VerificationError(
            f"{name}: expected an answer of {count * spec.FRAME_SIZE} bytes, found {len(answer)}"
        )
    raw = cut(answer)
    frames = [Frame.unpack(part) for part in raw]
    result = frames[0].result
    failed = bool(result & ~_EXPIRED)
    # A failure has one frame, and answers to requests that were not understood have no type.
    untyped = failed and frames[0].req_resp == 0
    _expect(name, "number of frames", 1 if failed else count, len(frames))
    for frame in frames:
        _expect(name, "result", result, frame.result)
        if not untyped:
            _expect(name, "req_resp", response_type, frame.req_resp)
            if frame.nonce != nonce:
                raise VerificationError(f"{name}: expected the request's nonce, found another")
    authentic = authenticator is not None and authenticator.verify(raw, frames[-1].key_mac)
    if failed:
        raise RpmbResultError(name, result, authentic)
    if authenticator is not None and not authentic:
        raise VerificationError(
            f"{name}: the MAC of the answer does not match the key: the device has another key, or "
            "the answer was altered"
        )
    return frames


def _expect(name: str, field: str, expected: int, found: int) -> None:
    if expected != found:
        raise VerificationError(f"{name}: expected {field} {expected}, found {found}")
