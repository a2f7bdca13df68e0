# SPDX-License-Identifier: Apache-2.0
"""File operations of the local state: atomic creation, durable names, opening without blocking."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from vhost_rpmb.storage.paths import new_of

__all__ = [
    "cannot_lock",
    "new_file",
    "open_regular",
    "published_file",
    "sync_folder",
    "write_all",
]


@contextmanager
def new_file(path: str) -> Iterator[int]:
    """Create a file of mode 0600; a with-block writes its content through the descriptor.

    At the end of the block the content is synced (the name needs `sync_folder`); after an exception
    the file is removed. Raises FileExistsError, without a change, where the path exists.
    """
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        try:
            yield fd
            os.fsync(fd)
        finally:
            os.close(fd)
    except BaseException:
        with suppress(OSError):
            os.unlink(path)
        raise


@contextmanager
def published_file(path: str, publish: Callable[[str, str], None]) -> Iterator[int]:
    """Create a file of mode 0600 atomically: complete and durable under its name, or not at all.

    A with-block writes its content through the descriptor; meanwhile its name is `new_of` the
    path, from which a leftover of an earlier attempt is removed. ``publish``: os.link, which fails
    where the path exists, or os.rename, which replaces an existing file.
    """
    new = new_of(path)
    with suppress(FileNotFoundError):
        os.unlink(new)
    with new_file(new) as fd:
        yield fd
    try:
        publish(new, path)
    finally:
        with suppress(OSError):
            os.unlink(new)
    sync_folder(path)


def write_all(fd: int, data: bytes) -> None:
    """Write all of ``data`` at the position of a descriptor."""
    while data:
        data = data[os.write(fd, data) :]


def sync_folder(path: str) -> None:
    """Make the names in the folder of ``path`` durable."""
    fd = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def open_regular(path: str, flags: int) -> int:
    """Open a regular file; a FIFO could block, and a device could deliver data without end."""
    fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(None, "not a regular file", path)
    return fd


def cannot_lock(name: str, error: OSError) -> str:
    """Return the error text for a file whose file system has no locks."""
    return (
        f"{name} cannot be locked ({error.strerror}): keep it on a file system with locks, or start"
        " the lock manager (rpc.statd) if it is on NFS"
    )
