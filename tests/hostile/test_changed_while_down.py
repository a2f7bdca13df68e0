# SPDX-License-Identifier: Apache-2.0
"""A guest or front-end that changes its memory while there is no process to serve it.

Only its own requests suffer: no process ends, the vring works again after its reset, nothing is
stored but what was written with the key, and the next front-end is served.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.campaign import DIVISOR
from tests.support.daemon import PATIENCE
from tests.support.oracle import BLOCK_SIZE, KEY, read_counter
from tests.support.recorded import PROTOCOL, InflightRegion
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.driver.rpmb import RpmbClient, Setup
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user.wire import InflightDescription, MemoryRegion, Request
from vhost_rpmb.virtio import spec as virtio

PENDING = 4  # requests that no process has seen
BLOCKS = 32  # that are compared
WRITTEN = range(8, 8 + PENDING)  # the blocks that they write
PAGE = 4096
REGION = MemoryRegion(0x4000_0000, 16 * PAGE, 0x7F00_0000_0000, 0)
SETUP = Setup(protocol_features=PROTOCOL, regions=(REGION,))
ROUNDS = 500 if DIVISOR == 1 else 0


@pytest.fixture
def supervised(tmp_path: Path, engine: Engine) -> Iterator[Supervised]:
    with Supervised(tmp_path, engine=engine.name) as supervised:
        with supervised.client() as client:
            client.program_key(KEY)
        yield supervised


def content(address: int) -> bytes:
    """What a request that no process has seen writes to a block."""
    return bytes([address]) * BLOCK_SIZE


class Victim:
    """A guest with requests in its ring, whose memory and in-flight region are changed."""

    def __init__(self, client: RpmbClient, region: InflightRegion, chance: random.Random) -> None:
        self.client = client
        self.ring = client.ring
        self.memory = client.memory
        self.region = region
        self.random = chance
        self.heads: list[int] = []

    def submit(self, counter: int) -> None:
        for number, address in enumerate(WRITTEN):
            request = self.client.write_request(address, content(address), counter + number)
            self.heads.append(self.client.submit(request, spec.FRAME_SIZE))
        self.ring.publish()

    def put16(self, address: int, value: int) -> None:
        self.memory.store16(address, value & 0xFFFF)

    def move_used(self, count: int) -> None:
        self.put16(self.ring.used_ring + 2, self.ring.used_index + count)

    def move_available(self, count: int) -> None:
        place = self.ring.available_ring + 2
        self.put16(place, self.memory.load16(place) + count)

    def offer(self, head: int) -> None:
        for position in range(self.ring.size):
            self.ring.write_available(position, head)

    def describe(self, address: int, length: int, flags: int, following: int) -> None:
        for index in range(self.ring.size):
            self.ring.write_descriptor(index, address, length, flags, following)

    def change_frame(self) -> None:
        place = self.client._buffers[self.heads[1]].readable[0].address
        self.memory.write(place, b"\xff" * spec.FRAME_SIZE)

    def scribble(self) -> None:
        """Random bytes in the rings, the in-flight region, and a little of everything else."""
        size = REGION.size if self.random.randrange(2) else PAGE
        for _ in range(self.random.choice((1, 10, 1000))):
            place = self.random.randrange(size)
            self.memory.regions[0].view[place] = self.random.randrange(256)
        if not self.random.randrange(3):
            os.pwrite(self.region.fd, self.random.randbytes(1), self.random.randrange(PAGE // 4))


CHANGES: dict[str, Callable[[Victim], object]] = {
    "used index behind": lambda v: v.move_used(-1),
    "used index ahead": lambda v: v.move_used(2),
    "used index past the available one": lambda v: v.move_used(PENDING + 1),
    "used index far away": lambda v: v.move_used(0x8000),
    "available index behind": lambda v: v.move_available(-PENDING - 1),
    "available index far away": lambda v: v.move_available(1000),
    "head outside the table": lambda v: v.offer(0xFFFF),
    "one head everywhere": lambda v: v.offer(v.heads[0]),
    "descriptor outside memory": lambda v: v.describe(1 << 60, 512, 0, 0),
    "descriptors in a loop": lambda v: v.describe(REGION.guest_address, 1, 1, 0),
    "descriptors into the rings": lambda v: v.describe(v.ring.descriptor_table, PAGE, 3, 1),
    "frame": Victim.change_frame,
    "no signals": lambda v: v.ring.set_available_flags(virtio.VIRTQ_AVAIL_F_NO_INTERRUPT),
    "rings of zeros": lambda v: v.memory.write(REGION.guest_address, bytes(PAGE)),
    "rings of ones": lambda v: v.memory.write(REGION.guest_address, b"\xff" * PAGE),
    "fresh in-flight record": lambda v: os.pwrite(v.region.fd, bytes(PAGE), 0),
    "all in flight": lambda v: [os.pwrite(v.region.fd, b"\1", 16 + 16 * n) for n in range(64)],
    "in-flight record of ones": lambda v: os.pwrite(v.region.fd, b"\xff" * PAGE, 0),
    "other in-flight index": lambda v: os.pwrite(v.region.fd, b"\x34\x12", 14),
    "random bytes": Victim.scribble,
}


def changes(engine: Engine) -> list[str]:
    """Every second one in a sample, so that each is made on one of the engines."""
    names = list(CHANGES)
    return names if DIVISOR == 1 else names[engine.name == "pure" :: 2]


def test_changed_memory_harms_nobody_else(supervised: Supervised, engine: Engine) -> None:
    manager = supervised.manager
    chance = random.Random(5)
    for name in changes(engine) + ["random bytes"] * ROUNDS:
        deaths = len(manager.statuses)
        check_change(supervised, CHANGES[name], chance)
        assert manager.statuses[deaths:] == [-9], f"{name}: {manager.log[-4000:]}"
    assert "cannot be continued" not in manager.log


def check_change(
    supervised: Supervised, change: Callable[[Victim], object], chance: random.Random
) -> None:
    with RpmbClient.connect(supervised.path, KEY, timeout=PATIENCE, setup=SETUP) as client:
        region = InflightRegion(client)
        before = client.read(0, BLOCKS)
        counter = client.read_counter()
        victim = Victim(client, region, chance)
        with supervised.manager.down():
            victim.submit(counter)
            change(victim)
        client.frontend.get_status()
        client.frontend.stop_ring()
        region.clear()
        client.reset_queue()
        counters = range(counter, counter + PENDING + 1)
        assert client.read_counter() in counters
        after = client.read(0, BLOCKS)
        for address in range(BLOCKS):
            place = slice(address * BLOCK_SIZE, (address + 1) * BLOCK_SIZE)
            allowed = {before[place]}
            if address in WRITTEN:
                allowed.add(content(address))
            assert after[place] in allowed, address
        region.close()
    with supervised.client(KEY) as successor:
        assert successor.read_counter() in counters
        assert successor.read(0, BLOCKS) == after


# The size that is left of a file, and the size that it has when the next process maps it.
CUTS = {
    "gone": (0, 0),
    "in part": (1024, 1024),
    "zeros": (0, REGION.size),
    "in part zeros": (PAGE, REGION.size),
}


def test_file_that_was_truncated_while_nobody_served(supervised: Supervised) -> None:
    """A mapping that does not fit ends the connection; zeros are a guest's own content."""
    for file, cut in itertools.product(("memory", "in-flight"), CUTS):
        warnings, deaths = len(supervised.warnings), len(supervised.manager.statuses)
        check_truncation(supervised, file, *CUTS[cut])
        ends = supervised.warnings[warnings:]
        assert len(ends) == (cut in ("gone", "in part")), ends
        for line in ends:
            assert "the connection ends, it cannot be continued: " in line
            assert "past the end of its file" in line
        supervised.becomes_empty()
        with supervised.client(KEY) as successor:
            assert len(successor.read(0, 1)) == BLOCK_SIZE
        assert supervised.manager.statuses[deaths:] == [-9]


