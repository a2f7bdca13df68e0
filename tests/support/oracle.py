# SPDX-License-Identifier: Apache-2.0
"""An independent frame builder, the oracle of the tests: it imports nothing of vhost_rpmb.

Layout, numbers and MAC of RPMB frames stand here a second time on purpose (virtio specification,
"RPMB Device"; JEDEC JESD84-B51 section 6.6.22). An error in `vhost_rpmb.rpmb`, which both engines
and the driver share, shows in tests that build requests and read answers with this module.
"""

from __future__ import annotations

import hashlib
import hmac
import struct
from collections.abc import Iterable
from typing import NamedTuple, Self

FRAME_SIZE = 512
STUFF_SIZE = 196
BLOCK_SIZE = 256
# Stuff bytes, key or MAC, data, nonce, write counter, address, block count, result, type.
LAYOUT = struct.Struct(">196s32s256s16sIHHHH")
AUTHENTICATED = slice(228, 512)  # the bytes of a frame that its MAC covers: from the data on

PROGRAM_KEY = 1
GET_WRITE_COUNTER = 2
DATA_WRITE = 3
DATA_READ = 4
RESULT_READ = 5

OK = 0
GENERAL = 1
AUTH = 2
COUNT = 3
ADDR = 4
WRITE = 5
READ = 6
NO_KEY = 7
EXPIRED = 0x80
LAST = 0xFFFF_FFFF  # the highest write counter

A, B, C = (bytes([letter]) * BLOCK_SIZE for letter in b"ABC")
KEY = bytes(range(100, 132))
OTHER_KEY = bytes(32)
NONCE = bytes(range(16))


class Frame(NamedTuple):
    """One frame without its stuff bytes."""

    key_mac: bytes = bytes(32)
    data: bytes = bytes(BLOCK_SIZE)
    nonce: bytes = bytes(16)
    write_counter: int = 0
    address: int = 0
    block_count: int = 0
    result: int = 0
    req_resp: int = 0

    def pack(self) -> bytes:
        return LAYOUT.pack(b"", *self)

    @classmethod
    def unpack(cls, raw: bytes) -> Self:
        """Read a frame, of which every stuff byte has to be zero."""
        stuff, *fields = LAYOUT.unpack(raw)
        assert not any(stuff)
        return cls(*fields)


def split(raw: bytes) -> list[Frame]:
    """Cut bytes into frames."""
    assert not len(raw) % FRAME_SIZE
    return [
        Frame.unpack(raw[start : start + FRAME_SIZE]) for start in range(0, len(raw), FRAME_SIZE)
    ]


def mac_of(*frames: Frame, key: bytes = KEY) -> bytes:
    """HMAC-SHA256 of the authenticated bytes of all frames."""
    covered = b"".join(frame.pack()[AUTHENTICATED] for frame in frames)
    return hmac.digest(key, covered, hashlib.sha256)


def sign(frames: Iterable[Frame], key: bytes = KEY) -> list[Frame]:
    """Put the MAC of all frames into the last."""
    signed = list(frames)
    signed[-1] = signed[-1]._replace(key_mac=mac_of(*signed, key=key))
    return signed


def sealed(key: bytes = KEY, **fields: int | bytes) -> Frame:
    """The one answer frame with these fields, every other field zero, and the right MAC."""
    return sign([Frame(**fields)], key)[0]  # type: ignore[arg-type]


def pack(frames: Iterable[Frame]) -> bytes:
    return b"".join(frame.pack() for frame in frames)


def request(req_resp: int, **fields: int | bytes) -> bytes:
    """Build one request frame; block_count is 1 unless given."""
    return Frame(**({"block_count": 1} | fields), req_resp=req_resp).pack()  # type: ignore[arg-type]


def program_key(key: bytes = KEY, block_count: int = 1) -> bytes:
    return request(PROGRAM_KEY, key_mac=key, block_count=block_count)


def read_counter(nonce: bytes = NONCE, block_count: int = 1) -> bytes:
    return request(GET_WRITE_COUNTER, nonce=nonce, block_count=block_count)


def read_result(block_count: int = 1) -> bytes:
    return request(RESULT_READ, block_count=block_count)


def read_data(address: int, block_count: int = 1, nonce: bytes = NONCE) -> bytes:
    return request(DATA_READ, address=address, block_count=block_count, nonce=nonce)


def write_data(
    counter: int,
    address: int,
    *blocks: bytes,
    key: bytes = KEY,
    block_count: int | None = None,
) -> bytes:
    """Build a write request, one frame a block, with its MAC in the last frame."""
    count = len(blocks) if block_count is None else block_count
    frames = (
        Frame(
            data=block,
            write_counter=counter,
            address=address,
            block_count=count,
            req_resp=DATA_WRITE,
        )
        for block in blocks
    )
    return pack(sign(frames, key))
