# SPDX-License-Identifier: Apache-2.0
"""The compiled data path: the twin of vhost_rpmb._pure with the same names and behaviour.

Belongs here: one module for each of ``_pure``, C helpers in headers, and ``constants.pxd``, which
tools/constants.py generates. Docstrings are in ``_pure``.
"""

from vhost_rpmb._fast.device import RpmbDevice
from vhost_rpmb._fast.library import Library
from vhost_rpmb._fast.loop import Loop
from vhost_rpmb._fast.mac import Authenticator, Hashes
from vhost_rpmb._fast.memory import GuestMemory, GuestMemoryError
from vhost_rpmb._fast.virtqueue import Virtqueue

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