def check_truncation(supervised: Supervised, file: str, size: int, grown: int) -> None:
    with ExitStack() as stack:
        memory = stack.enter_context(GuestMemory([REGION], sealed=False))
        ring = stack.enter_context(Ring(memory))
        frontend = stack.enter_context(supervised.frontend())
        region = os.memfd_create("in-flight")
        stack.callback(os.close, region)
        os.ftruncate(region, REGION.size)
        frontend.handshake(PROTOCOL)
        frontend.start_device(0)
        frontend.share_memory(memory)
        description = InflightDescription(REGION.size, 0, 1, ring.size)
        frontend.tell(Request.SET_INFLIGHT_FD, description.pack(), [region])
        frontend.start_ring(ring)
        with supervised.manager.down():
            fd = memory.regions[0].fd if file == "memory" else region
            os.ftruncate(fd, size)
            os.ftruncate(fd, grown)
        if grown < REGION.size:
            with pytest.raises(BackendError, match="closed the connection"):
                frontend.receive()
            return
        frontend.stop_ring()
        ring.reset()
        frontend.start_ring(ring)
        place = memory.allocate(2 * spec.FRAME_SIZE)
        memory.write(place, read_counter())
        answer = Segment(place + spec.FRAME_SIZE, spec.FRAME_SIZE)
        ring.add([Segment(place, spec.FRAME_SIZE)], [answer])
        ring.flush()
        assert ring.wait(PATIENCE)
