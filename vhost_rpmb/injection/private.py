# SPDX-License-Identifier: Apache-2.0
"""A virtqueue of our own, in private memory, through which one request reaches the real device."""

from __future__ import annotations

from typing import Any

from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import limits, spec

__all__ = ["MAX_BYTES", "PrivateQueue"]

# Of a request and of its answer. A longer request is one for which the device answers a failure.
MAX_BYTES = max(limits.MAX_REQUEST_FRAMES + 1, limits.MAX_RESPONSE_FRAMES) * spec.FRAME_SIZE


class PrivateQueue(Closing):
    """Driver and device side of a ring of two descriptors, used for one chain at a time."""

    def __init__(self, engine: Engine) -> None:
        self._guest = GuestMemory()
        self._ring = Ring(self._guest, 2, features=0)
        self._request = self._guest.allocate(MAX_BYTES)
        self._answer = self._guest.allocate(MAX_BYTES)
        self._memory = engine.GuestMemory(len(self._guest.regions))
        for region in self._guest.regions:
            self._memory.add_region(*region.place, region.fd)
        self._queue = engine.Virtqueue(self._memory)
        self._queue.set_size(self._ring.size)
        self._queue.set_addresses(
            self._guest.user_address(self._ring.descriptor_table),
            self._guest.user_address(self._ring.available_ring),
            self._guest.user_address(self._ring.used_ring),
        )
        self._queue.set_base(0)

    def close(self) -> None:
        """Unmap the memory and close its file."""
        self._memory.clear()
        self._ring.close()
        self._guest.close()

    def run(self, device: Any, request: bytes, room: int) -> bytes:
        """Let a device of the engine serve one chain; return its answer, up to ``room`` bytes."""
        readable = [Segment(self._request, len(request))] if request else []
        writable = [Segment(self._answer, room)] if room else []
        if not (readable or writable):
            return b""
        self._guest.write(self._request, request)
        self._ring.add(readable, writable)
        self._ring.publish()
        device.process(self._queue)
        self._guest.write(self._request, bytes(len(request)))  # it may have a key
        (used,) = self._ring.collect()
        return self._guest.read(self._answer, used.length)
