# SPDX-License-Identifier: Apache-2.0
"""The raw flash image on the disk: blocks of 256 bytes and nothing else."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.rpmb import spec

__all__ = [
    "ImageFile",
    "Stamp",
    "cannot_lock",
    "digest",
    "is_zeros",
    "ranges",
    "runs",
    "sync_folder",
    "write_all",
]

MAX_IMAGE_SIZE = 32 * 1024 * 1024  # bytes; what lies above 16 MiB has no address

_CHUNK_BLOCKS = 256  # read at a time
_ZEROS = bytes(_CHUNK_BLOCKS * spec.BLOCK_SIZE)
# No such attribute; none on this kind of file or file system; refused by a filter of system calls.
_NO_STAMP = (errno.ENODATA, errno.ENOTSUP, errno.ENOSYS, errno.EPERM)
_STAMP = "user.vhost-rpmb"  # an extended attribute: the content of the file has no room for it


class Stamp(NamedTuple):
    """Whose image a file is, and how often that device had been started when it was noted."""

    device: str
    starts: int


class ImageFile:
    """The image of a device, locked for this process while open.

    ``file_size``: of the file; ``size``: of what is served (bytes). Raises UsageError for a file
    that is no image, StateError where it is in use, OSError where the disk fails.
    """

    def __init__(self, path: str, warn: Callable[[str], None], *, writable: bool = True) -> None:
        self.path = path
        access = os.O_RDWR if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC)  # FIFOs do not block
        except FileNotFoundError:
            raise UsageError(
                f"the image {path} does not exist: make one with truncate -s 128K {path}"
            ) from None
        except OSError as error:
            raise UsageError(f"the image {path} cannot be opened: {error.strerror}") from error
        try:
            self._check(warn)
        except BaseException:
            os.close(self._fd)
            raise

    def _check(self, warn: Callable[[str], None]) -> None:
        path = self.path
        status = os.fstat(self._fd)
        if not stat.S_ISREG(status.st_mode) and not stat.S_ISBLK(status.st_mode):
            raise UsageError(f"the image {path} is neither a regular file nor a block device")
        self.file_size = os.lseek(self._fd, 0, os.SEEK_END)
        if not 0 < self.file_size <= MAX_IMAGE_SIZE or self.file_size % spec.CAPACITY_UNIT:
            raise UsageError(
                f"the image {path} has {self.file_size} bytes, not a multiple of 128 KiB from"
                f" 128 KiB to 32 MiB: make one with truncate -s 128K {path}.new"
            )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"the image {path} is in use by another process: end that one first"
            ) from None
        except OSError as error:
            raise StateError(cannot_lock(f"the image {path}", error)) from error
        self.size = min(self.file_size, spec.MAX_CAPACITY)
        if self.size < self.file_size:
            warn(
                f"the image {path} has {self.file_size} bytes, but an RPMB address reaches"
                f" {self.size}: only the first 16 MiB are served"
            )

    def chunks(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Read the image: (address, blocks, data), data None where it cannot be read."""
        for first in range(0, self.size // spec.BLOCK_SIZE, _CHUNK_BLOCKS):
            try:
                yield first, _CHUNK_BLOCKS, self._read(first, _CHUNK_BLOCKS)
            except OSError:
                for address in range(first, first + _CHUNK_BLOCKS):
                    try:
                        yield address, 1, self._read(address, 1)
                    except OSError:
                        yield address, 1, None

    def _read(self, first: int, count: int) -> bytes:
        data = os.pread(self._fd, count * spec.BLOCK_SIZE, first * spec.BLOCK_SIZE)
        if len(data) != count * spec.BLOCK_SIZE:
            raise OSError(None, "short read", self.path)
        return data

    def blocks(self) -> Iterator[tuple[int, bytes]]:
        """Give the blocks (address, data) of an image that is adopted; of long zeros, none.

        Raises StateError where one cannot be read.
        """
        for first, count, data in self.chunks():
            if data is None:
                raise StateError(
                    f"block {first} of the image {self.path} cannot be read: a new device needs an"
                    " image that can"
                )
            if not is_zeros(data):
                for number in range(count):
                    start = number * spec.BLOCK_SIZE
                    yield first + number, data[start : start + spec.BLOCK_SIZE]

    def write(self, start: int, data: memoryview) -> None:
        """Write at an offset (bytes); durable after `sync`."""
        while data:
            written = os.pwrite(self._fd, data, start)
            start += written
            data = data[written:]

    def sync(self) -> None:
        """Make what was written durable; after an OSError all of it has to be written again."""
        os.fdatasync(self._fd)

    def is_blank(self) -> bool:
        """Whether the whole file, also what has no address, is zeros.

        Raises StateError where it cannot be read.
        """
        size = len(_ZEROS)
        try:
            chunks = (os.pread(self._fd, size, start) for start in range(0, self.file_size, size))
            return all(is_zeros(chunk) for chunk in chunks)
        except OSError as error:
            raise StateError(
                f"the image {self.path} cannot be read ({error.strerror}): a new device needs an"
                " image that can"
            ) from error

    def stamp(self) -> Stamp | None:
        """Read the stamp; None where there is none, or no file system that keeps one.

        A stamp of unknown content counts as one of an unknown device. Raises OSError where the
        stamp cannot be read.
        """
        try:
            words = os.getxattr(self._fd, _STAMP).decode("ascii", "replace").split()
        except OSError as error:
            if error.errno in _NO_STAMP:
                return None
            raise
        if len(words) == 2 and words[0].isalnum() and words[1].isdecimal():
            return Stamp(words[0], int(words[1]))
        return Stamp("unknown", 0)

    def set_stamp(self, stamp: Stamp) -> bool:
        """Stamp the file durably; return whether that worked."""
        try:
            os.setxattr(self._fd, _STAMP, f"{stamp.device} {stamp.starts}".encode())
            os.fsync(self._fd)
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Release the file and its lock."""
        os.close(self._fd)


def cannot_lock(name: str, error: OSError) -> str:
    """Say for the operator that a file's file system has no locks, which keep two daemons apart."""
    return (
        f"{name} cannot be locked ({error.strerror}): keep it on a file system with locks, or start"
        " the lock manager (rpc.statd) if it is on NFS"
    )


def digest(block: bytes) -> bytes:
    """SHA-256 of a block; empty for all zeros, which a sparse image is mostly made of."""
    return b"" if is_zeros(block) else hashlib.sha256(block).digest()


def is_zeros(data: bytes) -> bool:
    """Whether at most a chunk of data is all zeros."""
    return data == _ZEROS[: len(data)]


def write_all(fd: int, data: bytes) -> None:
    """Write all of it to where a new file stands."""
    while data:
        data = data[os.write(fd, data) :]


def sync_folder(path: str) -> None:
    """Make the names in the folder of ``path`` durable."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def runs(addresses: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Join ascending addresses into (first, count) runs."""
    first = count = 0
    for address in addresses:
        if count and address == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = address, 1
    if count:
        yield first, count


def ranges(addresses: Iterable[int], most: int | None = 10) -> str:
    """Write ascending addresses for people: "0, 4-7, 9"; at most ``most`` ranges."""
    texts = [
        str(first) if count == 1 else f"{first}-{first + count - 1}"
        for first, count in runs(addresses)
    ]
    if most is None or len(texts) <= most:
        return ", ".join(texts)
    return ", ".join(texts[:most]) + f" and {len(texts) - most} more"
