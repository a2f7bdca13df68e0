# SPDX-License-Identifier: Apache-2.0
"""The key file, and fingerprints: they tell keys apart without containing one."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

from vhost_rpmb import hashes
from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.files import open_regular, published_file, write_all

__all__ = ["exposure", "fingerprint", "read_key_file", "require_key", "write_key_file"]

_FINGERPRINT_LABEL = b"vhost-rpmb key fingerprint"


def read_key_file(path: str | None, warn: Callable[[str], None]) -> bytes | None:
    """Return the content of the key file, at most 32 bytes; None where there is no file."""
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
    """Return the key in a key file that must contain one."""
    if key_file is None:
        raise UsageError(
            f"--key-set needs the key in --key-path, but {path} does not exist: restore it, or"
            f" create a new one with {_make_key(path)}"
        )
    if len(key_file) < spec.KEY_SIZE:
        raise UsageError(
            f"the key file {path} has {len(key_file)} bytes, a key has 32: create one with"
            f" rm {path}; {_make_key(path)}"
        )
    return key_file


def _make_key(path: str | None) -> str:
    """Return the command that creates a key file which only its owner can read."""
    return f"(umask 077; head -c 32 /dev/urandom > {path})"


def exposure(path: str, mode: int) -> str:
    """Return the warning about a key file of a mode that gives others access; empty if none."""
    if not stat.S_ISREG(mode) or not mode & (stat.S_IRWXG | stat.S_IRWXO):
        return ""
    return (
        f"{path} can be used by others than its owner (mode {stat.S_IMODE(mode):04o}): make it"
        f" private with chmod 600 {path}"
    )


def write_key_file(path: str, key: bytes) -> None:
    """Create or replace a key file, atomically and durably; OSError if that fails."""
    with published_file(path, os.rename) as fd:
        write_all(fd, key)


def fingerprint(key: bytes) -> bytes:
    """Return HMAC-SHA256 of a label that no frame can equal."""
    return hashes.hmac_sha256(key, _FINGERPRINT_LABEL)
