# SPDX-License-Identifier: Apache-2.0
"""Descriptors received from the peer of a connection: checking their kinds, closing them.

A kept descriptor must not keep another file open: a socket can have any descriptor in its queue,
the peer's end of the connection included, whose disconnect would then never be detected. Only
eventfds and memory are kept. A pipe is refused as well: a writer can hold its lock for any time,
and a non-blocking read or write waits for that lock.

fstat(), fstatfs() and close() may block on the file system, on FUSE without limit and at the will
of any user. close() also blocks for a TCP socket with SO_LINGER, and for one in the queue of a UNIX
socket. Kinds are therefore determined from data of the kernel; a thread queries and closes the
other files. Such a thread exists only while it has work.
"""

from __future__ import annotations

import _thread
import fcntl
import os
import stat
import struct
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial

from vhost_rpmb import libc
from vhost_rpmb.errors import PeerError
from vhost_rpmb.system import signal, socket

__all__ = [
    "check_event",
    "check_memory",
    "check_stream",
    "check_unix_stream",
    "close",
    "close_connection",
    "close_here",
    "in_background",
    "is_lasting",
    "left_open",
    "more_stay_open",
    "refuse_path",
]

_MAX_THREADS = 32  # that may block at the same time; further jobs are queued
_PATIENCE = 1.0  # seconds for an answer of another thread
# <linux/magic.h>: files of another program or another machine; overlayfs may lie on any of them.
_REMOTE = {
    0x65735546: "FUSE",
    0x6969: "NFS",
    0xFE534D42: "SMB",
    0xFF534D42: "SMB",
    0x01021997: "9P",
    0x00C36400: "Ceph",
    0x794C7630: "overlayfs",
}
_EVENTFD = "anon_inode:[eventfd]"
_NO_LINGER = struct.pack("=ii", 0, 0)


def check_event(fd: int) -> None:
    """ValueError unless it is an eventfd."""
    refuse_path(fd)
    if _name(fd) != _EVENTFD:
        raise ValueError("expected an eventfd, found another kind of file")


def check_unix_stream(fd: int) -> None:
    """ValueError unless it is a connected UNIX stream socket."""
    expected = "expected a connected UNIX stream socket"
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise ValueError(f"{expected}, found: {error.strerror}") from None
    try:
        if sock.family != socket.AF_UNIX or sock.type != socket.SOCK_STREAM:
            raise ValueError(f"{expected}, found another kind of socket")
        try:
            sock.getpeername()
        except OSError:
            raise ValueError(f"{expected}, found one that is not connected") from None
    finally:
        sock.detach()


def check_stream(fd: int, *, writing: bool, own: int) -> None:
    """ValueError unless it is a pipe or a connected UNIX stream socket, not the socket `own`."""
    refuse_path(fd)
    name = _name(fd)
    if name.startswith("socket:"):
        check_unix_stream(fd)
        if name == _name(own):
            raise ValueError("expected another socket than that of this connection")
        return
    if not name.startswith("pipe:"):
        raise ValueError("expected a pipe or a UNIX stream socket, found another kind of file")
    expected = os.O_WRONLY if writing else os.O_RDONLY
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE not in (expected, os.O_RDWR):
        raise ValueError(f"expected the {'writing' if writing else 'reading'} end of a pipe")


def check_memory(fd: int) -> None:
    """ValueError unless it is a file that can be guest memory.

    PeerError if accesses to its file system can block.
    """
    refuse_path(fd)
    if _is_shared_memory(fd):
        return
    expected = "expected a file or a DAX device as memory region"
    if not _name(fd).startswith("/"):
        raise ValueError(f"{expected}, found another kind of descriptor")
    file_system, status = _query(fd)
    if file_system in _REMOTE:
        raise PeerError(
            "expected a memory region on a local file system (memfd, tmpfs, hugetlbfs, ext4, xfs), "
            f"found {_REMOTE[file_system]}"
        )
    if status is None:
        raise PeerError("the file system of a memory region does not answer")
    if not stat.S_ISREG(status.st_mode) and not _is_dax(status):
        raise ValueError(f"{expected}, found another kind of file")


