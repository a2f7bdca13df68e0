# SPDX-License-Identifier: Apache-2.0
"""Dirty logging: its messages, in the orders of front-ends, and what is marked meanwhile.

Without an offer, QEMU sends them for calc-dirty-rate all the same.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.support.dirty import DirtyMap, changed_pages, log_size, pages_of, snapshot
from tests.support.peer import OFFERED, PAGE, EchoDevice, Peer, addresses, open_fds, signalled
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.interfaces import Keeper
from vhost_rpmb.vhost_user.wire import LogDescription, ProtocolFeature, Request, VringState
from vhost_rpmb.virtio.limits import LOG_ADDRESS_END

WITH_LOG = PROTOCOL_FEATURES | ProtocolFeature.LOG_SHMFD
ALL = wire.pack_u64(OFFERED | wire.F_LOG_ALL)
NOT_ALL = wire.pack_u64(OFFERED)
ANSWER = 100  # bytes


class Writer(EchoDevice):
    """A device that fills the writable buffers of each chain."""

    def process(self, queue: Any) -> int:
        super().process(queue)
        flags: int = queue.answer_chains(lambda _request, room: b"w" * room, 1 << 20, 4)
        return flags


# Without an offer


@pytest.mark.parametrize("protocol_features", [PROTOCOL_FEATURES, 0], ids=["negotiated", "none"])
@pytest.mark.parametrize("size", [wire.U64_SIZE, wire.LOG_SIZE])
@pytest.mark.parametrize("fds", [0, 1])
def test_log_base_is_ignored(
    fresh: Peer, memfd: int, protocol_features: int, size: int, fds: int
) -> None:
    fresh.negotiate(protocol_features)
    before = open_fds()
    assert fresh.ask(Request.SET_LOG_BASE, bytes(size), (memfd,) * fds) is None
    assert fresh.end is None
    assert open_fds() == before
    if protocol_features:
        assert fresh.ack(Request.SET_LOG_BASE, bytes(size), (memfd,) * fds) == 0
        assert fresh.reply() is None
    assert fresh.ask_u64(Request.GET_FEATURES) == OFFERED


def test_log_fd_is_refused(peer: Peer, eventfds: list[int]) -> None:
    peer.refused(Request.SET_LOG_FD, b"", (eventfds[0],))


# With LOG_SHMFD


class Guest:
    """A front-end with a log, and its guest, which sends requests on vring 0."""

    def __init__(self, peer: Peer, ring: Ring, log: DirtyMap) -> None:
        self.peer = peer
        self.ring = ring
        self.log = log
        self._buffer = ring.memory.allocate(ANSWER)

    def set_base(self, log: DirtyMap | None = None) -> None:
        self.log = log or self.log
        payload = self.log.description.pack()
        assert self.peer.ask(Request.SET_LOG_BASE, payload, (self.log.fd,)) == payload
        assert self.peer.reply() is None

    def log_all(self, on: bool) -> None:
        assert not self.peer.ack(Request.SET_FEATURES, ALL if on else NOT_ALL)

    def log_ring(self, on: bool, place: int | None = None) -> None:
        place = self.ring.used_ring if place is None else place
        flags = wire.VRING_ADDRESS_LOG if on else 0
        payload = addresses(self.ring, flags=flags)._replace(log=place).pack()
        assert not self.peer.ack(Request.SET_VRING_ADDR, payload)

    def request(self, count: int = 1) -> set[int]:
        """Have requests answered; return the pages that changed meanwhile."""
        memory, ring = self.ring.memory, self.ring
        memory.write(self._buffer, bytes(ANSWER))
        for _ in range(count):
            ring.add([], [Segment(self._buffer, ANSWER)])
        ring.publish()
        before = snapshot(memory)
        ring.kick()
        self.peer.settle()
        assert [used.length for used in ring.collect()] == [ANSWER] * count
        return changed_pages(memory, before)

    @property
    def answer_pages(self) -> set[int]:
        return pages_of([(self._buffer, ANSWER)])

    @property
    def ring_pages(self) -> set[int]:
        return pages_of([(self.ring.used_ring, 6 + 8 * self.ring.size)])


@pytest.fixture
def device() -> EchoDevice:
    return Writer()


@pytest.fixture
def logging_peer(engine: Engine, device: EchoDevice, keeper: Keeper | None) -> Iterator[Peer]:
    peer = Peer(engine, device, keeper, WITH_LOG)
    peer.negotiate(WITH_LOG & ~ProtocolFeature.GPA_ADDRESSES)
    yield peer
    peer.close()


@pytest.fixture
def log(memory: GuestMemory, _no_descriptor_leaks: None) -> Iterator[DirtyMap]:
    with DirtyMap(log_size(memory)) as log:
        yield log


@pytest.fixture
def guest(logging_peer: Peer, memory: GuestMemory, log: DirtyMap) -> Iterator[Guest]:
    """A running vring, and the used ring on a page of its own."""
    memory.allocate(PAGE - 8 * 16 - 6 - 2 * 8 - 4)
    with Ring(memory, 8) as ring:
        memory.allocate(PAGE)
        logging_peer.share(memory)
        logging_peer.start(ring)
        yield Guest(logging_peer, ring, log)


@pytest.mark.parametrize("flags", [0, wire.FLAG_NEED_REPLY], ids=["plain", "need-reply"])
def test_log_base_is_answered_by_its_description(
    logging_peer: Peer, log: DirtyMap, flags: int
) -> None:
    payload = log.description.pack()
    for _ in range(3):
        logging_peer.send(Request.SET_LOG_BASE, payload, (log.fd,), flags)
        assert logging_peer.reply() == payload
        assert logging_peer.reply() is None
    assert logging_peer.end is None


@pytest.mark.parametrize("flags", [0, wire.FLAG_NEED_REPLY], ids=["plain", "need-reply"])
@pytest.mark.parametrize(
    ("description", "reason"),
    [
        ((0, 0), "empty"),
        ((1 << 63, 0), "end of its file"),
        ((1 << 62, 1 << 63), "end of its file"),
        ((PAGE, 2**64 - PAGE), "end of its file"),
        ((16 * PAGE + 1, 0), "end of its file"),
        ((PAGE, 16 * PAGE), "end of its file"),
        ((PAGE, 15 * PAGE + 1), "end of its file"),
    ],
)
def test_invalid_log_ends_the_connection(
    logging_peer: Peer, memfd: int, flags: int, description: tuple[int, int], reason: str
) -> None:
    """No reply could say that it failed."""
    payload = LogDescription(*description).pack()
    logging_peer.ends(reason, Request.SET_LOG_BASE, payload, (memfd,), flags)


@pytest.mark.parametrize("flags", [0, wire.FLAG_NEED_REPLY], ids=["plain", "need-reply"])
@pytest.mark.parametrize("size", [0, 8, 15, 17, 24])
def test_other_description_ends_the_connection(
    logging_peer: Peer, memfd: int, flags: int, size: int
) -> None:
    reason = f"a payload of 16 bytes, found {size}"
    logging_peer.ends(reason, Request.SET_LOG_BASE, bytes(size), (memfd,), flags)


@pytest.mark.parametrize("flags", [0, wire.FLAG_NEED_REPLY], ids=["plain", "need-reply"])
@pytest.mark.parametrize(("count", "reason"), [(0, "expected 1 file"), (2, "expected 0 or 1 file")])
def test_other_number_of_logs_ends_the_connection(
    logging_peer: Peer, log: DirtyMap, flags: int, count: int, reason: str
) -> None:
    payload = log.description.pack()
    logging_peer.ends(reason, Request.SET_LOG_BASE, payload, (log.fd,) * count, flags)


@pytest.mark.parametrize("kind", ["pipe", "directory", "eventfd", "read-only", "socket"])
def test_descriptor_that_cannot_be_a_log_ends_the_connection(
    logging_peer: Peer, memfd: int, eventfds: list[int], kind: str
) -> None:
    made: list[int] = []
    if kind == "pipe":
        made = list(os.pipe())
    elif kind == "directory":
        made = [os.open("/dev/shm", os.O_RDONLY)]
    elif kind == "read-only":
        made = [os.open(f"/proc/self/fd/{memfd}", os.O_RDONLY)]
    fd = {"eventfd": eventfds[0], "socket": logging_peer.sock.fileno()}.get(kind) or made[0]
    payload = LogDescription(PAGE, 0).pack()
    logging_peer.ends("SET_LOG_BASE", Request.SET_LOG_BASE, payload, (fd,))
    for each in made:
        os.close(each)


def test_pages_are_marked_from_the_acknowledgement_on(guest: Guest) -> None:
    """In QEMU's order, on a running ring, with requests between all messages."""
    for _ in range(2):
        guest.request()
        guest.set_base()
        guest.request()
        assert guest.log.take() == set()
        guest.log_all(True)
        assert guest.request() & guest.answer_pages
        assert guest.log.take() == guest.answer_pages
        guest.log_ring(True)
        for _ in range(10):
            changed = guest.request()
            marked = guest.log.take()
            assert changed <= marked
            assert marked == guest.answer_pages | guest.ring_pages
        guest.log_all(False)
        guest.request()
        assert guest.log.take() == guest.ring_pages
        guest.log_ring(False)
        guest.request()
        assert guest.log.take() == set()
    assert not signalled(guest.ring.error_fd)


