# SPDX-License-Identifier: Apache-2.0
"""A guest that changes its requests and its rings while the device reads them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from tests.support.campaign import DIVISOR
from tests.support.oracle import read_counter, write_data
from tests.support.raw import (
    AVAILABLE,
    BUFFERS,
    GUEST,
    SIZE,
    RawGuest,
    available_ring,
    descriptor,
    hammer,
)
from tests.support.rig import Rig
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import FAULTS

ROUNDS = 3000 // DIVISOR
LEAST = ROUNDS // 300  # more requests than that have to be good, and broken
MOST = 240.0  # seconds
CHAINS = 8
REQUESTS = [BUFFERS + 2048 * number for number in range(CHAINS)]  # offset of each chain's request
TABLES = BUFFERS + 0x8000  # of the indirect descriptor tables
NEXT, WRITE, INDIRECT = (
    virtio.VIRTQ_DESC_F_NEXT,
    virtio.VIRTQ_DESC_F_WRITE,
    virtio.VIRTQ_DESC_F_INDIRECT,
)
# The file goes on behind the regions, and is mapped there by nobody: what stands there must neither
# be read nor be written.
BEYOND = 0x10000
SECRET = b"not yours"
REGIONS = [
    MemoryRegion(GUEST, BUFFERS, 0x7F00_0000_0000, 0),
    MemoryRegion(GUEST + BUFFERS, SIZE - BUFFERS, 0x7F00_0000_0000 + BUFFERS, BUFFERS),
]


@pytest.fixture
def guest(engine: Engine) -> Iterator[RawGuest]:
    guest = RawGuest(engine, REGIONS)
    yield guest
    guest.close()


def hexed(*texts: bytes) -> str:
    return ",".join(text.hex() for text in texts)


def bad_descriptors(index: int, good: bytes) -> list[bytes]:
    """What a descriptor turns into behind the device's back."""
    return [
        *[good] * 10,
        descriptor(GUEST + SIZE - 512, 4096, NEXT, index + 1),  # runs out of the regions
        descriptor(GUEST + SIZE, 512, NEXT, index + 1),
        descriptor(2**64 - 256, 512, WRITE),
        descriptor(GUEST + BUFFERS - 256, 0xFFFF_FFFF, NEXT, 0xFFFF),
        descriptor(0, 0, NEXT, 0),
        descriptor(GUEST + TABLES, 48, INDIRECT),
        descriptor(GUEST + TABLES, 0xFFFF_FFF0, INDIRECT),
    ]


def slot(address: int, length: int, flags: int, identity: int = 0) -> bytes:
    """A descriptor of a packed ring that is available in the first lap."""
    return descriptor(address, length, identity, flags | virtio.VIRTQ_DESC_F_AVAIL)


def bad_slots(good: bytes) -> list[bytes]:
    """What a slot turns into behind the device's back, its flags alone included."""
    flipped = [
        good[:14] + flags.to_bytes(2, "little")
        for flags in (0, NEXT, virtio.VIRTQ_DESC_F_AVAIL, virtio.VIRTQ_DESC_F_USED, 0xFFFF)
    ]
    return [
        *[good] * 10,
        *flipped,
        slot(GUEST + SIZE - 512, 4096, NEXT),
        slot(2**64 - 256, 512, WRITE, 0xFFFF),
        slot(GUEST + BUFFERS - 256, 0xFFFF_FFFF, NEXT),
        slot(0, 0, NEXT),
        slot(GUEST + TABLES, 48, INDIRECT),
        slot(GUEST + TABLES, 0xFFFF_FFF0, INDIRECT),
    ]


