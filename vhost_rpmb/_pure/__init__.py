# SPDX-License-Identifier: Apache-2.0
"""The data path in Python: the readable reference of the compiled engine."""

from vhost_rpmb._pure.device import RpmbDevice
from vhost_rpmb._pure.loop import IDLE, UNSIGNALLED, Loop
from vhost_rpmb._pure.mac import Authenticator
from vhost_rpmb._pure.memory import GuestMemory, GuestMemoryError
from vhost_rpmb._pure.virtqueue import BROKEN, FAULTS, MORE, NOTIFY, Virtqueue

__all__ = [
    "BROKEN",
    "FAULTS",
    "IDLE",
    "MORE",
    "NOTIFY",
    "UNSIGNALLED",
    "Authenticator",
    "GuestMemory",
    "GuestMemoryError",
    "Loop",
    "RpmbDevice",
    "Virtqueue",
]
