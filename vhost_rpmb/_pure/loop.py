# SPDX-License-Identifier: Apache-2.0
"""Serving one virtqueue until something else needs attention."""

from __future__ import annotations

import os
import select
from typing import Protocol

from vhost_rpmb._pure.virtqueue import Virtqueue
from vhost_rpmb.virtio.flags import BLOCKED, BROKEN, FAULTS, IDLE, MORE, NOTIFY, UNSIGNALLED
from vhost_rpmb.virtio.limits import SLEEP_MS

__all__ = ["Loop"]


class _Device(Protocol):
    def process(self, queue: Virtqueue) -> int: ...


class Loop:
    """Serves the virtqueues of ``device``.

    ``epoll`` is where all descriptors that may need attention are registered: kick descriptors
    edge-triggered, others level-triggered. When one of the others is ready, serve() returns. Epoll
    reports an edge once: kicks of other virtqueues that serve() saw are in take_events().

    The compiled engine polls a ring for up to ``poll_us`` microseconds before it sleeps. A guest
    cannot observe that, so this engine always sleeps.
    """

    def __init__(self, device: _Device, epoll: select.epoll, poll_us: int) -> None:
        self._device = device
        self._epoll = epoll
        self._events: list[int] = []

    def take_events(self) -> list[int]:
        """Return the descriptors but ``kick_fd`` whose events the last serve() took from epoll."""
        events, self._events = self._events, []
        return events

    def serve(self, queue: Virtqueue, kick_fd: int, call_fd: int, once: bool = False) -> int:
        """Process batches and signal ``call_fd`` (-1: none) until something else is to be done.

        Return flags: MORE (call again after serving other events), BROKEN, FAULTS (as a batch
        returns them), UNSIGNALLED, BLOCKED, IDLE. With ``once``, returns after one batch: another
        virtqueue waits for its turn.
        """
        self._events = []
        while True:
            flags = self._device.process(queue)
            if flags & NOTIFY:
                flags |= _signal(call_fd)
            if once or flags & (BROKEN | FAULTS | UNSIGNALLED | BLOCKED):
                return self._leave(queue, flags & ~NOTIFY)
            if flags & MORE:
                if self._others_ready(kick_fd, 0):
                    return self._leave(queue, flags & MORE)
            elif not queue._arm():
                others = self._others_ready(kick_fd, SLEEP_MS / 1000)
                if others is not False:
                    return self._leave(queue, 0 if others else IDLE)

    def _leave(self, queue: Virtqueue, flags: int) -> int:
        """Ask the driver for a kick, because nobody looks at the ring now; complete the flags."""
        if not flags & BROKEN and queue._arm():
            flags |= MORE
        return flags

    def _others_ready(self, kick_fd: int, timeout: float) -> bool | None:
        """Wait for events: True if there are others than kicks, None if there are none at all."""
        events = self._epoll.poll(timeout)
        if not events:
            return None
        self._events = [fd for fd, _ in events if fd != kick_fd]
        return bool(self._events)


def _signal(fd: int) -> int:
    """Signal an eventfd; return 0, UNSIGNALLED or BLOCKED."""
    if fd < 0:
        return 0
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    for _, events in poll.poll(0):
        if not events & (select.POLLOUT | select.POLLNVAL):
            break
        try:
            os.eventfd_write(fd, 1)  # unlike os.write(), ends when a signal interrupts it
        except BlockingIOError:
            break
        except InterruptedError:
            return BLOCKED
        except OSError:
            return UNSIGNALLED
    return 0  # full: the signal is there, and the front-end has yet to take it
