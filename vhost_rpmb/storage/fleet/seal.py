# SPDX-License-Identifier: Apache-2.0
"""Encryption and authentication of the state: readers of the engine learn nothing, forging fails.

Each device has a random *secret*, from which the keys of its chunks, log and head are derived. The
secret is sealed with the key-encryption key, which the hosts have and the engine has not. All of it
is AES-256-GCM with a random nonce. One key seals at most 2^32 log entries, because each raises the
write counter: within the bound for random nonces (NIST SP 800-38D, 8.3).
"""

from __future__ import annotations

import hmac
import os

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

__all__ = ["KEY_SIZE", "MAC_SIZE", "KeyEncryptionKey", "Sealer", "Unsealable"]

KEY_SIZE = 32  # bytes
MAC_SIZE = 32  # bytes
_NONCE_SIZE = 12  # bytes


class Unsealable(Exception):
    """Sealed bytes that were changed, moved here from another place, or sealed with another key."""


def _derive(secret: bytes, purpose: bytes) -> bytes:
    """Return an independent key for each purpose: HKDF's expansion to one block (RFC 5869)."""
    return hmac.digest(secret, purpose + b"\x01", "sha256")


def _seal(cipher: AESGCM, data: bytes, place: bytes) -> bytes:
    nonce = os.urandom(_NONCE_SIZE)
    return nonce + cipher.encrypt(nonce, data, place)


def _open(cipher: AESGCM, sealed: bytes, place: bytes) -> bytes:
    try:
        return cipher.decrypt(sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:], place)
    except (InvalidTag, ValueError) as error:
        raise Unsealable from error


class KeyEncryptionKey:
    """The key that seals the secrets of devices; ``name`` identifies it without revealing it."""

    def __init__(self, raw: bytes) -> None:
        if len(raw) != KEY_SIZE:
            raise ValueError(f"a key-encryption key has {KEY_SIZE} bytes, not {len(raw)}")
        self._cipher = AESGCM(_derive(raw, b"vhost-rpmb secrets of devices"))
        self.name = _derive(raw, b"vhost-rpmb name of the key-encryption key")[:8].hex()

    def wrap(self, secret: bytes, context: bytes) -> bytes:
        """Seal the secret of a device; ``context`` names the device."""
        return _seal(self._cipher, secret, context)

    def unwrap(self, wrapped: bytes, context: bytes) -> Sealer:
        """Return what opens the device's state. Raises `Unsealable`."""
        return Sealer(self.unwrap_secret(wrapped, context), context)

    def unwrap_secret(self, wrapped: bytes, context: bytes) -> bytes:
        """Return the secret itself, to be wrapped with another key. Raises `Unsealable`."""
        return _open(self._cipher, wrapped, context)


class Sealer:
    """Seals the state of one device; ``place`` is where in the device's state the bytes belong."""

    def __init__(self, secret: bytes, context: bytes) -> None:
        self._context = context
        self._cipher = AESGCM(_derive(secret, b"vhost-rpmb contents"))
        self._mac_key = _derive(secret, b"vhost-rpmb head")

    def seal(self, data: bytes, place: bytes) -> bytes:
        """Encrypt and authenticate; the result opens at the same place only."""
        return _seal(self._cipher, data, self._context + b"\0" + place)

    def open(self, sealed: bytes, place: bytes) -> bytes:
        """Decrypt. Raises `Unsealable`."""
        return _open(self._cipher, sealed, self._context + b"\0" + place)

    def mac(self, data: bytes) -> bytes:
        """Authenticate bytes that stay readable."""
        return hmac.digest(self._mac_key, self._context + b"\0" + data, "sha256")