def is_lasting(fd: int) -> bool:
    """Whether it is an eventfd or shared memory: neither keeps another file open."""
    return _is_shared_memory(fd) or _name(fd) == _EVENTFD


def close(fds: Iterable[int]) -> None:
    """Close descriptors, in a thread if that may block."""
    for fd in fds:
        if is_lasting(fd):
            os.close(fd)
        else:
            _background.run(partial(close_here, fd))


def close_connection(sock: socket.socket) -> None:
    """End a connection, in a thread if its queue may hold descriptors."""
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # nothing arrives after that
    try:
        unread = bool(sock.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT))
    except OSError:
        unread = True
    if unread:
        _background.run(partial(close_here, sock.detach()))
    else:
        sock.close()


def in_background(job: Callable[[], None]) -> None:
    """Run a job that may block without limit in a thread."""
    _background.run(job)


def left_open() -> int:
    """The number of descriptors that are still open because all threads are busy."""
    return _background.queued()


def more_stay_open(than: int) -> bool:
    """Whether more than so many stay open for a second, so that no processor is what is missing."""
    end = time.monotonic() + _PATIENCE
    while left_open() > than:
        if time.monotonic() > end:
            return True
        time.sleep(0.001)
    return False


def refuse_path(fd: int) -> None:
    """ValueError if a descriptor was opened with O_PATH: it refers to a file without opening it."""
    if fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_PATH:
        raise ValueError("expected an open file, found a descriptor opened with O_PATH")


def _name(fd: int) -> str:
    """The kernel's name of a file: an absolute path, or another form; empty if unknown."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return ""


def _is_shared_memory(fd: int) -> bool:
    """Whether it is a memfd or a file on tmpfs or hugetlbfs: no other file has seals."""
    try:
        fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return False
    return True


def _is_dax(status: os.stat_result) -> bool:
    """Whether it is a DAX device: persistent memory that is mapped as a whole."""
    if not stat.S_ISCHR(status.st_mode):
        return False
    number = f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    try:
        subsystem = os.readlink(f"/sys/dev/char/{number}/subsystem")
    except OSError:
        return False
    return os.path.basename(subsystem) == "dax"


def _query(fd: int) -> tuple[int, os.stat_result | None]:
    """Type of the file system, and status of a file: None without an answer within _PATIENCE."""
    answer: list[tuple[int, os.stat_result | None]] = []
    answering = _thread.allocate_lock()
    answering.acquire()
    own = os.dup(fd)  # without an answer in time, the caller closes its own

    def job() -> None:
        with suppress(OSError):
            file_system = libc.file_system(own)
            answer.append((file_system, None if file_system in _REMOTE else os.fstat(own)))
        answering.release()
        close_here(own)

    _background.run(job)
    answering.acquire(timeout=_PATIENCE)
    return answer[0] if answer else (0, None)


def close_here(fd: int) -> None:
    """Close a descriptor in this thread; may block."""
    with suppress(OSError):
        sock = socket.socket(fileno=fd)
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        finally:
            sock.detach()
    with suppress(OSError):  # a failed write-back of the peer's data
        os.close(fd)


class _Background:
    """Runs jobs that may block without limit, in threads that end without jobs."""

    def __init__(self) -> None:
        self._lock = _thread.allocate_lock()
        self._jobs: deque[Callable[[], None]] = deque()
        self._threads = 0

    def run(self, job: Callable[[], None]) -> None:
        """Run `job` in a thread, or in this one if no thread can be started."""
        with self._lock:
            self._jobs.append(job)
            if self._threads >= _MAX_THREADS:
                return
            self._threads += 1
        # Signals are for the main thread, whose system calls they interrupt.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        try:
            _thread.start_new_thread(self._work, ())  # 0.1 MiB less than threading
        except RuntimeError:
            self._work()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def queued(self) -> int:
        """The number of jobs queued while the maximum of threads is busy."""
        with self._lock:
            return len(self._jobs) if self._threads >= _MAX_THREADS else 0

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._jobs:
                    self._threads -= 1
                    return
                job = self._jobs.popleft()
            job()


_background = _Background()
