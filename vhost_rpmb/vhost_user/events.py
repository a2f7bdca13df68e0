# SPDX-License-Identifier: Apache-2.0
"""Signals on eventfds that the front-end has open too."""

from __future__ import annotations

import os
import select

from vhost_rpmb.errors import PeerError
from vhost_rpmb.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from vhost_rpmb.vhost_user.interfaces import Log

__all__ = ["BLOCKED", "signal"]

BLOCKED = "the front-end made a write to an eventfd wait"


def signal(fd: int, log: Log) -> None:
    """Signal an eventfd (-1: none) without waiting for anyone to read it.

    PeerError if the front-end blocked the write: it shares the file, and may clear O_NONBLOCK and
    fill the counter at any moment.
    """
    if fd < 0:
        return
    room = select.poll()
    room.register(fd, select.POLLOUT)
    if not any(events & select.POLLOUT for _, events in room.poll(0)):
        return  # full: an earlier signal is pending
    try:
        os.eventfd_write(fd, 1)  # unlike os.write(), returns when a signal interrupts it
    except BlockingIOError:
        pass  # full by now
    except InterruptedError:
        raise PeerError(BLOCKED) from None
    except OSError as error:
        log.report("signal", f"a front-end cannot be signalled: {error.strerror}")
