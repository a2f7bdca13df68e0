# SPDX-License-Identifier: Apache-2.0
"""A ring of any format with an in-flight region, both in shared memory that can be put back."""

from __future__ import annotations

from tests.support.oracle import read_counter
from tests.support.rig import Rig
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.vhost_user import inflight
from vhost_rpmb.vhost_user.inflight import Record
from vhost_rpmb.vhost_user.wire import InflightDescription, MemoryRegion
from vhost_rpmb.virtio.flags import MORE


class TrackedRing:
    """A rig with a region of one queue; ``length``: of its record in bytes.

    ``ring_part``: guest address and bytes of what the device writes to the ring.
    """

    def __init__(self, rig: Rig, length: int, ring_part: tuple[int, int]) -> None:
        self.rig = rig
        self.length = length
        self._ring_part = ring_part
        size = rig.ring.size
        self.file = GuestMemory([MemoryRegion(0, 0x4000, 0, 0)])
        self.memory = rig.engine.GuestMemory(1)
        self.region = inflight.Region(
            self.memory,
            InflightDescription(inflight.stride(size), 0, 1, size),
            self.file.regions[0].fd,
        )
        self.heads: list[int] = []  # of all requests, in order

    def close(self) -> None:
        self.region.close()
        self.file.close()

    @property
    def record(self) -> Record:
        record = self.region.record(0)
        assert record is not None
        return record

    def look(self) -> bytes:
        """The record, and the part of the ring."""
        return self.file.read(0, self.length) + self.rig.guest.read(*self._ring_part)

    def put_back(self, state: bytes) -> None:
        self.file.write(0, state[: self.length])
        self.rig.guest.write(self._ring_part[0], state[self.length :])

    def submit(self, count: int) -> None:
        for _ in range(count):
            self.heads.append(self.rig.ring.add(self.rig.put(read_counter()), self.rig.room(512)))
        self.rig.ring.publish()

    def serve(self) -> int:
        """Serve until nothing is left; return the number of chains."""
        before = self.rig.device.served
        while self.rig.device.process(self.rig.queue) & MORE:
            pass
        return self.rig.device.served - before
