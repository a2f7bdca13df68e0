# SPDX-License-Identifier: Apache-2.0
"""Guests and front-ends that want all of the daemon's time, memory or descriptors."""

from __future__ import annotations

import fcntl
import gc
import os
import resource
import signal
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from statistics import median

import pytest

from tests.support.campaign import DIVISOR
from tests.support.daemon import PATIENCE, Daemon, DaemonFactory, is_asleep, processor_time, until
from tests.support.oracle import KEY, read_counter, read_data, write_data
from tests.support.raw import GUEST, QUEUE, hammer
from tests.support.rig import RigFactory
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request
from vhost_rpmb.virtio import spec as virtio

SOON = 0.1  # seconds of processor time
LONG = 5.0 / DIVISOR  # seconds of starving
GROWTH = 4 << 20  # bytes that the daemon may take for anything a front-end does
FEW_DESCRIPTORS = 64
ENOUGH = 100_000  # bytes of messages
CONNECTIONS = 10_000 if DIVISOR == 1 else 2_500


@pytest.fixture
def programmed(daemon: DaemonFactory) -> Daemon:
    """A daemon that has few descriptors to lose, with a key."""
    running = daemon("--poll-us=64")
    limits = resource.prlimit(running.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(running.pid, resource.RLIMIT_NOFILE, (FEW_DESCRIPTORS, limits[1]))
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(KEY)
    return running


def memory_of(running: Daemon) -> int:
    """The resident memory of a daemon, in bytes."""
    pages = Path(f"/proc/{running.pid}/statm").read_text().split()[1]
    return int(pages) * resource.getpagesize()


def assert_works(running: Daemon) -> None:
    with RpmbClient.connect(str(running.socket_path), key=KEY) as client:
        assert client.read_counter() == 0


def processor_time_of_children() -> float:
    """That of all processes that were started here and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def takes_no_time(running: Daemon) -> bool:
    """Whether a daemon does nothing at all for half a second."""
    before = processor_time(running.pid)
    time.sleep(0.5)
    return processor_time(running.pid) == before


def costs(running: Daemon, action: Callable[[], object]) -> list[float]:
    """The processor time, in seconds, that a daemon takes until an action is over, many times.

    Elapsed time would count what other processes take too.
    """
    times = []
    end = time.monotonic() + LONG
    while time.monotonic() < end:
        before = processor_time(running.pid)
        action()
        times.append(processor_time(running.pid) - before)
    return times


# Each chain is as much work as a chain can be.
FLOODS = {
    "reads": (read_data(0, 255), 255 * 512),
    "counters": (read_counter() * 512, 512 * 512),
    "writes": (write_data(0, 0, *[bytes(256)] * 32, key=bytes(32)) * 16, 512),
    "broken": (b"", 0),
}


@pytest.mark.timing
@pytest.mark.parametrize("kind", FLOODS)
def test_full_ring_leaves_other_work_its_time(programmed: Daemon, kind: str) -> None:
    """The control socket and the stop are served after little work on the ring all the same."""
    request, room = FLOODS[kind]
    place = MemoryRegion(GUEST, 4 << 20, 0x7F00_0000_0000, 0)
    with GuestMemory([place]) as memory, Ring(memory, QUEUE) as ring:
        data, answers = memory.allocate(max(len(request), 1)), memory.allocate(max(room, 1))
        memory.write(data, request)
        for index in range(0, QUEUE, 2):
            if request:
                ring.write_descriptor(
                    index, data, len(request), virtio.VIRTQ_DESC_F_NEXT, index + 1
                )
                ring.write_descriptor(index + 1, answers, room, virtio.VIRTQ_DESC_F_WRITE)
            else:  # a loop, which takes the queue's size to find out
                ring.write_descriptor(index, data, 1, virtio.VIRTQ_DESC_F_NEXT, index)
        for position in range(QUEUE):
            ring.write_available(position, 2 * position % QUEUE)
        with Frontend.connect(programmed.socket_path) as frontend:
            frontend.handshake()
            frontend.start_device(0)
            frontend.share_memory(memory)
            frontend.start_ring(ring)
            parts = (ring.available_ring - GUEST, ring.used_ring - GUEST, QUEUE, ring.kick_fd)
            fd = memory.regions[0].fd
            with hammer("flood", fd, *parts, size=4 << 20, pass_fds=[ring.kick_fd]):
                served = ring.used_index
                until(lambda: ring.used_index != served)
                times = sorted(costs(programmed, frontend.get_status))
                assert times[len(times) * 9 // 10] < SOON
                assert times[-1] < 3 * SOON
                served = ring.used_index
                until(lambda: ring.used_index != served)  # it is still starved
                before = processor_time(programmed.pid)
                others = processor_time_of_children()
                programmed.send(signal.SIGTERM)
                with suppress(BackendError):
                    while programmed.running:
                        frontend.get_status()
                assert programmed.wait(PATIENCE) == 0
                # The end of the interpreter is in it.
                assert processor_time_of_children() - others - before < 5 * SOON


@pytest.mark.timing
@pytest.mark.parametrize("kind", FLOODS)
def test_longest_batch_takes_a_bounded_time(make_rig: RigFactory, kind: str) -> None:
    """The longest batch keeps the processor for less than 100 ms, at the median of 20."""
    rig = make_rig(regions=[MemoryRegion(GUEST, 4 << 20, 0x7F00_0000_0000, 0)])
    rig.program()
    request, room = FLOODS[kind]
    data, answers = rig.guest.allocate(max(len(request), 1)), rig.guest.allocate(max(room, 1))
    rig.guest.write(data, request)
    rig.start(0)
    rig.ring.set_available_index(0)
    for index in range(0, QUEUE, 2):
        if request:
            rig.ring.write_descriptor(
                index, data, len(request), virtio.VIRTQ_DESC_F_NEXT, index + 1
            )
            rig.ring.write_descriptor(index + 1, answers, room, virtio.VIRTQ_DESC_F_WRITE)
        else:
            rig.ring.write_descriptor(index, data, 1, virtio.VIRTQ_DESC_F_NEXT, index)
    for position in range(QUEUE):
        rig.ring.write_available(position, 2 * position % QUEUE)
    times = []
    gc.disable()  # it would visit what the tests before this one left
    try:
        for _ in range(20):
            rig.ring.set_available_index((rig.queue.base + QUEUE) & 0xFFFF)
            start = time.thread_time()
            rig.device.process(rig.queue)
            times.append(time.thread_time() - start)
    finally:
        gc.enable()
    # The clock of a thread also counts what other work costs it: lost caches, a shared core.
    assert median(times) < SOON


@pytest.mark.timing
def test_incomplete_message_uses_no_processor_time(programmed: Daemon) -> None:
    """A message that never ends costs nothing, and the stop is served."""
    with socket.socket(socket.AF_UNIX) as slow:
        slow.connect(str(programmed.socket_path))
        for byte in struct.pack("=III", Request.GET_FEATURES, wire.VERSION, 0)[:-1]:
            slow.send(bytes([byte]))
            time.sleep(0.01)
        until(lambda: takes_no_time(programmed))  # it has read the byte, the image is up to date
        slow.send(b"\0")
        assert slow.recv(20)
        programmed.stop()


@pytest.mark.memory
def test_flood_of_messages_uses_bounded_resources(programmed: Daemon) -> None:
    before = memory_of(programmed)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(programmed.socket_path))
        message = struct.pack(
            "=III", Request.SET_VRING_ADDR, wire.VERSION | wire.FLAG_NEED_REPLY, 40
        )
        owner = struct.pack("=IIIQ", Request.SET_PROTOCOL_FEATURES, wire.VERSION, 8, 1 << 3)
        sock.sendall(owner)
        sock.setblocking(False)
        end = time.monotonic() + LONG
        sent = 0
        while time.monotonic() < end or sent < ENOUGH:
            try:
                sent += sock.send((message + b"\xff" * 40) * 100)
            except BlockingIOError:
                try:
                    sock.recv(1 << 16)
                except BlockingIOError:
                    time.sleep(0.001)
            except OSError:
                break  # it reads no replies for too long
    assert sent >= ENOUGH
    assert memory_of(programmed) - before < GROWTH
    assert_works(programmed)
    programmed.stop()


@pytest.mark.memory
def test_thousands_of_connections_use_bounded_resources(programmed: Daemon) -> None:
    """None of them costs a descriptor (there are 64) or memory."""
    before = memory_of(programmed)
    for _ in range(CONNECTIONS):
        with socket.socket(socket.AF_UNIX) as sock:
            while True:
                try:
                    sock.connect(str(programmed.socket_path))
                except BlockingIOError:
                    time.sleep(0.001)
                else:
                    break
    assert_works(programmed)
    assert memory_of(programmed) - before < GROWTH * CONNECTIONS / 10_000
    programmed.stop()


@pytest.mark.memory
def test_hundreds_of_descriptors_leave_none_open(programmed: Daemon) -> None:
    """What is not asked for is closed, although there are fewer free than come."""
    before = memory_of(programmed)
    fd = os.memfd_create("descriptor")
    message = struct.pack("=III", Request.GET_FEATURES, wire.VERSION, 0)
    for count in (1, 33, 253) * 20:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(str(programmed.socket_path))
            for _ in range(20):
                try:
                    socket.send_fds(sock, [message], [fd] * count)
                except OSError:
                    break
    os.close(fd)
    assert_works(programmed)
    assert memory_of(programmed) - before < GROWTH
    programmed.stop()


@pytest.fixture
def stuck(programmed: Daemon) -> Iterator[tuple[Frontend, Ring]]:
    """A front-end that made the daemon's write to the call eventfd block."""
    with GuestMemory() as memory, Ring(memory) as ring:
        request = memory.allocate(1024)
        memory.write(request, read_counter())
        with Frontend.connect(programmed.socket_path) as frontend:
            frontend.handshake()
            frontend.start_device(0)
            frontend.share_memory(memory)
            frontend.start_ring(ring)
            ring.add([Segment(request, 512)], [Segment(request + 512, 512)])
            flags = fcntl.fcntl(ring.call_fd, fcntl.F_GETFL)
            fcntl.fcntl(ring.call_fd, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
            os.eventfd_read(ring.call_fd)  # the signal that comes when a vring starts
            os.eventfd_write(ring.call_fd, 2**64 - 2)
            ring.publish()
            ring.kick()
            until(lambda: ring.used_index == 1)
            until(lambda: is_asleep(programmed.pid))  # in the write, which comes next
            yield frontend, ring


def test_full_call_eventfd_does_not_delay_the_stop(
    programmed: Daemon, stuck: tuple[Frontend, Ring]
) -> None:
    programmed.send(signal.SIGTERM)
    assert programmed.wait(PATIENCE) == 0


def test_full_call_eventfd_does_not_delay_the_next_front_end(
    programmed: Daemon, stuck: tuple[Frontend, Ring]
) -> None:
    stuck[0].close()
    with RpmbClient.connect(str(programmed.socket_path), key=KEY, timeout=PATIENCE) as client:
        assert client.read_counter() == 0
    programmed.stop()
