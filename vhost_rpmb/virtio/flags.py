# SPDX-License-Identifier: Apache-2.0
"""What serving a virtqueue returns, and what a device may return in place of an answer."""

from __future__ import annotations

from vhost_rpmb.typed import IntEnum

# Flags, or-ed together.
NOTIFY = 1  # signal the call eventfd
MORE = 2  # more is available: go on after serving other events
BROKEN = 4  # Virtqueue.error has the reason; signal the error eventfd
FAULTS = 8  # Virtqueue.take_faults() has something to report
UNSIGNALLED = 16  # the call descriptor could not be signalled
IDLE = 32  # no event for limits.SLEEP_MS
BLOCKED = 64  # the write to the call descriptor blocked until a signal interrupted it


class Unanswered(IntEnum):
    """A chain that Virtqueue.answer_chains() does not answer."""

    LATER = 1  # it stays available, and the batch ends
    NEVER = 2  # it is taken and never returned to the driver
