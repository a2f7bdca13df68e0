# SPDX-License-Identifier: Apache-2.0
"""A device of another type, with several queues, on the same session and rings."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import blk
from tests.support.blk import SECTOR_SIZE, BlkDevice
from tests.support.peer import NEGOTIATED, Peer, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request
from vhost_rpmb.virtio import spec as virtio

SECTORS = 64
QUEUES = 3


class Disk:
    """A driver of the device: one request at a time, on any of its queues."""

    def __init__(self, peer: Peer, memory: GuestMemory) -> None:
        self.peer = peer
        self.rings = [Ring(memory, 8) for _ in range(QUEUES)]
        for index, ring in enumerate(self.rings):
            peer.start(ring, index)

    def request(
        self, queue: int, kind: int, sector: int, data: bytes = b"", room: int = 0
    ) -> bytes:
        """Return the answer with its status, the last byte."""
        ring = self.rings[queue]
        header = blk.REQUEST.pack(kind, 0, sector)
        readable = [self._put(piece) for piece in (header, data) if piece]
        writable = [self._put(bytes(size)) for size in (room, 1) if size]
        ring.add(readable, writable)
        ring.flush()
        self.peer.settle()
        (used,) = ring.collect()
        assert used.length == room + 1
        assert signalled(ring.call_fd)
        return b"".join(ring.memory.read(*segment) for segment in writable)

    def _put(self, data: bytes) -> Segment:
        memory = self.rings[0].memory
        segment = Segment(memory.allocate(len(data)), len(data))
        memory.write(segment.address, data)
        return segment

    def close(self) -> None:
        for ring in self.rings:
            ring.close()


@pytest.fixture
def disk(
    engine: Engine, tmp_path: Path, memory: GuestMemory, _no_descriptor_leaks: None
) -> Iterator[Disk]:
    path = tmp_path / "disk"
    path.write_bytes(bytes(SECTORS * SECTOR_SIZE))
    fd = os.open(path, os.O_RDWR)
    device = BlkDevice(fd, QUEUES)
    peer = Peer(engine, device)
    peer.send(Request.SET_PROTOCOL_FEATURES, wire.pack_u64(NEGOTIATED))
    features = 1 << virtio.VIRTIO_F_VERSION_1 | 1 << blk.VIRTIO_BLK_F_MQ | wire.F_PROTOCOL_FEATURES
    peer.send(Request.SET_FEATURES, wire.pack_u64(features))
    peer.share(memory)
    made = Disk(peer, memory)
    yield made
    made.close()
    peer.close()
    os.close(fd)


def test_the_session_asks_the_device_what_it_is(disk: Disk) -> None:
    assert disk.peer.ask_u64(Request.GET_QUEUE_NUM) == QUEUES
    assert disk.peer.ask_u64(Request.GET_FEATURES) >> blk.VIRTIO_BLK_F_MQ & 1
    asked = wire.Config(0, blk.CONFIG.size, 0, bytes(blk.CONFIG.size))
    reply = disk.peer.ask(Request.GET_CONFIG, asked.pack())
    assert reply is not None
    config = blk.CONFIG.unpack(wire.Config.unpack(reply).data)
    assert config == (SECTORS, blk.SIZE_MAX, blk.SEG_MAX, QUEUES)


def test_each_queue_is_served(disk: Disk) -> None:
    for queue in range(QUEUES):
        data = bytes([queue + 1]) * 2 * SECTOR_SIZE
        assert disk.request(queue, blk.VIRTIO_BLK_T_OUT, 2 * queue, data) == b"\0"
        reader = (queue + 1) % QUEUES
        answer = disk.request(reader, blk.VIRTIO_BLK_T_IN, 2 * queue, room=len(data))
        assert answer == data + b"\0"
        assert disk.request(queue, blk.VIRTIO_BLK_T_FLUSH, 0) == b"\0"


@pytest.mark.parametrize(
    ("kind", "sector", "data", "room", "status"),
    [
        (blk.VIRTIO_BLK_T_OUT, SECTORS, bytes(SECTOR_SIZE), 0, blk.VIRTIO_BLK_S_IOERR),
        (blk.VIRTIO_BLK_T_OUT, 0, bytes(SECTOR_SIZE - 1), 0, blk.VIRTIO_BLK_S_IOERR),
        (blk.VIRTIO_BLK_T_IN, SECTORS - 1, b"", 2 * SECTOR_SIZE, blk.VIRTIO_BLK_S_IOERR),
        (99, 0, b"", 0, blk.VIRTIO_BLK_S_UNSUPP),
    ],
)
def test_refused_request_has_its_status(
    disk: Disk, kind: int, sector: int, data: bytes, room: int, status: int
) -> None:
    assert disk.request(0, kind, sector, data, room)[-1] == status


def test_stopped_queue_leaves_the_others_running(disk: Disk) -> None:
    assert disk.peer.ask(Request.GET_VRING_BASE, wire.VringState(1, 0).pack()) is not None
    data = b"2" * SECTOR_SIZE
    assert disk.request(0, blk.VIRTIO_BLK_T_OUT, 0, data) == b"\0"
    assert disk.request(2, blk.VIRTIO_BLK_T_IN, 0, room=SECTOR_SIZE) == data + b"\0"
