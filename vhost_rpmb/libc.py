# SPDX-License-Identifier: Apache-2.0
"""Functions of the C library that Python's ``os`` module lacks.

They are called by the `Library` of the engine: ctypes, or compiled code, which does without its
import.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import time
from contextlib import suppress

from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import mmap

    from vhost_rpmb.library import Library

__all__ = [
    "MessageHeader",
    "as_int",
    "atomic_set_bit",
    "call",
    "file_system",
    "interval_timer",
    "library",
    "prctl",
    "receive_message",
    "same_file",
    "send_message",
    "trim",
    "use",
]

_c_library: Library | None = None


def use(kind: type[Library]) -> None:
    """Call functions through the class of an engine from now on."""
    global _c_library  # noqa: PLW0603
    _c_library = kind()


def library(name: str) -> Library:
    """Return a shared library; OSError where it is missing."""
    return type(_functions())(name)


def _functions() -> Library:
    """The C library."""
    if _c_library is None:
        from vhost_rpmb.library import Library  # imported lazily: an engine may have another one

        use(Library)
    assert _c_library is not None
    return _c_library


def as_int(result: int) -> int:
    """Return the result of a function whose type is int."""
    return (result + (1 << 31) & 0xFFFF_FFFF) - (1 << 31)


def call(function: str, *arguments: int | bytes | bytearray | memoryview | None) -> int:
    """Call a function of the C library that returns an int; OSError from errno if negative."""
    result, error = _functions().call(function, *arguments)
    if as_int(result) < 0:
        raise OSError(error, os.strerror(error))
    return as_int(result)


def prctl(option: int, value: int) -> None:
    """Set an attribute of the process by the system call of this name."""
    call("prctl", option, value, 0, 0, 0)


def trim() -> None:
    """Give freed memory back to the system, where the C library can."""
    with suppress(OSError):
        _functions().call("malloc_trim", 0)


def file_system(fd: int) -> int:
    """Return the type of a file's file system, as <linux/magic.h> names it; may block."""
    buffer = bytearray(256)  # struct statfs, which begins with the type
    call("fstatfs", fd, buffer)
    return int(struct.unpack_from("l", buffer)[0]) & 0xFFFF_FFFF


def interval_timer(seconds: float) -> int:
    """Return a timer descriptor, readable after each interval, also one of the host's sleep.

    os.timerfd_create() comes with Python 3.13.
    """
    fd = call("timerfd_create", time.CLOCK_BOOTTIME, os.O_NONBLOCK | os.O_CLOEXEC)
    whole = int(seconds)
    part = int((seconds - whole) * 1_000_000_000)
    # struct itimerspec: the interval, and the time until the first end
    call("timerfd_settime", fd, 0, struct.pack("4l", whole, part, whole, part), None)
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
_F_DUPFD_QUERY = 1027  # since Linux 6.10


_BUFFER = struct.Struct("PN")  # struct iovec
# struct msghdr: address and its size, buffers and their number, control data and their size, flags
# and padding; struct mmsghdr has the length behind it.
_HEADER = struct.Struct("PIPNPNii")
_MMSGHDR = struct.Struct("PIPNPNiiI0P")


class MessageHeader:
    """A struct mmsghdr in memory: the kernel writes the results of a call there before it returns.

    ``length`` is the number of bytes received or sent, ``control_length`` that of the ancillary
    data received.
    """

    def __init__(self, memory: mmap.mmap, offset: int) -> None:
        self.memory = memoryview(memory)[offset : offset + _MMSGHDR.size]

    @property
    def length(self) -> int:
        """Bytes of the message."""
        return int(_MMSGHDR.unpack(self.memory)[8])

    @property
    def control_length(self) -> int:
        """Bytes of ancillary data."""
        return int(_MMSGHDR.unpack(self.memory)[5])

    @property
    def flags(self) -> int:
        """Flags of a received message."""
        return int(_MMSGHDR.unpack(self.memory)[6])


def receive_message(
    fd: int, header: MessageHeader, data: bytearray, control: memoryview | bytearray
) -> None:
    """Receive from a socket into two buffers, without waiting; the header has the results."""
    _transfer("recvmmsg", fd, header, data, control, socket.MSG_CMSG_CLOEXEC)


def send_message(
    fd: int, header: MessageHeader, data: bytearray, control: memoryview | bytearray
) -> None:
    """Send one message over a socket, without waiting; the header has the number of bytes."""
    _transfer("sendmmsg", fd, header, data, control, socket.MSG_NOSIGNAL)


def _transfer(
    name: str,
    fd: int,
    header: MessageHeader,
    data: bytearray,
    control: memoryview | bytearray,
    flags: int,
) -> None:
    address = _functions().address
    buffer = bytearray(_BUFFER.pack(address(data), len(data)))
    ancillary = address(control) if control else 0
    message = (0, 0, address(buffer), 1, ancillary, len(control), 0, 0)
    _HEADER.pack_into(header.memory, 0, *message)
    # The last argument is the timeout of recvmmsg; sendmmsg has none.
    _call(name, fd, header.memory, 1, flags | socket.MSG_DONTWAIT, None)


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
    _call("futex", word, _FUTEX_WAKE_OP_PRIVATE, 0, None, word, operation)


def same_file(one: int, other: int) -> bool:
    """Whether two descriptors refer to the same open file; OSError if the kernel cannot tell."""
    try:
        return bool(fcntl.fcntl(one, _F_DUPFD_QUERY, other))
    except OSError:
        pid = os.getpid()
        return not _call("kcmp", pid, pid, _KCMP_FILE, one, other)


def _call(name: str, *arguments: int | memoryview | None) -> int:
    if _CALLS is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    return call("syscall", getattr(_CALLS, name), *arguments)
