# SPDX-License-Identifier: Apache-2.0
"""A guest whose memory is laid out byte by byte and can be written without being mapped here."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import spawned
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request, VringState
from vhost_rpmb.virtio import spec as virtio

GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
QUEUE = 64  # descriptors
DESCRIPTORS, AVAILABLE, USED = 0, 0x1000, 0x2000  # offsets in the file
BUFFERS = 0x4000
SIZE = 0x40000
REGIONS = (  # one for the rings, one for the buffers, which adjoins
    MemoryRegion(GUEST, BUFFERS, USER, 0),
    MemoryRegion(GUEST + BUFFERS, SIZE - BUFFERS, USER + BUFFERS, BUFFERS),
)
_HAMMER = Path(__file__).with_name("hammer.py")


def descriptor(address: int, length: int, flags: int = 0, following: int = 0) -> bytes:
    return struct.pack("<QIHH", address, length, flags, following)


def available_ring(heads: Sequence[int]) -> bytes:
    return struct.pack(f"<HH{len(heads)}H", 0, len(heads), *heads)


def lay_out(requests: Sequence[bytes], room: int = spec.FRAME_SIZE) -> bytes:
    """Give the whole file for one chain a request: one readable, one writable buffer."""
    image = bytearray(SIZE)
    place = BUFFERS
    for number, request in enumerate(requests):
        answer = place + len(request)
        first = descriptor(GUEST + place, len(request), virtio.VIRTQ_DESC_F_NEXT, 2 * number + 1)
        second = descriptor(GUEST + answer, room, virtio.VIRTQ_DESC_F_WRITE)
        image[32 * number : 32 * number + 32] = first + second
        image[place:answer] = request
        place = answer + room
    assert place <= SIZE
    ring = available_ring(range(0, 2 * len(requests), 2))
    image[AVAILABLE : AVAILABLE + len(ring)] = ring
    return bytes(image)


class RawGuest:
    """Guest memory of two regions in one memfd, and an engine's queue on it."""

    def __init__(self, engine: Engine, regions: Sequence[MemoryRegion] = REGIONS) -> None:
        self.fd = os.memfd_create("guest-memory", os.MFD_CLOEXEC)
        self.regions = regions
        self.memory = engine.GuestMemory()
        self.queue = engine.Virtqueue(self.memory)

    def close(self) -> None:
        self.memory.clear()
        os.close(self.fd)

    def fill(self, image: bytes) -> None:
        """Make the file whole again, with this content."""
        os.ftruncate(self.fd, max(SIZE, len(image)))
        os.pwrite(self.fd, image, 0)

    def share(self) -> None:
        """Map the memory table anew; ValueError if the file is too short at the moment."""
        self.memory.clear()
        for region in self.regions:
            self.memory.add_region(*region, self.fd)

    def start(self, features: int = 0) -> None:
        """Set the queue up anew."""
        self.queue.reset()
        self.queue.set_size(QUEUE)
        self.queue.set_features(features)
        self.queue.set_addresses(USER + DESCRIPTORS, USER + AVAILABLE, USER + USED)

    def used_index(self) -> int:
        return int.from_bytes(os.pread(self.fd, 2, USED + 2), "little")


@contextmanager
def hammer(
    mode: str, fd: int, *arguments: object, size: int = SIZE, pass_fds: Sequence[int] = ()
) -> Iterator[None]:
    """Let another process work on a memfd while the with-block runs."""
    command = [sys.executable, "-S", str(_HAMMER), mode, str(fd), str(size), *map(str, arguments)]
    fds = (fd, *pass_fds)
    pipe = subprocess.PIPE
    with spawned(command, pass_fds=fds, stdin=pipe, stdout=pipe) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield
            assert process.poll() is None
        finally:
            process.communicate()
        assert process.returncode == 0


def enable_again_and_again(frontend: Frontend) -> None:
    """Send messages each of which has the daemon signal the call eventfd of vring 0."""
    pair = b"".join(
        wire.pack_message(Request.SET_VRING_ENABLE, 0, VringState(0, enable).pack())
        for enable in (0, 1)
    )
    frontend._sock.setblocking(True)
    frontend._sock.sendall(pair * 2000)
