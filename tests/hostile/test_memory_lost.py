# SPDX-License-Identifier: Apache-2.0
"""Guest memory that disappears: the front-end truncates its file, or replaces the table."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.campaign import DIVISOR
from tests.support.daemon import PATIENCE, Daemon, DaemonFactory
from tests.support.oracle import KEY, read_counter, write_data
from tests.support.raw import AVAILABLE, BUFFERS, RawGuest, available_ring, hammer, lay_out
from tests.support.rig import Rig
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request
from vhost_rpmb.virtio import rules
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, MORE

LOST = rules.RING_RULES[rules.RING_MEMORY_LOST]
ROUNDS = 3000 // DIVISOR
TABLES = 1000 // DIVISOR
LEAST = 2  # more batches than that have to be good, and lost
MOST = 240.0  # seconds


@pytest.fixture
def guest(engine: Engine) -> Iterator[RawGuest]:
    guest = RawGuest(engine)
    yield guest
    guest.close()


def serve(rig: Rig, guest: RawGuest) -> int:
    return rig.device.process(guest.queue)


def assert_works(rig: Rig, guest: RawGuest) -> None:
    """Check that the device serves the guest after its memory was shared anew."""
    guest.fill(lay_out([read_counter()]))
    guest.share()
    guest.start()
    assert not serve(rig, guest) & BROKEN
    assert guest.used_index() == 1


# Whole (0): rings and buffers are gone; BUFFERS: the rings are still there.
@pytest.mark.parametrize("size", [0, AVAILABLE, BUFFERS, BUFFERS + 4096])
def test_memory_truncated_before_the_kick(keyed: Rig, guest: RawGuest, size: int) -> None:
    frames = [write_data(0, 1, bytes([7]) * 256), *[read_counter()] * 20]
    guest.fill(lay_out(frames))
    guest.share()
    guest.start()
    os.ftruncate(guest.fd, size)
    flags = serve(keyed, guest)
    assert flags & BROKEN
    assert not flags & MORE
    assert guest.queue.error == LOST
    assert guest.used_index() == 0
    assert keyed.store.counter == 0, "a batch was executed that may not be what the guest wrote"
    guest.start()  # the driver resets the queue, but the memory is still gone
    assert serve(keyed, guest) & BROKEN
    assert_works(keyed, guest)


def test_truncated_between_batches(keyed: Rig, guest: RawGuest) -> None:
    guest.fill(lay_out([read_counter()] * 2))
    os.pwrite(guest.fd, available_ring([0]), AVAILABLE)
    guest.share()
    guest.start()
    assert not serve(keyed, guest) & BROKEN
    assert guest.used_index() == 1
    os.pwrite(guest.fd, available_ring([0, 2]), AVAILABLE)
    os.ftruncate(guest.fd, BUFFERS)
    assert serve(keyed, guest) & BROKEN
    assert guest.queue.error == LOST
    assert guest.used_index() == 1
    assert_works(keyed, guest)


def test_memory_truncated_during_requests(keyed: Rig, guest: RawGuest) -> None:
    """The image only ever holds what was written with the key and the right counter."""
    good = lost = refused = 0
    deadline = time.monotonic() + MOST
    guest.fill(b"")
    with hammer("truncate", guest.fd):
        # How often the truncation hits depends on how the other process is scheduled.
        while (good + lost < ROUNDS or min(good, lost) <= LEAST) and (time.monotonic() < deadline):
            counter = keyed.store.counter
            block = counter.to_bytes(4, "big") * 64
            guest.fill(
                lay_out([read_counter()] * 4 + [write_data(counter, 9, block)] + [read_counter()])
            )
            try:
                guest.share()
            except ValueError:
                refused += 1
                continue
            guest.start()
            if serve(keyed, guest) & BROKEN:
                assert guest.queue.error == LOST
                lost += 1
            else:
                good += 1
            assert keyed.store.counter in (counter, counter + 1)
            if keyed.store.counter > counter:
                assert keyed.store.image[9 * 256 : 10 * 256] == block
    assert good + lost >= ROUNDS, (good, lost, refused)
    assert good > LEAST, (good, lost, refused)
    assert lost > LEAST, (good, lost, refused)
    assert_works(keyed, guest)


def test_fault_elsewhere_still_ends_the_process(engine: Engine) -> None:
    """Only regions are guarded: another mapping past the end of its file is a bug of ours."""
    script = f"""
import mmap, os
from vhost_rpmb import engine
memory = engine.load({engine.name!r}).GuestMemory()
fd = os.memfd_create("x"); os.ftruncate(fd, 8192)
memory.add_region(0, 4096, 0, 0, fd)
other = mmap.mmap(fd, 8192)
os.ftruncate(fd, 0)
memory.read(0, 16)
other[4096]
"""
    assert run_python(script) == -signal.SIGBUS


def test_signal_from_elsewhere_still_ends_the_process(engine: Engine) -> None:
    script = f"""
import os, signal
from vhost_rpmb import engine
memory = engine.load({engine.name!r}).GuestMemory()
fd = os.memfd_create("x"); os.ftruncate(fd, 8192)
memory.add_region(0, 4096, 0, 0, fd)
os.kill(os.getpid(), signal.SIGBUS)
"""
    assert run_python(script) == -signal.SIGBUS


def run_python(script: str) -> int:
    return subprocess.run([sys.executable, "-c", script], timeout=60).returncode


def connect(running: Daemon, memory: GuestMemory, ring: Ring) -> Frontend:
    frontend = Frontend.connect(running.socket_path)
    frontend.handshake()
    frontend.start_device(0)
    frontend.share_memory(memory)
    frontend.start_ring(ring)
    return frontend


def readable(fd: int) -> bool:
    return bool(select.select([fd], [], [], PATIENCE)[0])


def test_daemon_outlives_a_front_end_that_truncates(daemon: DaemonFactory) -> None:
    running = daemon()
    for _ in range(3):
        with GuestMemory(sealed=False) as memory, Ring(memory) as ring:
            address = memory.allocate(1024)
            memory.write(address, read_counter())
            with connect(running, memory, ring) as frontend:
                ring.add([Segment(address, 512)], [Segment(address + 512, 512)])
                ring.publish()
                os.ftruncate(memory.regions[0].fd, 0)
                ring.kick()
                assert readable(ring.error_fd), "the error eventfd was not signalled"
                frontend.get_status()  # the control socket is still served
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(KEY)
        assert client.read_counter() == 0
    running.stop()
    assert LOST in running.log


def test_daemon_outlives_tables_replaced_in_flight(daemon: DaemonFactory) -> None:
    running = daemon()
    with GuestMemory() as memory, GuestMemory() as other, Ring(memory) as ring:
        address = memory.allocate(1024)
        memory.write(address, read_counter())
        with connect(running, memory, ring) as frontend:
            for _ in range(TABLES):
                ring.write_descriptor(0, address, 512, virtio.VIRTQ_DESC_F_NEXT, 1)
                ring.write_descriptor(1, address + 512, 512, virtio.VIRTQ_DESC_F_WRITE, 0)
                for _ in range(ring.size):
                    ring.offer(0)
                ring.publish()
                ring.kick()
                for table in (other, memory):
                    region = table.regions[0]
                    payload = wire.pack_memory_table([region.place])
                    frontend.tell(Request.SET_MEM_TABLE, payload, [region.fd])
                frontend.stop_ring()
                ring.reset()
                frontend.start_ring(ring)
            assert frontend.get_status()
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(KEY)
    running.stop()
