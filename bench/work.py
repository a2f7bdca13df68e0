# SPDX-License-Identifier: Apache-2.0
"""One process that is guest and device: what a batch costs without any wake-up.

``python -m bench.work ENGINE FOLDER BATCHES [kept] [logged] [packed]`` has a device in FOLDER
answer so many batches of 64 reads; run under a tool that counts, twice with different numbers.
``kept``: with what lets requests outlive the process, the in-flight region and the journal of the
result register. ``logged``: with a dirty log, in which answers and ring are marked. ``packed``: in
a packed ring.
"""

from __future__ import annotations

import os
import struct
import sys
from contextlib import ExitStack
from itertools import islice
from pathlib import Path

from bench.daemon import KEY, reads
from vhost_rpmb import engine, memfd
from vhost_rpmb.driver.memory import DEFAULT_REGIONS, GuestMemory
from vhost_rpmb.driver.packed import make_ring
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import inflight, inflight_packed
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import MORE

DEPTH = 64  # requests in a batch


class Work:
    """A ring with 64 reads of ``blocks`` blocks, offered to a device again and again."""

    def __init__(
        self,
        name: str,
        folder: Path,
        blocks: int = 1,
        *,
        kept: bool = False,
        logged: bool = False,
        packed: bool = False,
    ) -> None:
        chosen = engine.load(name)
        flash = folder / "work"
        flash.touch()
        os.truncate(flash, spec.CAPACITY_UNIT)
        with ExitStack() as stack:
            store = open_store(Paths.resolve(str(flash)))
            stack.callback(store.close)
            if store.key is None:
                store.commit(0, [], KEY)
            memory = chosen.GuestMemory()
            guest = stack.enter_context(GuestMemory(DEFAULT_REGIONS))
            self._guest = guest
            features = packed << virtio.VIRTIO_F_RING_PACKED
            self._ring = stack.enter_context(make_ring(guest, 2 * DEPTH, features=features))
            stack.callback(memory.clear)
            for region in guest.regions:
                memory.add_region(*region.place, region.fd)
            buffers = []
            for request in islice(reads(blocks), DEPTH):
                data = guest.allocate(spec.FRAME_SIZE)
                room = guest.allocate(blocks * spec.FRAME_SIZE)
                guest.write(data, request)
                buffers.append((data, room))
            length = blocks * spec.FRAME_SIZE
            self._laps = _laps(buffers, length) if packed else None
            if not packed:
                _fill(self._ring, buffers, length)
            self._device = chosen.RpmbDevice(store)
            self._device.journal = memoryview(bytearray(64))  # as with a service manager
            self._queue = chosen.Virtqueue(memory)
            self._queue.set_size(2 * DEPTH)
            self._queue.set_features(features)
            self._queue.set_addresses(
                guest.user_address(self._ring.descriptor_table),
                guest.user_address(self._ring.available_ring),
                guest.user_address(self._ring.used_ring),
            )
            self._queue.set_base(self._ring.base)
            if kept:
                self._device.journal = memoryview(bytearray(64))
                recorded = chosen.GuestMemory(1)
                stack.callback(recorded.clear)
                description, fd = inflight.create(1, 2 * DEPTH)
                record = inflight.Region(recorded, description, fd).record(0)
                os.close(fd)
                assert record is not None
                if packed:
                    inflight_packed.resume(self._queue, record, 2 * DEPTH)
                else:
                    self._queue.resume(0, recorded, 0, 0, ())
            if logged:
                size = guest.regions[-1].end // (8 * virtio.VHOST_LOG_PAGE)
                bits = chosen.GuestMemory(1)
                stack.callback(bits.clear)
                fd = memfd.create("dirty-log", size)
                bits.add_region(0, size, 0, 0, fd)
                os.close(fd)
                memory.set_log(bits, True)
                self._queue.mark_ring(self._ring.used_ring)
            self._more = MORE
            self._batches = 0
            self._resources = stack.pop_all()

    def batch(self) -> None:
        """Offer all requests once, and have them answered."""
        self._batches += 1
        if self._laps is None:
            self._ring.set_available_index(self._batches * DEPTH & 0xFFFF)
        else:  # all slots, which is a lap
            self._guest.write(self._ring.descriptor_table, self._laps[self._batches & 1])
        while self._device.process(self._queue) & self._more:
            pass

    def close(self) -> None:
        """Free everything; SystemExit where requests were left unanswered."""
        if self._laps is None:
            answered = self._ring.used_index == self._batches * DEPTH & 0xFFFF
        else:
            first = self._guest.load16(self._ring.descriptor_table + 14)
            answered = bool(first & virtio.VIRTQ_DESC_F_USED) == bool(self._batches & 1)
        self._resources.close()
        if not answered:
            raise SystemExit("bench: not every request was answered")


def _fill(ring: Ring, buffers: list[tuple[int, int]], length: int) -> None:
    """Lay the chains out in a split ring, whose available ring has each twice."""
    for number, (data, room) in enumerate(buffers):
        head = 2 * number
        ring.write_descriptor(head, data, spec.FRAME_SIZE, virtio.VIRTQ_DESC_F_NEXT, head + 1)
        ring.write_descriptor(head + 1, room, length, virtio.VIRTQ_DESC_F_WRITE)
    for position in range(2 * len(buffers)):
        ring.write_available(position, 2 * (position % len(buffers)))


def _laps(buffers: list[tuple[int, int]], length: int) -> list[bytes]:
    """All slots of a packed ring, available in the laps of wrap counter 0 and 1."""
    laps = []
    for lap in (virtio.VIRTQ_DESC_F_USED, virtio.VIRTQ_DESC_F_AVAIL):
        chains = [
            struct.pack("<QIHH", data, spec.FRAME_SIZE, number, virtio.VIRTQ_DESC_F_NEXT | lap)
            + struct.pack("<QIHH", room, length, number, virtio.VIRTQ_DESC_F_WRITE | lap)
            for number, (data, room) in enumerate(buffers)
        ]
        laps.append(b"".join(chains))
    return laps


def main(name: str, folder: Path, batches: int, *mode: str) -> None:
    work = Work(name, folder, kept="kept" in mode, logged="logged" in mode, packed="packed" in mode)
    for _ in range(batches):
        work.batch()
    work.close()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
