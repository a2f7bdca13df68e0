# SPDX-License-Identifier: Apache-2.0
"""The image file: blocks of 256 bytes, and a stamp in an extended attribute."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Callable, Iterable, Iterator

from vhost_rpmb import hashes
from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.files import cannot_lock
from vhost_rpmb.typed import NamedTuple

__all__ = ["ImageFile", "Stamp", "digest", "is_zeros", "ranges", "runs", "served_size"]

MAX_IMAGE_SIZE = 32 * 1024 * 1024  # bytes; above 16 MiB they have no address

_CHUNK_BLOCKS = 64  # blocks of one read
_ZEROS = bytes(_CHUNK_BLOCKS * spec.BLOCK_SIZE)
# No such attribute; none on this kind of file or file system; refused by a filter of system calls.
_NO_STAMP = (errno.ENODATA, errno.ENOTSUP, errno.ENOSYS, errno.EPERM)
_STAMP = "user.vhost-rpmb"  # extended attribute: the content of the file is the blocks only


class Stamp(NamedTuple):
    """The device that an image belongs to, and its number of starts when the stamp was set."""

    device: str
    starts: int


class ImageFile:
    """The image of a device, locked for this process while open.

    ``file_size``: bytes of the file; ``size``: bytes that are served. Raises UsageError for a file
    that is not an image, StateError if it is in use, OSError if the disk fails.
    """

    def __init__(self, path: str, warn: Callable[[str], None], *, writable: bool = True) -> None:
        self.path = path
        access = os.O_RDWR if writable else os.O_RDONLY
        try:
            self._fd = os.open(path, access | os.O_NONBLOCK | os.O_CLOEXEC)  # FIFOs do not block
        except FileNotFoundError:
            raise UsageError(
                f"the image {path} does not exist: create one with truncate -s 128K {path}"
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
        self.size = served_size(
            path, self.file_size, f"create one with truncate -s 128K {path}.new"
        )
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(
                f"the image {path} is in use by another process: end that process first"
            ) from None
        except OSError as error:
            raise StateError(cannot_lock(f"the image {path}", error)) from error
        if self.size < self.file_size:
            warn(
                f"the image {path} has {self.file_size} bytes, but an RPMB address reaches"
                f" {self.size}: only the first 16 MiB are served"
            )

    def chunks(self) -> Iterator[tuple[int, int, bytes | None]]:
        """Read the image: (address, number of blocks, data), data None where it cannot be read."""
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
        """Yield the blocks (address, data) for a new device, without long runs of zeros.

        Raises StateError if a block cannot be read.
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
        """Make all writes durable; after an OSError all of them have to be repeated."""
        os.fdatasync(self._fd)

    def is_blank(self) -> bool:
        """Whether the whole file, also the part without addresses, is zeros.

        Raises StateError if it cannot be read.
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
        """Read the stamp; None if there is none, or if the file system does not support it.

        A stamp of unknown content counts as one of an unknown device. Raises OSError if the stamp
        cannot be read.
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


def served_size(path: str, file_size: int, remedy: str) -> int:
    """Return how many bytes of an image are served; UsageError for a size that no image has."""
    if not 0 < file_size <= MAX_IMAGE_SIZE or file_size % spec.CAPACITY_UNIT:
        raise UsageError(
            f"the image {path} has {file_size} bytes, not a multiple of 128 KiB from 128 KiB to"
            f" 32 MiB: {remedy}"
        )
    return min(file_size, spec.MAX_CAPACITY)


def digest(block: bytes) -> bytes:
    """Return SHA-256 of a block; empty for all zeros, the most frequent block of a sparse image."""
    return b"" if is_zeros(block) else hashes.sha256(block)


def is_zeros(data: bytes) -> bool:
    """Whether data, at most a chunk, is all zeros."""
    return data == _ZEROS[: len(data)]


def runs(addresses: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Join ascending addresses into runs (first, count)."""
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


def ranges(addresses: Iterable[int], limit: int | None = 10) -> str:
    """Return the text of ascending addresses: "0, 4-7, 9"; at most ``limit`` ranges."""
    texts = [
        str(first) if count == 1 else f"{first}-{first + count - 1}"
        for first, count in runs(addresses)
    ]
    if limit is None or len(texts) <= limit:
        return ", ".join(texts)
    return ", ".join(texts[:limit]) + f" and {len(texts) - limit} more"
