# SPDX-License-Identifier: Apache-2.0
"""Functions of the C library that Python's ``os`` module lacks, through ctypes."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import sys
import time

from vhost_rpmb.system import socket
from vhost_rpmb.typed import NamedTuple

__all__ = [
    "MessageHeader",
    "atomic_set_bit",
    "check",
    "file_system",
    "interval_timer",
    "library",
    "prctl",
    "receive_message",
    "same_file",
    "send_message",
]

library = ctypes.CDLL(None, use_errno=True)
library.prctl.argtypes = (ctypes.c_int, *(ctypes.c_ulong,) * 4)


def check(result: int) -> int:
    """Return the result of a call into the library; OSError from errno if it is negative."""
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def prctl(option: int, value: int) -> None:
    """Set an attribute of the process by the system call of this name."""
    check(library.prctl(option, value, 0, 0, 0))


def file_system(fd: int) -> int:
    """Return the type of a file's file system, as <linux/magic.h> names it; may block."""
    buffer = (ctypes.c_long * 32)()  # struct statfs, which begins with the type
    check(library.fstatfs(fd, ctypes.byref(buffer)))
    return buffer[0] & 0xFFFF_FFFF


class _IntervalTimer(ctypes.Structure):
    """struct itimerspec, of two struct timespec."""

    _fields_ = (("interval", ctypes.c_long * 2), ("first", ctypes.c_long * 2))


def interval_timer(seconds: float) -> int:
    """Return a timer descriptor, readable after each interval, also one of the host's sleep.

    os.timerfd_create() comes with Python 3.13.
    """
    clock = time.CLOCK_BOOTTIME
    fd = check(library.timerfd_create(clock, os.O_NONBLOCK | os.O_CLOEXEC))
    whole = int(seconds)
    time_ = (ctypes.c_long * 2)(whole, int((seconds - whole) * 1_000_000_000))
    check(library.timerfd_settime(fd, 0, ctypes.byref(_IntervalTimer(time_, time_)), None))
    return fd


# Calls of which a C library has no wrapper, or one that does more: musl's sendmmsg() is a loop of
# sendmsg(). Numbers by machine.
class _Calls(NamedTuple):
    futex: int
    kcmp: int
    recvmmsg: int
    sendmmsg: int


_CALLS_BY_MACHINE = {
    "x86_64": _Calls(futex=202, kcmp=312, recvmmsg=299, sendmmsg=307),
    "aarch64": _Calls(futex=98, kcmp=272, recvmmsg=243, sendmmsg=269),
}
_CALLS = _CALLS_BY_MACHINE.get(os.uname().machine)
_KCMP_FILE = 0
_FUTEX_WAKE_OP_PRIVATE = 5 | 128
_FUTEX_OP_SET_BIT = 2 | 8  # OR with 1, shifted by the operand
_Memory = bytearray | ctypes.Array[ctypes.c_char]
_F_DUPFD_QUERY = 1027  # since Linux 6.10


class _Buffer(ctypes.Structure):
    """struct iovec."""

    _fields_ = (("start", ctypes.c_void_p), ("length", ctypes.c_size_t))


class MessageHeader(ctypes.Structure):
    """struct mmsghdr: the kernel writes the results of a call into it before the call returns.

    ``length`` is the number of bytes received or sent, ``control_length`` that of the ancillary
    data received.
    """

    _fields_ = (
        ("name", ctypes.c_void_p),
        ("name_length", ctypes.c_uint),
        ("buffers", ctypes.c_void_p),
        ("buffer_count", ctypes.c_size_t),
        ("control", ctypes.c_void_p),
        ("control_length", ctypes.c_size_t),
        ("flags", ctypes.c_int),
        ("_padding", ctypes.c_int),
        ("length", ctypes.c_uint),
    )
    # An integer, as its type is declared above; for type checkers.
    length: int
    control_length: int
    flags: int


def receive_message(fd: int, header: MessageHeader, data: bytearray, control: _Memory) -> None:
    """Receive from a socket into two buffers, without waiting; the header has the results."""
    _transfer("recvmmsg", fd, header, data, control, socket.MSG_CMSG_CLOEXEC)


def send_message(fd: int, header: MessageHeader, data: bytearray, control: _Memory) -> None:
    """Send one message over a socket, without waiting; the header has the number of bytes."""
    _transfer("sendmmsg", fd, header, data, control, socket.MSG_NOSIGNAL)


def _transfer(
    call: str, fd: int, header: MessageHeader, data: bytearray, control: _Memory, flags: int
) -> None:
    buffer = _Buffer(_address(data), len(data))
    header.name = header.name_length = 0
    header.buffers, header.buffer_count = ctypes.addressof(buffer), 1
    header.control, header.control_length = _address(control), len(control)
    header.flags = 0
    # The last argument is the timeout of recvmmsg; sendmmsg has none.
    _call(
        call,
        ctypes.c_long(fd),
        ctypes.byref(header),
        ctypes.c_long(1),
        ctypes.c_long(flags | socket.MSG_DONTWAIT),
        ctypes.c_void_p(None),
    )


def _address(buffer: _Memory) -> int | None:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer)) if buffer else None


def atomic_set_bit(address: int, bit: int) -> None:
    """Set a bit of the byte at an address, with one atomic access to mapped memory.

    OSError where there is no memory any more. Everything written before is visible before it. The
    kernel does it, on the aligned 32-bit word around the byte, as a part of waking waiters, of
    whom there are none.
    """
    word, byte = address & ~3, address & 3
    if sys.byteorder == "big":
        byte = 3 - byte
    operation = _FUTEX_OP_SET_BIT << 28 | (8 * byte + bit) << 12
    _call(
        "futex",
        ctypes.c_void_p(word),
        ctypes.c_long(_FUTEX_WAKE_OP_PRIVATE),
        ctypes.c_long(0),
        ctypes.c_void_p(None),
        ctypes.c_void_p(word),
        ctypes.c_long(operation),
    )


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors refer to the same open file; OSError if the kernel cannot tell."""
    try:
        return bool(fcntl.fcntl(one, _F_DUPFD_QUERY, other))
    except OSError:
        pid = ctypes.c_long(os.getpid())
        kind = ctypes.c_long(_KCMP_FILE)
        return not _call("kcmp", pid, pid, kind, ctypes.c_long(one), ctypes.c_long(other))


def _call(name: str, *arguments: object) -> int:
    if _CALLS is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return check(library.syscall(ctypes.c_long(getattr(_CALLS, name)), *arguments))
