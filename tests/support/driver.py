# SPDX-License-Identifier: Apache-2.0
"""Constants and guest memory of the tests of the driver."""

from __future__ import annotations

import os

from vhost_rpmb.rpmb.mac import Authenticator
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import spec as virtio

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
NONCE = bytes(range(16))
AUTHENTICATOR = Authenticator(KEY)
KIB = 1 << 10
MIB = 1 << 20
VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
INDIRECT = 1 << virtio.VIRTIO_F_INDIRECT_DESC
EVENT_IDX = 1 << virtio.VIRTIO_F_EVENT_IDX
# Two that adjoin in guest physical but not in user addresses, and one apart; with file offsets.
THREE_REGIONS = (
    MemoryRegion(0x0010_0000, MIB, 0x7F00_0000_0000, 0),
    MemoryRegion(0x0020_0000, MIB, 0x6F00_0000_0000, 64 * KIB),
    MemoryRegion(0x1_0000_0000, MIB, 0x6E00_0000_0000, 4 * KIB),
)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))
