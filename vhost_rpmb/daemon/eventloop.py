# SPDX-License-Identifier: Apache-2.0
"""The event loop of the daemon, and the signals that end it."""

from __future__ import annotations

import os
import select
from collections.abc import Callable
from types import FrameType

from vhost_rpmb.system import signal

__all__ = ["EventLoop", "StopSignals"]


class EventLoop:
    """Calls a handler for each descriptor that is readable (epoll).

    With `patience`, SIGALRM interrupts the process every `patience` seconds while it does not
    sleep: a front-end may share an eventfd without O_NONBLOCK and fill its counter, and a write to
    it would block without end. There is no timer while the loop sleeps.
    """

    def __init__(self, patience: float = 0) -> None:
        self._patience = patience
        self._timer_armed = False
        if patience:
            signal.signal(signal.SIGALRM, lambda _number, _frame: None)
        self.epoll = select.epoll()
        self.stopping = False  # a stop is requested: handlers return soon
        self._handlers: dict[int, Callable[[], None]] = {}

    def add(self, fd: int, handler: Callable[[], None], *, edge: bool = False) -> None:
        """Call `handler` when `fd` is readable; OSError if epoll does not support it.

        With `edge`, once for each arrival, not for as long as data is left.
        """
        self.epoll.register(fd, select.EPOLLIN | (select.EPOLLET if edge else 0))
        self._handlers[fd] = handler

    def listen(self, fd: int, enabled: bool) -> None:
        """Call the handler of `fd` when it is readable or, not `enabled`, at its hang-up only."""
        self.epoll.modify(fd, select.EPOLLIN if enabled else select.EPOLLRDHUP)

    def remove(self, fd: int) -> None:
        """Stop watching `fd`; before it is closed."""
        self.epoll.unregister(fd)
        del self._handlers[fd]

    def wait(self, timeout: float | None) -> bool:
        """Wait up to `timeout` seconds (None: no limit) and call handlers; False on timeout."""
        if timeout != 0:
            self._arm_timer(False)
        events = self.epoll.poll(timeout)
        self._arm_timer(True)
        for fd, _ in events:
            handler = self._handlers.get(fd)  # an earlier handler may have removed it
            if handler is not None:
                handler()
        return bool(events)

    def _arm_timer(self, armed: bool) -> None:
        if self._patience and armed != self._timer_armed:
            seconds = self._patience if armed else 0
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)
            self._timer_armed = armed

    def close(self) -> None:
        """Stop the timer and close the epoll descriptor."""
        self._arm_timer(False)
        self.epoll.close()


class StopSignals:
    """SIGTERM and SIGINT: each sets `requested` and ends the wait of the loop."""

    def __init__(self, loop: EventLoop) -> None:
        self.requested = False
        self._loop = loop
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._request)
        loop.add(self._reader, self._drain)

    def close(self) -> None:
        """Close the descriptors. Later signals are ignored: the process ends, and well."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        signal.set_wakeup_fd(-1)
        os.close(self._reader)
        os.close(self._writer)

    def _request(self, _number: int, _frame: FrameType | None) -> None:
        self.requested = self._loop.stopping = True

    def _drain(self) -> None:
        os.read(self._reader, 512)
