# SPDX-License-Identifier: Apache-2.0
"""The state of the device on its way to or from the front-end: a descriptor, and a thread.

A pipe can block at the will of the front-end, even a read or a write that is not to wait: another
process may hold the lock of the pipe. A thread therefore moves the bytes, and the event loop only
looks at the result. The flags of the descriptor are shared with the front-end and stay as they are.
"""

from __future__ import annotations

import os
import select
import stat
from _thread import allocate_lock
from collections.abc import Callable
from contextlib import suppress

from vhost_rpmb.system import socket
from vhost_rpmb.typed import TYPE_CHECKING
from vhost_rpmb.vhost_user import foreign

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import DeviceState, Watcher

__all__ = ["LATER", "StateTransfer"]

LATER = b"later"  # in place of a reply: it is given when the transfer has ended
_PIECE = 65536  # bytes of a read, and of a write to a socket
_ATOMIC = select.PIPE_BUF  # bytes that a pipe takes without blocking when it is writable


class StateTransfer:
    """The transfer of a connection: none, running, or ended and not yet checked.

    ``own`` is the socket of the connection. ``wake`` is called in the event loop when one ended.
    """

    def __init__(
        self, state: DeviceState | None, own: int, watcher: Watcher, wake: Callable[[], None]
    ) -> None:
        self._state = state
        self._own = own
        self._watcher = watcher
        self._wake = wake
        self._job: _Job | None = None
        self._saving = False
        self._fault = ""

    def accept(self, fd: int, *, saving: bool) -> None:
        """Prepare to transfer over a descriptor, of which it becomes the owner; ValueError.

        An earlier transfer is given up.
        """
        if self._state is None:
            raise ValueError("there is no device state")
        foreign.check_stream(fd, writing=saving, own=self._own)
        self.close()
        self._saving, self._fault = saving, ""
        self._job = _Job(fd, limit=self._state.limit)

    def begin(self) -> None:
        """Begin the transfer that was accepted; after the reply."""
        job = self._job
        if job is None or job.started or self._state is None:
            return
        data: bytes | None = None
        if self._saving:
            try:
                data = self._state.save()
            except (ValueError, OSError) as error:
                self._fault = _reason(error)
                job.close()
                return
        self._watcher.add(job.done, self._wake, edge=True)
        job.start(data)

    @property
    def running(self) -> bool:
        """Whether bytes are still moved."""
        return self._job is not None and not self._job.ended

    def check(self) -> bytes | None:
        """Judge the transfer: None after success, LATER while it runs. ValueError or OSError."""
        if self._job is None or self._state is None:
            raise ValueError("expected SET_DEVICE_STATE_FD before it")
        if self.running:
            return LATER
        job, fault = self._drop()
        if fault:
            raise ValueError(fault)
        if not self._saving:
            self._state.load(bytes(job.data))
        return None

    def cancel(self, reason: str) -> None:
        """Give up a transfer that has not ended; `check` reports the reason."""
        if self._job is not None and self._job.cancel():
            self._fault = self._fault or reason

    def close(self) -> None:
        """Give up what there is."""
        if self._job is not None:
            self._job.cancel()
            self._drop()

    def _drop(self) -> tuple[_Job, str]:
        """Forget the job; return it, and why it failed."""
        job = self._job
        assert job is not None
        self._job = None
        if job.started:
            self._watcher.remove(job.done)
            if self._saving and self._state is not None:
                self._state.sent(job.complete)
        job.close()
        return job, self._fault or job.fault


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


class _Job:
    """A thread that moves bytes until the end, a failure or a cancellation.

    ``done``: readable when it has ended. ``complete``: all bytes may have been sent.
    """

    def __init__(self, fd: int, *, limit: int) -> None:
        self._fd = fd
        self._limit = limit
        self._lock = allocate_lock()
        self._cancelled = False
        self._closed = False
        self.started = self.ended = False
        self.complete = False
        self.fault = ""
        self.data = bytearray()
        self.done = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._stop = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._is_socket = stat.S_ISSOCK(os.fstat(fd).st_mode)

    def start(self, data: bytes | None) -> None:
        """Begin to send data or, without any, to receive."""
        self.started = True
        foreign.in_background(lambda: self._run(data))

    def cancel(self) -> bool:
        """Let it end soon; return whether it had not ended."""
        with self._lock:
            if self.ended:
                return False
            self._cancelled = self.ended = True
            if self.started:
                os.eventfd_write(self._stop, 1)
                os.eventfd_write(self.done, 1)
            return True

    def close(self) -> None:
        """Close the descriptors of the event loop; those of a thread are closed by it."""
        if self._closed:
            return
        with self._lock:
            self._closed = self.ended = True
            os.close(self.done)
        if not self.started:
            foreign.close([self._fd])
            os.close(self._stop)

    def _run(self, data: bytes | None) -> None:
        try:
            if data is None:
                self._receive()
            else:
                self._send(memoryview(data))
        except (ValueError, OSError) as error:
            self.fault = _reason(error)
        # The end of the bytes, before the end of the transfer is reported.
        foreign.close_here(self._fd)
        with self._lock:
            os.close(self._stop)
            if not self.ended:
                self.ended = True
                os.eventfd_write(self.done, 1)

    def _wait(self, event: int) -> None:
        """Wait until the descriptor is ready; ValueError if it is cancelled."""
        poll = select.poll()
        poll.register(self._fd, event)
        poll.register(self._stop, select.POLLIN)
        poll.poll()
        self._refuse_cancelled()

    def _refuse_cancelled(self) -> None:
        if self._cancelled:
            raise ValueError("it was given up")

    def _send(self, rest: memoryview) -> None:
        while rest:
            self._wait(select.POLLOUT)
            piece = rest[: _PIECE if self._is_socket else _ATOMIC]
            with self._lock:
                self._refuse_cancelled()
                self.complete = len(piece) == len(rest)
            with suppress(BlockingIOError):
                rest = rest[self._write(piece) :]

    def _write(self, piece: memoryview) -> int:
        if not self._is_socket:
            return os.write(self._fd, piece)
        sock = socket.socket(fileno=self._fd)
        try:
            return sock.send(piece, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        finally:
            sock.detach()

    def _receive(self) -> None:
        while True:
            self._wait(select.POLLIN)
            with suppress(BlockingIOError):
                piece = self._read()
                if not piece:
                    return
                self.data += piece
            if len(self.data) > self._limit:
                raise ValueError(f"expected at most {self._limit} bytes, found more")

    def _read(self) -> bytes:
        if not self._is_socket:
            return os.read(self._fd, _PIECE)
        sock = socket.socket(fileno=self._fd)
        try:
            return sock.recv(_PIECE, socket.MSG_DONTWAIT)
        finally:
            sock.detach()
