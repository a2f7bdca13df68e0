# SPDX-License-Identifier: Apache-2.0
"""Proof for daemons of one host that an owner is dead, so that they need not wait for its lease.

An owner holds a lock on a file that is named after its token for as long as it may answer. The
kernel releases the lock when the process can execute nothing more. A process that is stopped holds
it. The file says on which boot of which host it was locked, and which file it is: a copy proves
nothing, and neither does a file on another host or on a file system whose locks can be lost.
docs/decisions/0033-presence.md has the reasons.
"""

from __future__ import annotations

import fcntl
import os
import re
from contextlib import suppress

from vhost_rpmb import libc
from vhost_rpmb.log import Logger

__all__ = ["Claim", "Presence"]

logger = Logger(__name__)

# <linux/magic.h>: file systems whose locks the kernel of this host keeps, and in which two files
# that exist at one time differ in device or inode number.
_LOCAL = frozenset({
    0xEF53,  # ext2, ext3, ext4
    0x58465342,  # XFS
    0x9123683E,  # Btrfs
    0xF2F52010,  # F2FS
    0x2FC12FC1,  # ZFS
    0x01021994,  # tmpfs
})  # fmt: skip
_TOKEN = re.compile(r"[0-9a-f]{32}")
_MAX_CONTENT = 256  # bytes


def _name_of_boot() -> str:
    """Return the random name of this boot of this kernel, empty if it cannot be read."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return ""


_BOOT = _name_of_boot()  # before a sandbox, which does not allow to read it


class Claim:
    """The lock of one owner."""

    def __init__(self, path: str, fd: int) -> None:
        self._path = path
        self._fd = fd  # -1: there is none, or it was released

    def release(self, *, keep: bool = False) -> None:
        """Release the lock: the owner answers nothing more; ``keep`` the proof. Idempotent."""
        if self._fd < 0:
            return
        if not keep:
            with suppress(OSError):
                os.unlink(self._path)
        os.close(self._fd)
        self._fd = -1


class Presence:
    """The owners of one device on this host, in the folder of the witness."""

    def __init__(self, folder: str, device: str) -> None:
        self._folder = os.path.realpath(folder)
        self._device = device

    def _path(self, token: str) -> str:
        return os.path.join(self._folder, f"{self._device}-{token}.owner")

    def claim(self, token: str) -> Claim:
        """Lock the file of an owner that is about to be; without it others wait for the lease."""
        path, fd = self._path(token), -1
        try:
            fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | os.O_CLOEXEC, 0o600)
            claim = Claim(path, fd)
            if not (content := _content(fd)):
                claim.release()
                return claim
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.write(fd, content)
        except OSError as error:
            logger.info("the owner's file %s could not be written: %s", path, error.strerror)
            Claim(path, fd).release()
            return Claim(path, -1)
        return claim

    def is_dead(self, token: str) -> bool:
        """Whether it is certain that the owner with the token answers nothing more."""
        if not _TOKEN.fullmatch(token):  # from a record that anyone with access may have written
            return False
        fd = _lock(self._path(token))
        if fd < 0:
            return False
        try:
            content = _content(fd)
            return bool(content) and os.read(fd, _MAX_CONTENT) == content
        except OSError:
            return False
        finally:
            os.close(fd)

    def clear(self) -> None:
        """Remove the files of dead owners, also of earlier boots."""
        pattern = re.compile(rf"{re.escape(self._device)}-({_TOKEN.pattern})\.owner")
        with suppress(OSError):
            for name in os.listdir(self._folder):
                if (match := pattern.fullmatch(name)) and (fd := _lock(self._path(match[1]))) >= 0:
                    Claim(self._path(match[1]), fd).release()


def _lock(path: str) -> int:
    """Open and lock a file; return the descriptor, -1 if that is not possible now."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return -1
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(fd)
        return -1
    return fd


def _content(fd: int) -> bytes:
    """Return what a file that can be a proof has to say, empty for one that cannot be."""
    if not _BOOT or libc.file_system(fd) not in _LOCAL:
        return b""
    status = os.fstat(fd)
    return f"{_BOOT} {status.st_dev} {status.st_ino}\n".encode()
