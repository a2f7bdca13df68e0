# SPDX-License-Identifier: Apache-2.0
"""The key file on the disk, and telling keys apart without keeping one."""

from __future__ import annotations

import hmac
import os
import stat
from collections.abc import Callable
from contextlib import suppress

from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.image import sync_folder, write_all
from vhost_rpmb.storage.paths import new_of

__all__ = [
    "exposure",
    "fingerprint",
    "open_regular",
    "read_key_file",
    "require_key",
    "write_key_file",
]

_FINGERPRINT_LABEL = b"vhost-rpmb key fingerprint"


def read_key_file(path: str | None, warn: Callable[[str], None]) -> bytes | None:
    """Return what the key file holds, None where there is none; at most 32 bytes of it."""
    if path is None:
        return None
    try:
        with open(path, "rb", opener=open_regular) as file:
            key = file.read(spec.KEY_SIZE + 1)
            mode = os.fstat(file.fileno()).st_mode
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UsageError(f"the key file {path} cannot be read: {error.strerror}") from error
    if exposed := exposure(path, mode):
        warn(f"the key file {exposed}")
    if len(key) > spec.KEY_SIZE:
        warn(f"the key file {path} has more than 32 bytes: the rest is ignored")
    return key[: spec.KEY_SIZE]


def require_key(path: str | None, key_file: bytes | None) -> bytes:
    """Return the whole key of a key file that has to hold one."""
    if key_file is None:
        raise UsageError(
            f"--key-set needs the key in --key-path, but {path} does not exist: bring it back, or"
            f" make a new one with {_make_key(path)}"
        )
    if len(key_file) < spec.KEY_SIZE:
        raise UsageError(
            f"the key file {path} has {len(key_file)} bytes, a key has 32: make one with rm {path};"
            f" {_make_key(path)}"
        )
    return key_file


def _make_key(path: str | None) -> str:
    """Give the command that makes a key file which only its owner can read."""
    return f"(umask 077; head -c 32 /dev/urandom > {path})"


def exposure(path: str, mode: int) -> str:
    """Say who else can use a key file of that mode, and what to do; empty if nobody can."""
    if not stat.S_ISREG(mode) or not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return ""
    return (
        f"{path} can be used by others than its owner (mode {stat.S_IMODE(mode):04o}): make it"
        f" private with chmod 600 {path}"
    )


def write_key_file(path: str, key: bytes) -> None:
    """Put a key file in place: whole and durable, or OSError."""
    new = new_of(path)
    with suppress(FileNotFoundError):
        os.unlink(new)
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            write_all(fd, key)
            os.fsync(fd)
        finally:
            os.close(fd)
        os.rename(new, path)
    except OSError:
        with suppress(OSError):
            os.unlink(new)
        raise
    sync_folder(path)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file; a pipe or a device could block or answer for ever."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(None, "not a regular file", path)
    return fd


def fingerprint(key: bytes) -> bytes:
    """Tell keys apart without keeping one: HMAC-SHA256 of a label that no frame can equal."""
    return hmac.digest(key, _FINGERPRINT_LABEL, "sha256")
