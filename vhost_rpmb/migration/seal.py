# SPDX-License-Identifier: Apache-2.0
"""The device's key, sealed for its way to another host by a key file that both hosts have."""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Callable

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from vhost_rpmb.errors import UsageError
from vhost_rpmb.storage.local.files import open_regular
from vhost_rpmb.storage.local.keyfile import exposure

__all__ = ["MigrationKey"]

_KEY_SIZE = 32  # bytes
_NONCE_SIZE = 12  # bytes


class MigrationKey:
    """AES-256-GCM with a random nonce; each hand-over seals one key of 32 bytes."""

    def __init__(self, raw: bytes) -> None:
        self._cipher = AESGCM(hmac.digest(raw, b"vhost-rpmb migration\x01", "sha256"))

    @classmethod
    def load(cls, path: str, warn: Callable[[str], None]) -> MigrationKey:
        """Read the key file. Raises UsageError unless it has 32 bytes."""
        try:
            with open(path, "rb", opener=open_regular) as file:
                raw = file.read(_KEY_SIZE + 1)
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) | stat.S_IFREG
        except OSError as error:
            raise UsageError(f"--migration-key={path}: {error.strerror}") from error
        if len(raw) != _KEY_SIZE:
            raise UsageError(
                f"--migration-key={path}: expected {_KEY_SIZE} bytes, found"
                f" {'more' if len(raw) > _KEY_SIZE else len(raw)}: create one with"
                f" (umask 077; head -c 32 /dev/urandom > {path})"
            )
        if exposed := exposure(path, mode):
            warn(f"the migration key file {exposed}")
        return cls(raw)

    def seal(self, key: bytes, context: bytes) -> bytes:
        """Encrypt and authenticate a key; ``context`` names the hand-over."""
        nonce = os.urandom(_NONCE_SIZE)
        return nonce + self._cipher.encrypt(nonce, key, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt a key. Raises ValueError if it was sealed otherwise."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_SIZE], sealed[_NONCE_SIZE:], context)
        except (InvalidTag, ValueError):
            raise ValueError(
                "expected a key that was sealed with this --migration-key, found another: use the"
                " same file on both hosts"
            ) from None
