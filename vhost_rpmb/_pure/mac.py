# SPDX-License-Identifier: Apache-2.0
"""RPMB frames: 512 bytes, big-endian (virtio specification, "Device Operation: Request Queue")."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import NamedTuple

from cryptography.hazmat.primitives import constant_time, hashes, hmac

from vhost_rpmb.rpmb import spec

__all__ = ["Authenticator"]

_LAYOUT = struct.Struct(">196x32s256s16sIHHHH")
_NO_MAC = bytes(spec.MAC_SIZE)


class Frame(NamedTuple):
    """One RPMB frame without its stuff bytes, for whoever handles frames in Python.

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


class Authenticator:
    """HMAC-SHA256 under one 32-byte key, with the key schedule computed once."""

    def __init__(self, key: bytes) -> None:
        if len(key) != spec.KEY_SIZE:
            raise ValueError(f"a key has {spec.KEY_SIZE} bytes, not {len(key)}")
        self._keyed = hmac.HMAC(key, hashes.SHA256())

    def mac(self, frames: Iterable[bytes]) -> bytes:
        """Return the MAC (32 bytes) of a message: over bytes 228..511 of each 512-byte frame."""
        message = self._keyed.copy()
        for frame in frames:
            if len(frame) != spec.FRAME_SIZE:
                raise ValueError(f"a frame has {spec.FRAME_SIZE} bytes, not {len(frame)}")
            message.update(frame[spec.FRAME_DATA :])
        return message.finalize()

    def verify(self, frames: Iterable[bytes], mac: bytes) -> bool:
        """Compare ``mac`` with the MAC of the message, in constant time."""
        return constant_time.bytes_eq(self.mac(frames), mac)
