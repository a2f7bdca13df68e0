# SPDX-License-Identifier: Apache-2.0
"""The data path in Python: the readable reference of the compiled engine.

Belongs here: code that runs for each request. Does not: code that runs once per start, connection
or commit, numbers, and the layout of frames.
"""

from vhost_rpmb._pure.device import RpmbDevice
from vhost_rpmb._pure.library import Library
from vhost_rpmb._pure.loop import Loop
from vhost_rpmb._pure.mac import Authenticator, Hashes
from vhost_rpmb._pure.memory import GuestMemory, GuestMemoryError
from vhost_rpmb._pure.virtqueue import Virtqueue

__all__ = [
    "Authenticator",
    "GuestMemory",
    "GuestMemoryError",
    "Hashes",
    "Library",
    "Loop",
    "RpmbDevice",
    "Virtqueue",
]