def image_and_hammer(frames: list[bytes], packed: bool) -> tuple[bytes, list[str]]:
    """Give the guest's file, and how another process rewrites it."""
    image = bytearray(SIZE + BEYOND)
    image[SIZE:] = (SECRET * BEYOND)[:BEYOND]
    places = []

    def put(offset: int, text: bytes, *others: bytes) -> None:
        image[offset : offset + len(text)] = text
        if others:
            places.append(f"{offset}:{hexed(text, *others)}")

    for number, place in enumerate(REQUESTS):
        # Whole requests, and each of their parts by itself.
        put(place, frames[0], *frames)
        for start, end in ((0, 228), (228, 484), (484, 500), (500, 504), (504, 510), (510, 512)):
            places.append(f"{place + start}:{hexed(*(frame[start:end] for frame in frames))}")
        answer = GUEST + place + 1024
        request = descriptor(GUEST + place, 512, NEXT, 1)
        room = descriptor(answer, 512, WRITE)
        table = TABLES + 64 * number
        put(table, request, *bad_descriptors(0, request))
        put(table + 16, room, *bad_descriptors(1, room))
        if packed:
            index = 2 * number
            chain = [slot(GUEST + place, 512, NEXT), slot(answer, 512, WRITE, number)]
            if number % 2:  # one slot: the other one is a chain of its own
                chain = [slot(GUEST + table, 32, INDIRECT, number), slot(answer, 512, WRITE)]
            for part, good in enumerate(chain):
                put(16 * (index + part), good, *bad_slots(good))
            continue
        index = 4 * number
        direct = descriptor(GUEST + place, 512, NEXT, index + 1)
        head = descriptor(GUEST + table, 32, INDIRECT) if number % 2 else direct
        put(16 * index, head, *bad_descriptors(index, head), direct)
        put(16 * index + 16, room, *bad_descriptors(index + 1, room))
    if packed:
        return bytes(image), places
    ring = available_ring([4 * number for number in range(CHAINS)])
    put(AVAILABLE, ring)
    places.append(f"{AVAILABLE + 4}:{hexed(bytes(2), bytes((4, 0)), bytes((8, 0)))}")
    return bytes(image), places


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_only_authenticated_data_is_stored(keyed: Rig, guest: RawGuest, packed: bool) -> None:
    store = keyed.store
    features = 1 << virtio.VIRTIO_F_INDIRECT_DESC | packed << virtio.VIRTIO_F_RING_PACKED
    blocks = [bytes([number]) * 256 for number in (1, 2, 3, 4)]
    rounds = written = broken = 0
    deadline = time.monotonic() + MOST
    # How often a request is good or broken depends on how the other process is scheduled.
    while (rounds < ROUNDS or min(written, broken) <= LEAST) and time.monotonic() < deadline:
        # The guest has written these requests with the key; nothing else may ever be stored.
        counter = store.counter
        signed = [write_data(counter, 10 + n, block) for n, block in enumerate(blocks)]
        image, places = image_and_hammer([*signed, read_counter()], packed)
        guest.fill(image)
        guest.share()
        with hammer("rewrite", guest.fd, *places, size=SIZE):
            for _ in range(100):
                before, known = bytes(store.image), store.counter
                guest.start(features)
                if packed:  # used descriptors have overwritten it
                    os.pwrite(guest.fd, image[: 32 * CHAINS], 0)
                broken += bool(keyed.device.process(guest.queue) & FAULTS)
                guest.queue.take_faults()
                rounds += 1
                if store.counter == known:
                    assert store.image == before
                    continue
                # Of requests with one counter, one at most can be good.
                assert (known, store.counter) == (counter, counter + 1)
                changed = [
                    address
                    for address in range(store.image.nbytes // 256)
                    if store.image[address * 256 :][:256] != before[address * 256 :][:256]
                ]
                assert len(changed) <= 1
                for address in changed:
                    assert store.image[address * 256 :][:256] == blocks[address - 10]
                written += 1
        memory = guest.memory.read(GUEST, SIZE)
        assert SECRET not in memory, "bytes beyond the regions were read"
        assert SECRET not in bytes(store.image)
        with open(f"/proc/self/fd/{guest.fd}", "rb") as file:
            assert file.read()[SIZE:] == image[SIZE:], "bytes beyond the regions were written"
    assert rounds >= ROUNDS, rounds
    assert written > LEAST, (rounds, written, broken)
    assert broken > LEAST, (rounds, written, broken)
