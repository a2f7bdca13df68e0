# SPDX-License-Identifier: Apache-2.0
"""The data path compiled: the twin of vhost_rpmb._pure, same names, same behaviour."""

from vhost_rpmb._fast.device import RpmbDevice
from vhost_rpmb._fast.loop import Loop
from vhost_rpmb._fast.mac import Authenticator
from vhost_rpmb._fast.memory import GuestMemory, GuestMemoryError
from vhost_rpmb._fast.virtqueue import Virtqueue

__all__ = [
    "Authenticator",
    "GuestMemory",
    "GuestMemoryError",
    "Loop",
    "RpmbDevice",
    "Virtqueue",
]