def test_each_round_may_have_a_new_log(guest: Guest) -> None:
    """In Cloud Hypervisor's order; the reply says that the earlier log is not used any more."""
    guest.set_base()
    guest.log_all(True)
    guest.log_ring(True)
    for _ in range(3):
        before = guest.log
        before.take()
        with DirtyMap(log_size(guest.ring.memory), offset=5) as log:
            guest.set_base(log)
            assert mappings(before) == 1  # our own
            assert guest.request(3) <= log.pages
            assert before.pages == set()
            assert log.take() == guest.answer_pages | guest.ring_pages
            guest.set_base(before)
            assert mappings(log) == 1
    peer, ring = guest.peer, guest.ring
    assert not peer.ack(Request.SET_VRING_ENABLE, VringState(0, 0).pack())
    assert peer.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 9).pack()
    guest.set_base()
    assert peer.ask(Request.GET_FEATURES)
    assert not signalled(ring.error_fd)


def mappings(log: DirtyMap) -> int:
    inode = str(os.fstat(log.fd).st_ino)
    with open("/proc/self/maps") as maps:
        return sum(line.split()[4] == inode and "dirty-log" in line for line in maps)


def test_log_that_ends_is_unmapped(guest: Guest) -> None:
    guest.set_base()
    assert mappings(guest.log) == 2
    guest.peer.send(Request.SET_OWNER)
    guest.peer.send(Request.SET_OWNER)  # a new session
    assert mappings(guest.log) == 1


