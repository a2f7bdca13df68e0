# SPDX-License-Identifier: Apache-2.0
"""A client with an in-flight region of its own, which it never needs itself."""

from __future__ import annotations

import os
import sys

from tests.support.daemon import until
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES
from vhost_rpmb.driver.packed import PackedRing
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.vhost_user import inflight
from vhost_rpmb.vhost_user.wire import InflightDescription, ProtocolFeature, Request

PROTOCOL = PROTOCOL_FEATURES | ProtocolFeature.INFLIGHT_SHMFD


class InflightRegion:
    """The region of a client that negotiated `PROTOCOL`; not sealed, unlike one of the daemon."""

    def __init__(self, client: RpmbClient) -> None:
        size = client.ring.size
        self.size = inflight.stride(size)
        self.fd = os.memfd_create("in-flight")
        os.ftruncate(self.fd, self.size)
        self._description = InflightDescription(self.size, 0, 1, size).pack()
        self._client = client
        self._packed = isinstance(client.ring, PackedRing)
        self.use()

    def use(self) -> None:
        """Let the daemon use it, or use it again."""
        frontend = self._client.frontend
        frontend.stop_ring()
        frontend.tell(Request.SET_INFLIGHT_FD, self._description, [self.fd])
        frontend.start_ring(self._client.ring)

    def close(self) -> None:
        os.close(self.fd)

    def clear(self) -> None:
        """Make it a fresh one; while the vring is stopped."""
        os.pwrite(self.fd, bytes(self.size), 0)

    def becomes_complete(self) -> None:
        """Wait until nothing is in flight in the record, and it has the used index of the ring."""
        ring = self._client.ring
        until(lambda: (self._in_flight, self._used_index) == (0, ring.base))

    @property
    def _used_index(self) -> int:
        if not self._packed:
            return int.from_bytes(os.pread(self.fd, 2, 14), sys.byteorder)
        index = int.from_bytes(os.pread(self.fd, 2, 16), sys.byteorder)
        (wrap,) = os.pread(self.fd, 1, 20)
        return (index | wrap << 15) * 0x1_0001  # as a vring base

    @property
    def _in_flight(self) -> int:
        """The number of chains that are marked as taken and not answered."""
        entry = 32 if self._packed else 16
        entries = os.pread(self.fd, entry * self._client.ring.size, entry)
        return sum(entries[::entry])
