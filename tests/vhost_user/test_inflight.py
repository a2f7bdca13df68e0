# SPDX-License-Identifier: Apache-2.0
"""The in-flight region: its messages, its records, and what a front-end can do wrong with it."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.peer import PAGE, EchoDevice, Peer, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import inflight, wire
from vhost_rpmb.vhost_user.inflight import InvalidRecordError, Recovery
from vhost_rpmb.vhost_user.wire import InflightDescription, Request, VringState

SIZE = 8  # of the ring
HEADER = struct.Struct("=QHHHH")
ENTRY = struct.Struct("=B5xHQ")
GOOD = InflightDescription(2 * inflight.stride(SIZE), 0, 2, SIZE)
EMPTY = (0, 0, 0)  # an entry: inflight, next, counter


def packed(
    *entries: tuple[int, int, int],
    features: int = 0,
    version: int = 1,
    size: int = SIZE,
    last: int = 0,
    used: int = 0,
) -> bytes:
    """A record; entries that are not given are empty."""
    rows = [*entries, *[EMPTY] * (SIZE - len(entries))]
    return HEADER.pack(features, version, size, last, used) + b"".join(
        ENTRY.pack(*row) for row in rows
    )


@pytest.fixture
def record(engine: Engine, region: int) -> Iterator[inflight.Record]:
    mapped = inflight.Region(engine.GuestMemory(1), GOOD, region)
    record = mapped.record(0)
    assert record is not None
    yield record
    mapped.close()


# Messages


@pytest.mark.parametrize("num_queues", [1, 2])
@pytest.mark.parametrize("queue_size", [1, 3, 64, 1024, 32768])
def test_region_is_created(peer: Peer, num_queues: int, queue_size: int) -> None:
    asked = InflightDescription(0, 0, num_queues, queue_size)
    peer.send(Request.GET_INFLIGHT_FD, asked.pack(), flags=wire.FLAG_NEED_REPLY)
    reply = peer.reader.read()
    assert reply is not None
    with reply:
        found = InflightDescription.unpack(reply.payload)
        (fd,) = reply.fds
        assert found[1:] == (0, num_queues, queue_size)
        assert found.mmap_size == os.fstat(fd).st_size >= num_queues * (16 + 16 * queue_size)
        assert not any(os.pread(fd, found.mmap_size, 0))
        for size in (0, found.mmap_size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        assert peer.ack(Request.SET_INFLIGHT_FD, reply.payload, (fd,)) == 0
    assert peer.reply() is None  # one reply, although an acknowledgement was asked for


@pytest.mark.parametrize(
    ("num_queues", "queue_size"), [(0, 8), (3, 8), (65535, 8), (1, 0), (1, 32769), (1, 65535)]
)
def test_region_of_a_wrong_shape_is_not_created(
    peer: Peer, num_queues: int, queue_size: int
) -> None:
    asked = InflightDescription(0, 0, num_queues, queue_size)
    peer.ends("found", Request.GET_INFLIGHT_FD, asked.pack())


@pytest.mark.parametrize(
    "wrong",
    [
        GOOD._replace(mmap_size=0),
        GOOD._replace(mmap_size=1),
        GOOD._replace(mmap_size=GOOD.mmap_size - 1),
        GOOD._replace(mmap_offset=1),
        GOOD._replace(mmap_offset=PAGE),  # behind the end of the file
        GOOD._replace(mmap_offset=1 << 63),
        GOOD._replace(mmap_offset=2**64 - PAGE),
        GOOD._replace(num_queues=0),
        GOOD._replace(num_queues=3),
        GOOD._replace(num_queues=65535),
        GOOD._replace(queue_size=0),
        GOOD._replace(queue_size=65535),
        GOOD._replace(queue_size=32769, mmap_size=1 << 62),
        GOOD._replace(queue_size=1024, mmap_size=1 << 20),  # larger than the file
    ],
)
def test_wrong_region_is_refused(peer: Peer, region: int, wrong: InflightDescription) -> None:
    peer.refused(Request.SET_INFLIGHT_FD, wrong.pack(), (region,))


def test_region_may_be_announced_larger_than_its_file(peer: Peer, region: int) -> None:
    """Only the part in use is mapped."""
    payload = GOOD._replace(mmap_size=1 << 63, queue_size=3).pack()
    assert peer.ack(Request.SET_INFLIGHT_FD, payload, (region,)) == 0


@pytest.mark.parametrize("size", [0, 20, 23, 25, 32])
def test_payload_has_24_bytes(peer: Peer, region: int, size: int) -> None:
    peer.refused(Request.SET_INFLIGHT_FD, GOOD.pack()[:size].ljust(size, b"\0"), (region,))


@pytest.mark.parametrize("count", [0, 2])
def test_region_has_one_descriptor(peer: Peer, region: int, count: int) -> None:
    peer.refused(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,) * count)


def test_file_that_is_no_writable_memory_is_refused(
    peer: Peer, region: int, eventfds: list[int], tmp_path: Path
) -> None:
    files = [
        os.open(f"/proc/self/fd/{region}", os.O_RDONLY),
        os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY),
        *os.pipe(),
    ]
    for fd in (*files, eventfds[0]):
        peer.refused(Request.SET_INFLIGHT_FD, GOOD.pack(), (fd,))
    wire.close_fds(files)


def test_region_of_guest_memory_is_accepted(peer: Peer, memory: GuestMemory) -> None:
    assert peer.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (memory.regions[0].fd,)) == 0


# Service


@pytest.fixture
def ready(peer: Peer, memory: GuestMemory, region: int) -> Peer:
    """A connection with memory and region, whose vrings are not set up."""
    peer.share(memory)
    assert peer.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,)) == 0
    return peer


def base(peer: Peer) -> int:
    reply = peer.ask(Request.GET_VRING_BASE, bytes(8))
    assert reply is not None
    return VringState.unpack(reply).num


def recovered_base(peer: Peer, ring: Ring, base: int) -> int:
    """Where a vring continues, read without serving it: this device answers nothing."""
    peer.configure(ring, base=base)
    vring = peer.vrings[0]
    vring.recover()
    return vring.queue.base


def test_region_is_initialised_when_the_vring_starts(
    ready: Peer, ring: Ring, region: int, device: EchoDevice
) -> None:
    os.pwrite(region, b"\xff" * 8 + bytes(8) + b"\xff" * 100, 0)  # version 0: nothing else counts
    ring.reset(7)
    ready.start(ring, base=7)
    assert device.processed
    assert os.pread(region, 16 + 16 * SIZE, 0) == packed(used=7)
    assert base(ready) == 7
    assert not any(os.pread(region, inflight.stride(SIZE), inflight.stride(SIZE)))


def test_base_of_the_front_end_is_ignored(ready: Peer, ring: Ring, region: int) -> None:
    record = packed((1, 0, 5), EMPTY, (1, 0, 3), used=9)
    os.pwrite(region, record, 0)
    ring.reset(9)
    assert recovered_base(ready, ring, 60000) == 9  # the two are still to be served
    entries = (1, 0, 1), EMPTY, (1, 0, 0)
    assert os.pread(region, len(record), 0) == packed(*entries, used=9)


def test_negotiated_region_need_not_come(peer: Peer, memory: GuestMemory, ring: Ring) -> None:
    peer.share(memory)
    ring.reset(3)
    peer.start(ring, base=3)
    assert base(peer) == 3


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (packed(version=2), "expected version 1, found 2"),
        (packed(size=4), "expected number of descriptors 8, found 4"),
        (packed((255, 0, 0)), "expected inflight 0 or 1, found 255"),
    ],
)
def test_invalid_record_stops_the_vring_with_the_reason(
    ready: Peer,
    memory: GuestMemory,
    ring: Ring,
    region: int,
    device: EchoDevice,
    record: bytes,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    os.pwrite(region, record, 0)
    ready.start(ring)
    assert signalled(ring.error_fd)
    assert device.processed == 0
    assert f"vring 0 stopped until its reset: the in-flight region is invalid: {reason}" in (
        caplog.text
    )
    assert os.pread(region, len(record), 0) == record
    ring.kick()
    ready.settle()
    assert device.processed == 0
    with Ring(memory, SIZE) as other:  # the other vring has a record of its own
        ready.start(other, index=1)
        assert device.processed
    device.processed = 0
    assert base(ready) == 0
    assert ready.ask(Request.GET_VRING_BASE, VringState(1, 0).pack())
    os.pwrite(region, packed(), 0)
    ready.start(ring)
    assert device.processed
    assert not signalled(ring.error_fd)


def test_numbers_of_an_invalid_record_are_no_causes_of_their_own(
    ready: Peer, ring: Ring, region: int, caplog: pytest.LogCaptureFixture
) -> None:
    """A front-end can write another number again and again."""
    for version in range(2, 20):
        os.pwrite(region, packed(version=version), 0)
        ready.start(ring)
        assert signalled(ring.error_fd)
    (record,) = caplog.records
    assert record.getMessage().endswith("expected version 1, found 2")


def test_record_that_has_too_few_descriptors_stops_the_vring(
    ready: Peer, memory: GuestMemory, caplog: pytest.LogCaptureFixture
) -> None:
    with Ring(memory, 2 * SIZE) as ring:
        ready.start(ring)
        assert signalled(ring.error_fd)
    assert "expected a record for 16 descriptors, found room for 8" in caplog.text


def test_size_that_grows_while_the_vring_is_disabled_ends_the_record(
    ready: Peer, memory: GuestMemory, ring: Ring, caplog: pytest.LogCaptureFixture
) -> None:
    """The record has no entries for a larger ring."""
    ready.start(ring)
    for enable, size in ((0, 8 * SIZE), (1, 0)):
        assert not ready.ack(Request.SET_VRING_ENABLE, VringState(0, enable).pack())
        if size:
            assert not ready.ack(Request.SET_VRING_NUM, VringState(0, size).pack())
    assert "expected a record for 64 descriptors, found room for 8" in caplog.text
    assert signalled(ring.error_fd)


def test_record_of_another_ring_is_cleared_and_the_base_counts(
    ready: Peer, ring: Ring, region: int, caplog: pytest.LogCaptureFixture
) -> None:
    os.pwrite(region, packed((1, 9, 1), last=5, used=20000), 0)
    ring.reset(40)
    assert recovered_base(ready, ring, 42) == 42
    assert os.pread(region, 16 + 16 * SIZE, 0) == packed(last=5, used=40)
    assert "the in-flight region does not fit the used index, and was cleared" in caplog.text


def test_running_vring_refuses_a_region(ready: Peer, ring: Ring, region: int) -> None:
    ready.start(ring)
    ready.refused(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,))
    assert base(ready) == 0
    for _ in range(3):
        assert ready.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,)) == 0


def test_region_for_one_vring_leaves_the_other_without(
    ready: Peer, memory: GuestMemory, ring: Ring, region: int, device: EchoDevice
) -> None:
    one = GOOD._replace(num_queues=1, mmap_size=inflight.stride(SIZE))
    assert ready.ack(Request.SET_INFLIGHT_FD, one.pack(), (region,)) == 0
    ready.start(ring, index=1)
    assert device.processed
    assert not any(os.pread(region, PAGE, 0))


def test_reset_device_zeroes_the_region(ready: Peer, ring: Ring, region: int) -> None:
    ready.start(ring)
    os.pwrite(region, b"\xff" * 40, inflight.stride(SIZE))
    assert any(os.pread(region, PAGE, 0))
    assert not ready.ack(Request.SET_STATUS, wire.pack_u64(0))
    assert any(os.pread(region, PAGE, 0))  # QEMU sends it at each stop
    assert not ready.ack(Request.RESET_DEVICE)
    assert not any(os.pread(region, GOOD.mmap_size, 0))
    ready.start(ring)
    assert os.pread(region, 16, 0) == packed()[:16]


def test_region_is_unmapped_with_the_connection(peer: Peer, engine: Engine, region: int) -> None:
    assert peer.ack(Request.SET_INFLIGHT_FD, GOOD.pack(), (region,)) == 0
    assert "memfd:region" in Path("/proc/self/maps").read_text()
    peer.close()
    assert "memfd:region" not in Path("/proc/self/maps").read_text()


FULL = packed(*[(1, 0, 8 - n) for n in range(8)])
PUBLISHED = packed(EMPTY, (1, 0, 9), (1, 7, 7), EMPTY, EMPTY, (0, 2, 8), last=5)

# Records: (content, used index of the ring, what follows from it)


@pytest.mark.parametrize(
    ("content", "used", "base", "expected"),
    [
        (packed(), 0, 0, Recovery(0, (), 0, False)),
        (packed(used=65535), 65535, 3, Recovery(65535, (), 0, False)),
        (FULL, 0, 0, Recovery(8, (7, 6, 5, 4, 3, 2, 1, 0), 0, False)),
        (packed((1, 0, 2**64 - 1), (1, 0, 0), used=65535), 65535, 0, Recovery(1, (1, 0), 0, False)),
        # Published, and in part still marked: 2 and 5 are done, 1 is to be served again.
        (PUBLISHED, 2, 0, Recovery(3, (1,), 5, False)),
        (packed((1, 9, 1), last=0, used=65535), 0, 0, Recovery(0, (), 0, False)),
        # A used index that does not fit.
        (packed((1, 0, 1), used=100), 0, 77, Recovery(77, (), 0, True)),
        (packed((1, 0, 1), used=0), 9, 77, Recovery(77, (), 0, True)),
        # Fresh: what the base skipped was never taken.
        (packed(version=0), 5, 5, Recovery(5, (), 0, False)),
        (packed(version=0), 5, 13, Recovery(5, (), 0, False)),
        (packed(version=0), 5, 14, Recovery(14, (), 0, False)),
        (packed(version=0), 5, 4, Recovery(4, (), 0, False)),
    ],
)  # fmt: skip
def test_record_is_recovered(
    record: inflight.Record, region: int, content: bytes, used: int, base: int, expected: Recovery
) -> None:
    os.pwrite(region, content, 0)
    assert record.recover(SIZE, used, base) == expected
    again = record.recover(SIZE, used, base)
    assert again == expected._replace(base=again.base, cleared=False)
    if not expected.cleared and expected.heads:
        assert again == expected


@pytest.mark.parametrize(
    ("content", "used", "reason"),
    [
        (packed(features=1), 0, "expected feature bits 0, found 1"),
        (packed(version=0xFFFF), 0, "expected version 1, found 65535"),
        (packed(size=0), 0, "expected number of descriptors 8, found 0"),
        (packed(size=16), 0, "expected number of descriptors 8, found 16"),
        (packed(last=8), 0, "expected a head below 8, found 8"),
        (packed(last=65535), 1, "expected a head below 8, found 65535"),
        (packed((1, 8, 0)), 2, "expected a head below 8, found 8"),
        (packed((1, 1, 0), (1, 0, 0)), 3, "found a loop at 0"),
        (packed((1, 0, 0)), 2, "found a loop at 0"),
        (packed((2, 0, 0)), 0, "expected inflight 0 or 1, found 2"),
        (packed((1, 0, 5), (1, 0, 5)), 0, "expected different counters"),
        (packed(*[(1, 0, 0)] * 8), 0, "expected different counters"),
    ],
)
def test_invalid_record_is_refused_and_left(
    record: inflight.Record, region: int, content: bytes, used: int, reason: str
) -> None:
    os.pwrite(region, content, 0)
    with pytest.raises(InvalidRecordError, match=reason):
        record.recover(SIZE, used, 0)
    assert os.pread(region, len(content), 0) == content


@pytest.mark.parametrize("queue_size", [1, 2, 3, 7, 8, 64, 1024, 32768])
def test_stride_has_room_for_either_ring_format(queue_size: int) -> None:
    stride = inflight.stride(queue_size)
    assert stride >= max(16 + 16 * queue_size, 32 + 32 * queue_size)
    assert stride % 64 == 0
