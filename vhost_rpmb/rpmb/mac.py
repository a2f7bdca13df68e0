# SPDX-License-Identifier: Apache-2.0
"""The MAC of RPMB frames (virtio specification, "Device Operation: Request Queue")."""

from __future__ import annotations

from collections.abc import Iterable

from cryptography.hazmat.primitives import constant_time, hashes, hmac

from vhost_rpmb.rpmb import spec

__all__ = ["Authenticator"]


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
