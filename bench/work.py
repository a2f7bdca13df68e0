# SPDX-License-Identifier: Apache-2.0
"""One process that is guest and device, for counting the instructions of a request.

``python -m bench.work ENGINE FOLDER BATCHES`` makes a device in FOLDER and has it answer so many
batches of 64 reads; run under a tool that counts, twice with different numbers.
"""

from __future__ import annotations

import os
import sys
from itertools import islice
from pathlib import Path

from bench.daemon import KEY, reads
from vhost_rpmb import engine, spec
from vhost_rpmb.client.memory import DEFAULT_REGIONS, GuestMemory
from vhost_rpmb.client.ring import Ring
from vhost_rpmb.store import open_store

DEPTH = 64  # requests in a batch


def main(name: str, folder: Path, batches: int) -> None:
    chosen = engine.load(name)
    flash = folder / "work"
    flash.touch()
    os.truncate(flash, spec.CAPACITY_UNIT)
    store = open_store(str(flash))
    if store.key is None:
        store.commit(0, [], KEY)
    device, memory = chosen.RpmbDevice(store), chosen.GuestMemory()
    queue = chosen.Virtqueue(memory)
    with GuestMemory(DEFAULT_REGIONS) as guest, Ring(guest, 2 * DEPTH) as ring:
        for region in guest.regions:
            place = region.place
            memory.add_region(
                place.guest_address, place.size, place.user_address, place.mmap_offset, region.fd
            )
        for number, request in enumerate(islice(reads(), DEPTH)):
            data, room = guest.allocate(spec.FRAME_SIZE), guest.allocate(spec.FRAME_SIZE)
            guest.write(data, request)
            ring.write_descriptor(
                2 * number, data, spec.FRAME_SIZE, spec.VIRTQ_DESC_F_NEXT, 2 * number + 1
            )
            ring.write_descriptor(2 * number + 1, room, spec.FRAME_SIZE, spec.VIRTQ_DESC_F_WRITE)
        for position in range(2 * DEPTH):
            ring.write_available(position, 2 * (position % DEPTH))
        queue.set_size(2 * DEPTH)
        queue.set_features(0)
        queue.set_addresses(
            guest.user_address(ring.descriptor_table),
            guest.user_address(ring.available_ring),
            guest.user_address(ring.used_ring),
        )
        queue.set_base(0)
        for batch in range(batches):
            ring.set_available_index((batch + 1) * DEPTH & 0xFFFF)
            device.process(queue)
        answered = ring.used_index == batches * DEPTH & 0xFFFF
        memory.clear()
    store.close()
    if not answered:
        raise SystemExit("bench: not every request was answered")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