def test_log_outlives_a_reset(guest: Guest) -> None:
    guest.set_base()
    guest.log_all(True)
    guest.log_ring(True)
    assert not guest.peer.ack(Request.RESET_DEVICE)
    guest.ring.reset()
    guest.peer.start(guest.ring)
    guest.log.take()
    guest.request()
    assert guest.log.take() == guest.answer_pages  # the flag of the ring was reset with it


def test_features_without_a_log_have_no_effect(guest: Guest) -> None:
    guest.log_all(True)
    guest.log_ring(True)
    guest.request()
    guest.set_base()
    guest.request()
    assert guest.log.take() == guest.answer_pages | guest.ring_pages


def test_ring_is_marked_at_its_log_address(guest: Guest) -> None:
    guest.set_base()
    guest.log_ring(True, 5 * PAGE)
    guest.request()
    assert guest.log.take() == {5}


def test_ring_that_starts_is_marked(guest: Guest) -> None:
    """Another process may have written to it before, and was killed before it marked that."""
    guest.set_base()
    guest.log_ring(True)
    assert not guest.peer.ack(Request.SET_VRING_ENABLE, VringState(0, 0).pack())
    guest.log.take()
    assert not guest.peer.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
    assert guest.log.take() == guest.ring_pages


def test_position_stays_on_a_running_ring(guest: Guest) -> None:
    for number in range(1, 20):
        guest.log_ring(bool(number % 2))
        guest.log_all(bool(number % 3))
        guest.request()
    assert guest.peer.ask(Request.GET_VRING_BASE, bytes(8)) == VringState(0, 19).pack()


@pytest.mark.parametrize("place", [LOG_ADDRESS_END, 2**64 - 1])
def test_log_address_beyond_every_log_is_refused(guest: Guest, place: int) -> None:
    payload = addresses(guest.ring, flags=wire.VRING_ADDRESS_LOG)._replace(log=place)
    guest.peer.refused(Request.SET_VRING_ADDR, payload.pack())
    assert not guest.peer.ack(Request.SET_VRING_ADDR, payload._replace(flags=0).pack())
    guest.request()


