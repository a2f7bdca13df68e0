# SPDX-License-Identifier: Apache-2.0
"""Guests whose memory is laid out to cost the daemon much: sparse, or in many small regions."""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path
from types import FrameType

import pytest

from tests.support.daemon import Daemon, DaemonFactory
from tests.support.oracle import KEY, read_counter
from tests.support.raw import GUEST, USER, RawGuest, available_ring, descriptor
from tests.support.rig import Rig
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user.wire import MemoryRegion
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio

NEXT, WRITE = virtio.VIRTQ_DESC_F_NEXT, virtio.VIRTQ_DESC_F_WRITE
SMALL_REGIONS = 508
RINGS = 0x11_0000  # bytes: a table of 32,768 descriptors takes half of it
WORK = 200_000  # calls of Python functions, some for each border and each descriptor
SECONDS = 1.0  # of processor time; 0.02 are usual


@pytest.fixture
def pieces() -> list[MemoryRegion]:
    """A region for the rings, and adjoining ones of one byte each."""
    small = GUEST + RINGS
    return [
        MemoryRegion(GUEST, RINGS, USER, 0),
        *[MemoryRegion(small + n, 1, USER + RINGS + n, RINGS + n) for n in range(SMALL_REGIONS)],
    ]


@pytest.mark.timing
@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
def test_many_descriptors_over_many_regions(
    keyed: Rig, pieces: list[MemoryRegion], flags: int
) -> None:
    """The work of a chain does not grow with descriptors times regions: it is broken early."""
    size = virtio.VIRTQ_MAX_SIZE
    buffer, table = (GUEST + RINGS, SMALL_REGIONS), size * virtio.VIRTQ_DESC_SIZE
    entries = [descriptor(*buffer, flags | NEXT, number + 1) for number in range(size - 1)]
    entries.append(descriptor(*buffer, flags))
    guest = RawGuest(keyed.engine, pieces)
    image = bytearray(RINGS + SMALL_REGIONS)
    image[:table] = b"".join(entries)
    ring = available_ring([0])
    image[table : table + len(ring)] = ring
    used = 0xC0000
    guest.fill(bytes(image))
    guest.share()
    guest.start()
    guest.queue.set_size(size)
    guest.queue.set_addresses(USER, USER + table, USER + used)
    calls = 0

    def count(_frame: FrameType, event: str, _argument: object) -> None:
        nonlocal calls
        calls += event == "call"
        if calls > WORK:
            sys.setprofile(None)
            raise AssertionError(f"a chain takes more than {WORK} calls")

    start = time.thread_time()
    sys.setprofile(count)
    try:
        keyed.device.process(guest.queue)
    finally:
        sys.setprofile(None)
    assert time.thread_time() - start < SECONDS
    assert guest.queue.take_faults() == {rules.CHAIN_RULES[rules.CHAIN_CROSSINGS]: 1}
    element = guest.memory.read(GUEST + used + 2, 10)
    assert struct.unpack("<HII", element) == (1, 0, 0)
    guest.close()


SPARSE = 1 << 40  # guest physical, and bytes
AREA = 2 << 20  # bytes that one page table maps
TOUCHES = 8192  # descriptors, each at the border of two areas
TABLES = 16 << 20  # bytes that they may cost; 32 MiB if all of their tables stayed


def sizes(process: int | str, *names: str) -> list[int]:
    """Sizes of a process's memory, in bytes."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return [int(values[name].split()[0]) * 1024 for name in names]


def page_tables(running: Daemon) -> int:
    """The size of a daemon's page tables, in bytes."""
    return sizes(running.pid, "VmPTE")[0]


@pytest.mark.needs_host
@pytest.mark.parametrize("flags", [0, WRITE], ids=["readable", "writable"])
def test_page_tables_of_sparse_memory_are_dropped(daemon: DaemonFactory, flags: int) -> None:
    running = daemon()
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(KEY)
    regions = [MemoryRegion(GUEST, 4 << 20, USER, 0), MemoryRegion(SPARSE, SPARSE, 1 << 44, 0)]
    with GuestMemory(regions) as memory, Ring(memory, 2 * TOUCHES) as ring:
        frames = TOUCHES * 2 // spec.FRAME_SIZE
        buffers = [(SPARSE + (number + 1) * AREA - 1, 2) for number in range(TOUCHES)]
        if flags:  # a request, then an answer in small buffers
            request = memory.allocate(TOUCHES * 2)
            memory.write(request, read_counter() * frames)
            chain = [(request, TOUCHES * 2, 0), *[(*buffer, WRITE) for buffer in buffers]]
        else:
            answer = memory.allocate(TOUCHES * 2)
            chain = [*[(*buffer, 0) for buffer in buffers], (answer, TOUCHES * 2, WRITE)]
        for index, (address, length, kind) in enumerate(chain):
            last = index == len(chain) - 1
            ring.write_descriptor(index, address, length, kind | (0 if last else NEXT), index + 1)
        with Frontend.connect(running.socket_path) as frontend:
            frontend.handshake()
            frontend.start_device(0)
            frontend.share_memory(memory)
            frontend.start_ring(ring)
            before = page_tables(running)
            for number in range(1, 3):
                ring.offer(0)
                ring.publish()
                ring.kick()
                deadline = time.monotonic() + 60
                while ring.used_index != number:
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                assert ring.used_element(number - 1).length == TOUCHES * 2
                assert page_tables(running) - before < TABLES
        where = buffers if flags else [(answer, TOUCHES * 2)]
        answered = b"".join(memory.read(*place) for place in where)
        kinds = {answered[start + 510 : start + 512] for start in range(0, len(answered), 512)}
        response = spec.VIRTIO_RPMB_RESP_GET_COUNTER if flags else 0
        assert kinds == {response.to_bytes(2)}
    with RpmbClient.connect(str(running.socket_path), key=KEY) as client:
        assert client.read_counter() == 0
    running.stop()


@pytest.mark.needs_host
@pytest.mark.parametrize("write", [False, True], ids=["read", "written"])
def test_page_tables_of_lost_memory_are_dropped(engine: Engine, write: bool) -> None:
    """The zeros in the place of a truncated file are as sparse, and each page of them is memory."""
    memory = engine.GuestMemory()
    fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, SPARSE)
        memory.add_region(SPARSE, SPARSE, 1 << 44, 0, fd)
        os.ftruncate(fd, 0)
        before = sizes("self", "VmPTE", "RssAnon")
        for number in range(TOUCHES):
            address = SPARSE + (number + 1) * AREA - 1
            if write:
                memory.write(address, b"\1\1")
            else:
                assert memory.read(address, 2) == b"\0\0"
        after = sizes("self", "VmPTE", "RssAnon")
        assert max(now - then for now, then in zip(after, before, strict=True)) < TABLES
    finally:
        memory.clear()
        os.close(fd)


LARGE = 1 << 46  # bytes, the most that a connection maps
RATIO = 3  # of processor times; 1.2 are usual


@pytest.mark.timing
def test_touching_the_largest_memory_takes_little_time(engine: Engine) -> None:
    """A renewal takes time for all that is mapped, so it happens more rarely in large memory."""
    times = []
    for size in (SPARSE, LARGE):
        memory = engine.GuestMemory()
        fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        try:
            os.ftruncate(fd, size)
            memory.add_region(0, size, 0, 0, fd)
            start = time.thread_time()
            for number in range(TOUCHES):
                memory.read((number * (size // AREA // TOUCHES) + 1) * AREA - 1, 2)
            times.append(time.thread_time() - start)
        finally:
            memory.clear()
            os.close(fd)
    assert times[1] < RATIO * times[0]