def test_log_without_room_is_reported_once(
    guest: Guest, caplog: pytest.LogCaptureFixture, memory: GuestMemory
) -> None:
    with DirtyMap(1) as log:
        guest.set_base(log)
        guest.log_all(True)
        guest.log_ring(True)
        for _ in range(3):
            guest.request()
        assert log.pages == set()
        (record,) = caplog.records
        assert "the dirty log is not complete: it has no bit" in record.getMessage()
        guest.set_base(log)
        guest.peer.close()


def test_truncated_log_is_reported_once(guest: Guest, caplog: pytest.LogCaptureFixture) -> None:
    guest.set_base()
    guest.log_all(True)
    os.ftruncate(guest.log.fd, 0)
    for _ in range(3):
        guest.request()
    (record,) = caplog.records
    assert "the dirty log is not complete: the file behind it was" in record.getMessage()
    with DirtyMap(log_size(guest.ring.memory)) as log:
        guest.set_base(log)
        guest.request()
        assert log.take() == guest.answer_pages
        guest.peer.close()


# SET_LOG_FD


def test_log_fd_is_signalled_after_each_batch_that_marks(
    guest: Guest, eventfds: list[int], device: Writer
) -> None:
    assert not guest.peer.ack(Request.SET_LOG_FD, b"", (eventfds[0],))
    guest.request()
    assert not signalled(eventfds[0])
    guest.set_base()
    guest.request()
    assert not signalled(eventfds[0])
    guest.log_all(True)
    before = device.processed
    guest.request(8)  # two batches
    batches = device.processed - before
    assert batches >= 2
    assert 2 <= os.eventfd_read(eventfds[0]) <= batches
    assert guest.log.take() == guest.answer_pages
    assert not guest.peer.ack(Request.SET_LOG_FD, b"", (eventfds[1],))
    guest.request()
    assert not signalled(eventfds[0])
    assert signalled(eventfds[1])


@pytest.mark.parametrize("blocking", [False, True])
def test_full_log_fd_makes_nobody_wait(guest: Guest, eventfds: list[int], blocking: bool) -> None:
    os.set_blocking(eventfds[0], blocking)
    os.eventfd_write(eventfds[0], 2**64 - 2)
    assert not guest.peer.ack(Request.SET_LOG_FD, b"", (eventfds[0],))
    guest.set_base()
    guest.log_all(True)
    for _ in range(3):
        guest.request()
    assert os.eventfd_read(eventfds[0]) == 2**64 - 2


@pytest.mark.parametrize("kind", ["memory", "pipe"])
def test_log_fd_of_another_kind_is_refused(logging_peer: Peer, memfd: int, kind: str) -> None:
    made = os.pipe() if kind == "pipe" else ()
    logging_peer.refused(Request.SET_LOG_FD, b"", (made[1] if made else memfd,))
    for fd in made:
        os.close(fd)


# GPA_ADDRESSES


def test_log_has_guest_addresses_with_gpa_addresses(
    engine: Engine, device: EchoDevice, memory: GuestMemory, log: DirtyMap
) -> None:
    """As all other addresses then are."""
    peer = Peer(engine, device, None, WITH_LOG)
    with suppress(EOFError), Ring(memory, 8) as ring:
        peer.negotiate(WITH_LOG)
        peer.share(memory)
        guest = Guest(peer, ring, log)
        guest.set_base()
        guest.log_all(True)
        parts = (ring.descriptor_table, ring.used_ring, ring.available_ring, ring.used_ring)
        place = wire.VringAddress(0, wire.VRING_ADDRESS_LOG, *parts)
        assert not peer.ack(Request.SET_VRING_NUM, VringState(0, 8).pack())
        assert not peer.ack(Request.SET_VRING_ADDR, place.pack())
        assert not peer.ack(Request.SET_VRING_KICK, wire.pack_u64(0), (ring.kick_fd,))
        assert not peer.ack(Request.SET_VRING_ENABLE, VringState(0, 1).pack())
        log.take()
        changed = guest.request()
        assert changed <= log.pages
        assert log.take() == guest.answer_pages | guest.ring_pages
    peer.close()
