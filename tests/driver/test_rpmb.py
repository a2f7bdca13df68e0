# SPDX-License-Identifier: Apache-2.0
"""The client: its parts by themselves, and all of it against a daemon over a real socket."""

import os
import secrets
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from tests.support.rig import PATIENCE
from vhost_rpmb._pure.mac import Authenticator, Frame
from vhost_rpmb.driver import messages
from vhost_rpmb.driver.errors import (
    BackendError,
    QueueError,
    RequestRefusedError,
    RpmbResultError,
    VerificationError,
    result_name,
)
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES, Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment, Used
from vhost_rpmb.driver.rpmb import FEATURES, Answer, RpmbClient, Setup
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, ProtocolFeature, Request
from vhost_rpmb.virtio import spec as virtio

KEY = bytes(range(32))
OTHER_KEY = bytes(32)
NONCE = bytes(range(16))
KIB = 1 << 10
MIB = 1 << 20

VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
INDIRECT = 1 << virtio.VIRTIO_F_INDIRECT_DESC
EVENT_IDX = 1 << virtio.VIRTIO_F_EVENT_IDX

# Two that adjoin in guest physical but not in user addresses, and one apart; with file offsets.
THREE_REGIONS = (
    MemoryRegion(0x0010_0000, MIB, 0x7F00_0000_0000, 0),
    MemoryRegion(0x0020_0000, MIB, 0x6F00_0000_0000, 64 * KIB),
    MemoryRegion(0x1_0000_0000, MIB, 0x6E00_0000_0000, 4 * KIB),
)


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def no_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


# Guest memory


@pytest.mark.usefixtures("no_leaks")
class TestMemory:
    def test_allocations_are_aligned_disjoint_and_inside_one_region(self) -> None:
        with GuestMemory(THREE_REGIONS) as memory:
            taken = []
            for size in (1, 7, 4096, 600 * KIB, 600 * KIB, 600 * KIB):
                address = memory.allocate(size, 16)
                assert address % 16 == 0
                taken.append((address, address + size))
                assert any(
                    region.start <= address and address + size <= region.end
                    for region in memory.regions
                )
            taken.sort()
            assert all(low[1] <= high[0] for low, high in pairwise(taken))
            with pytest.raises(MemoryError, match="no 614400 free bytes"):
                memory.allocate(600 * KIB)

    def test_what_is_freed_can_be_had_again_whole(self) -> None:
        with GuestMemory(THREE_REGIONS) as memory:
            addresses = [memory.allocate(256 * KIB) for _ in range(12)]
            for address in addresses[::2] + addresses[1::2]:
                memory.free(address)
            for size in (768 * KIB, MIB):
                addresses = sorted(memory.allocate(size) for _ in range(3))
                assert addresses == [region.guest_address for region in THREE_REGIONS]
                for address in addresses:
                    memory.free(address)

    def test_reserve_takes_exact_bytes_across_adjoining_regions_once(self) -> None:
        with GuestMemory(THREE_REGIONS) as memory:
            memory.reserve(0x0020_0000 - 100, 512)
            with pytest.raises(MemoryError, match="not free"):
                memory.reserve(0x0020_0000 + 411, 2)
            memory.reserve(0x0020_0000 + 412, 2)
            with pytest.raises(MemoryError, match="not free"):  # a hole between regions
                memory.reserve(0x0030_0000 - 1, 2)
            memory.free(0x0020_0000 - 100)
            memory.reserve(0x0020_0000 - 100, 512)

    def test_reads_and_writes_span_adjoining_regions(self) -> None:
        data = secrets.token_bytes(1000)
        with GuestMemory(THREE_REGIONS) as memory:
            memory.write(0x0020_0000 - 300, data)
            assert memory.read(0x0020_0000 - 300, 1000) == data
            assert memory.read(0x0020_0000, 700) == data[300:]
            with pytest.raises(IndexError, match="in no memory region"):
                memory.read(0x0030_0000 - 10, 11)

    def test_the_descriptor_shows_the_same_bytes_from_the_mmap_offset_on(self) -> None:
        with GuestMemory(THREE_REGIONS) as memory:
            memory.write(0x0020_0010, b"shared")
            assert os.pread(memory.regions[1].fd, 6, 64 * KIB + 0x10) == b"shared"
            assert memory.user_address(0x0020_0010) == 0x6F00_0000_0010

    def test_16_bit_accesses_are_little_endian(self) -> None:
        with GuestMemory() as memory:
            address = memory.allocate(4, 2)
            memory.store16(address + 2, 0x1234)
            assert memory.read(address, 4) == b"\0\0\x34\x12"
            memory.write(address, b"\xcd\xab")
            assert memory.load16(address) == 0xABCD

    def test_a_region_that_cannot_be_mapped_leaves_nothing_open(self) -> None:
        with pytest.raises((OSError, ValueError)):
            GuestMemory((THREE_REGIONS[0], MemoryRegion(0, 4 * KIB, 0, 1)))


# The ring


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory() as memory:
        yield memory


@pytest.fixture
def ring(memory: GuestMemory) -> Iterator[Ring]:
    with Ring(memory, 8, features=FEATURES) as ring:
        yield ring


def use(ring: Ring, head: int, length: int) -> None:
    """Play the device: append a used element."""
    index = ring.used_index
    place = ring.used_ring + 4 + 8 * (index % ring.size)
    ring.memory.write(place, struct.pack("<II", head, length))
    ring.memory.store16(ring.used_ring + 2, (index + 1) & 0xFFFF)


@pytest.mark.usefixtures("no_leaks")
class TestRing:
    def test_a_direct_chain_as_the_specification_lays_it_out(self, memory: GuestMemory) -> None:
        with Ring(memory, 8) as ring:
            head = ring.add([Segment(0x100, 5), Segment(0x200, 6)], [Segment(0x300, 7)])
            table = memory.read(ring.descriptor_table, 8 * 16)
            found = [struct.unpack_from("<QIHH", table, 16 * head)]
            while found[-1][2] & virtio.VIRTQ_DESC_F_NEXT:
                found.append(struct.unpack_from("<QIHH", table, 16 * found[-1][3]))
            assert [entry[:3] for entry in found] == [
                (0x100, 5, virtio.VIRTQ_DESC_F_NEXT),
                (0x200, 6, virtio.VIRTQ_DESC_F_NEXT),
                (0x300, 7, virtio.VIRTQ_DESC_F_WRITE),
            ]
            assert memory.read(ring.available_ring, 4) == bytes(4)  # not yet available
            assert ring.publish()
            assert memory.read(ring.available_ring, 6) == struct.pack("<HHH", 0, 1, head)
            assert ring.free_descriptors == 5

    def test_an_indirect_chain_takes_one_descriptor_and_gives_its_table_back(
        self, ring: Ring
    ) -> None:
        segments = [Segment(0x100 * number, number) for number in range(1, 20)]
        head = ring.add(segments[:10], segments[10:])
        assert ring.free_descriptors == 7
        raw = ring.memory.read(ring.descriptor_table + 16 * head, 16)
        table, length, flags, _ = struct.unpack("<QIHH", raw)
        assert (length, flags) == (19 * 16, virtio.VIRTQ_DESC_F_INDIRECT)
        entries = list(struct.iter_unpack("<QIHH", ring.memory.read(table, length)))
        assert [Segment(*entry[:2]) for entry in entries] == segments
        assert [entry[2] for entry in entries] == [1] * 10 + [3] * 8 + [2]
        assert [entry[3] for entry in entries[:-1]] == list(range(1, 19))
        ring.publish()
        use(ring, head, 0)
        assert [used.head for used in ring.collect()] == [head]
        assert ring.free_descriptors == 8
        with pytest.raises(KeyError):
            ring.memory.free(table)

    def test_a_full_ring_takes_no_more_and_works_again_after_answers(
        self, memory: GuestMemory
    ) -> None:
        with Ring(memory, 4) as ring:
            for _ in range(2):
                ring.add([Segment(0, 1)], [Segment(0, 1)])
            with pytest.raises(QueueError, match="0 of 4 descriptors are free"):
                ring.add([Segment(0, 1)])
            ring.publish()
            use(ring, 0, 1)
            ring.collect()
            ring.add([Segment(0, 1)], [Segment(0, 1)])

    @pytest.mark.parametrize(
        ("event", "new", "old", "wanted"),
        [
            (0, 1, 0, True),
            (1, 1, 0, False),
            (65535, 1, 0, False),
            (4, 5, 0, True),
            (5, 5, 0, False),
            (65535, 0, 65535, True),
            (0, 0, 65535, False),
            (1, 3, 65534, True),
            (3, 3, 65534, False),
        ],
    )
    def test_event_index_decides_about_the_kick(
        self, memory: GuestMemory, event: int, new: int, old: int, wanted: bool
    ) -> None:
        with Ring(memory, 8, features=EVENT_IDX, first_index=old) as ring:
            memory.store16(ring.used_ring + 4 + 8 * 8, event)
            for _ in range((new - old) & 0xFFFF):
                ring.add([Segment(0, 1)])
            assert ring.publish() is wanted
            assert memory.load16(ring.available_ring + 2) == new

    @pytest.mark.parametrize(("flags", "wanted"), [(0, True), (1, False)])
    def test_without_event_index_the_flag_decides_about_the_kick(
        self, memory: GuestMemory, flags: int, wanted: bool
    ) -> None:
        with Ring(memory, 8) as ring:
            memory.store16(ring.used_ring, flags)
            ring.add([Segment(0, 1)])
            assert ring.publish() is wanted

    def test_an_answer_wakes_the_sleeper(self, ring: Ring) -> None:
        head = ring.add([Segment(0, 1)], [Segment(0, 9)])
        ring.publish()

        def answer() -> None:
            time.sleep(0.05)
            use(ring, head, 9)
            os.eventfd_write(ring.call_fd, 1)

        device = threading.Thread(target=answer)
        device.start()
        assert ring.wait(PATIENCE) == [(head, 9)]
        device.join()
        assert ring.memory.load16(ring.available_ring + 4 + 2 * 8) == 0  # used_event

    @pytest.mark.parametrize("features", [0, EVENT_IDX])
    def test_calls_can_be_suppressed(self, memory: GuestMemory, features: int) -> None:
        with Ring(memory, 8, features=features) as ring:
            ring.suppress_calls()
            flags = memory.load16(ring.available_ring)
            used_event = memory.load16(ring.available_ring + 4 + 2 * 8)
            assert (flags, used_event) == ((0, 0xFFFF) if features else (1, 0))

    def test_silence_ends_in_an_error(self, ring: Ring) -> None:
        ring.add([Segment(0, 1)])
        ring.publish()
        started = time.monotonic()
        with pytest.raises(BackendError, match=r"within 0\.1 s; 1 in flight"):
            ring.wait(0.1)
        assert time.monotonic() - started >= 0.1

    def test_the_end_of_the_peer_is_noticed(self, ring: Ring) -> None:
        ours, theirs = socket.socketpair()
        with ours:
            theirs.close()
            with pytest.raises(BackendError, match="closed the connection"):
                ring.wait(PATIENCE, peer=ours.fileno())

    def test_the_error_eventfd_is_noticed_but_answers_come_first(self, ring: Ring) -> None:
        head = ring.add([Segment(0, 1)])
        ring.publish()

        def answer_and_break() -> None:
            use(ring, head, 0)
            os.eventfd_write(ring.error_fd, 1)

        device = threading.Timer(0.05, answer_and_break)
        device.start()
        assert ring.wait(PATIENCE) == [(head, 0)]
        device.join()
        with pytest.raises(QueueError, match="reports the queue broken"):
            ring.wait(PATIENCE)

    def test_a_used_index_that_runs_away_is_refused(self, ring: Ring) -> None:
        head = ring.add([Segment(0, 1)])
        ring.publish()
        use(ring, head, 0)
        use(ring, head, 0)
        with pytest.raises(QueueError, match="moved by 2, but only 1"):
            ring.collect()

    @pytest.mark.parametrize("head", [3, 8, 0xFFFF_FFFF])
    def test_a_head_that_is_not_in_flight_is_refused(self, ring: Ring, head: int) -> None:
        assert ring.add([Segment(0, 1)]) == 0
        ring.publish()
        use(ring, head, 0)
        with pytest.raises(QueueError, match=f"head index {head}: not in flight"):
            ring.collect()

    def test_more_bytes_than_there_was_room_for_are_refused(self, ring: Ring) -> None:
        head = ring.add([Segment(0, 100)], [Segment(0, 9)])
        ring.publish()
        use(ring, head, 10)
        with pytest.raises(QueueError, match="at most 9 bytes written, found 10"):
            ring.collect()

    def test_what_was_offered_raw_comes_back_as_often_as_it_was_offered(self, ring: Ring) -> None:
        ring.offer(0xBEEF)
        ring.offer(0xBEEF)
        ring.publish()
        assert ring.memory.read(ring.available_ring + 2, 6) == struct.pack("<HHH", 2, *[0xBEEF] * 2)
        use(ring, 0xBEEF, 0)
        use(ring, 0xBEEF, 0)
        assert ring.collect() == [(0xBEEF, 0)] * 2
        assert ring.in_flight == 0

    def test_closing_gives_everything_back(self, memory: GuestMemory) -> None:
        with Ring(memory, 256, features=FEATURES) as ring:
            ring.add([Segment(0, 1), Segment(0, 1)])
        assert memory.allocate(4 * MIB) == memory.regions[0].start


# Verification of answers


def signed(*frames: Frame, key: bytes = KEY) -> bytes:
    packed = [frame.pack() for frame in frames]
    mac = Authenticator(key).mac(packed)
    packed[-1] = packed[-1][: spec.FRAME_KEY_MAC] + mac + packed[-1][spec.FRAME_DATA :]
    return b"".join(packed)


AUTHENTICATOR = Authenticator(KEY)
COUNTER_FRAME = Frame(nonce=NONCE, write_counter=7, req_resp=0x0200)
WRITE_FRAME = Frame(write_counter=8, address=3, req_resp=0x0300)
READ_FRAME = Frame(data=bytes([1]) * 256, nonce=NONCE, address=3, block_count=2, req_resp=0x0400)


def check_counter(answer: bytes) -> int:
    return messages.check_counter(answer, NONCE, AUTHENTICATOR)


def check_write(answer: bytes) -> int:
    return messages.check_write(answer, 3, 7, AUTHENTICATOR)


def check_read(answer: bytes) -> bytes:
    return messages.check_read(answer, 3, 2, NONCE, AUTHENTICATOR)


class TestVerification:
    def test_good_answers_are_taken(self) -> None:
        assert check_counter(signed(COUNTER_FRAME)) == 7
        assert check_write(signed(WRITE_FRAME)) == 8
        second = READ_FRAME._replace(data=bytes([2]) * 256)
        assert check_read(signed(READ_FRAME, second)) == bytes([1]) * 256 + bytes([2]) * 256
        messages.check_program_key(signed(Frame(req_resp=0x0100)), AUTHENTICATOR)

    def test_without_a_key_everything_but_the_mac_is_checked(self) -> None:
        answer = signed(COUNTER_FRAME, key=OTHER_KEY)
        assert messages.check_counter(answer, NONCE, None) == 7
        with pytest.raises(VerificationError, match="nonce"):
            messages.check_counter(answer, bytes(16), None)

    @pytest.mark.parametrize("length", [0, 1, 511, 513])
    def test_lengths_that_are_no_frames(self, length: int) -> None:
        with pytest.raises(VerificationError, match=f"expected an answer of 512 .* found {length}"):
            check_counter(bytes(length))

    @pytest.mark.parametrize("count", [1, 3])
    def test_another_number_of_frames(self, count: int) -> None:
        with pytest.raises(VerificationError, match=f"expected number of frames 2, found {count}"):
            check_read(signed(*[READ_FRAME] * count))

    @pytest.mark.parametrize(
        ("check", "frame", "field"),
        [
            (check_counter, COUNTER_FRAME._replace(req_resp=0x0400), "req_resp"),
            (check_counter, COUNTER_FRAME._replace(req_resp=0), "req_resp"),
            (check_counter, COUNTER_FRAME._replace(nonce=bytes(16)), "nonce"),
            (check_write, WRITE_FRAME._replace(write_counter=7), "write_counter"),
            (check_write, WRITE_FRAME._replace(write_counter=9), "write_counter"),
            (check_write, WRITE_FRAME._replace(address=4), "address"),
            (check_write, WRITE_FRAME._replace(req_resp=0x0100), "req_resp"),
            (check_write, WRITE_FRAME._replace(nonce=NONCE), "nonce"),
        ],
    )
    def test_a_wrong_field_under_a_good_mac(
        self, check: Callable[[bytes], object], frame: Frame, field: str
    ) -> None:
        with pytest.raises(VerificationError, match=field):
            check(signed(frame))

    @pytest.mark.parametrize("position", [0, 1])
    @pytest.mark.parametrize(
        "wrong",
        [
            READ_FRAME._replace(nonce=bytes(16)),
            READ_FRAME._replace(address=4),
            READ_FRAME._replace(block_count=1),
            READ_FRAME._replace(req_resp=0x0200),
            READ_FRAME._replace(result=1),
        ],
    )
    def test_a_wrong_field_in_any_frame_of_a_read(self, position: int, wrong: Frame) -> None:
        frames = [READ_FRAME, READ_FRAME]
        frames[position] = wrong
        with pytest.raises(VerificationError):
            check_read(signed(*frames))

    @pytest.mark.parametrize("offset", [228, 484, 503, 512 + 196, 512 + 228, 1023])
    def test_any_changed_byte_of_a_read(self, offset: int) -> None:
        answer = bytearray(signed(READ_FRAME, READ_FRAME))
        answer[offset] ^= 1
        with pytest.raises(VerificationError):
            check_read(bytes(answer))

    def test_a_mac_by_another_key(self) -> None:
        with pytest.raises(VerificationError, match="MAC"):
            check_counter(signed(COUNTER_FRAME, key=OTHER_KEY))

    @pytest.mark.parametrize(
        ("result", "name"),
        [
            (1, "GENERAL_FAILURE"),
            (2, "AUTH_FAILURE"),
            (3, "COUNT_FAILURE"),
            (4, "ADDR_FAILURE"),
            (5, "WRITE_FAILURE"),
            (6, "READ_FAILURE"),
            (7, "NO_AUTH_KEY"),
            (0x85, "WRITE_FAILURE, WRITE_COUNTER_EXPIRED"),
            (8, "unknown result"),
        ],
    )
    def test_failures_carry_the_specification_s_name(self, result: int, name: str) -> None:
        with pytest.raises(RpmbResultError) as caught:
            check_read(signed(READ_FRAME._replace(result=result)))
        assert str(caught.value) == f"DATA_READ failed: {name} (result 0x{result:04x})"
        assert caught.value.result == result
        assert caught.value.authenticated

    def test_a_failure_says_whether_it_was_authenticated(self) -> None:
        failure = Frame(result=spec.VIRTIO_RPMB_RES_GENERAL_FAILURE)  # as one without a type
        for answer, authenticated in (
            (signed(failure), True),
            (signed(failure, key=OTHER_KEY), False),
            (failure.pack(), False),
        ):
            with pytest.raises(RpmbResultError) as caught:
                check_counter(answer)
            assert caught.value.authenticated is authenticated

    def test_the_expired_bit(self) -> None:
        last = spec.MAX_WRITE_COUNTER
        assert (
            check_counter(signed(COUNTER_FRAME._replace(result=0x80, write_counter=last))) == last
        )
        answer = signed(Frame(write_counter=last, address=3, result=0x80, req_resp=0x0300))
        assert messages.check_write(answer, 3, last - 1, AUTHENTICATOR) == last
        with pytest.raises(RpmbResultError, match=r"WRITE_COUNTER_EXPIRED \(result 0x0080\)"):
            messages.check_write(answer, 3, last, AUTHENTICATOR)
        assert result_name(0) == "OK"
        assert result_name(0x80) == "WRITE_COUNTER_EXPIRED"

    @pytest.mark.parametrize("length", [0, 255, 257])
    def test_a_write_takes_whole_blocks(self, length: int) -> None:
        with pytest.raises(ValueError, match=f"not {length}"):
            messages.write_request(0, bytes(length), 0, AUTHENTICATOR)


# The front-end, against back-ends that misbehave


@pytest.fixture
def peers() -> Iterator[tuple[Frontend, socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs, Frontend(ours, timeout=PATIENCE) as frontend:
        yield frontend, theirs


def wait_less(frontend: Frontend) -> None:
    """Let a front-end give up soon, where its back-end is known to stay silent."""
    frontend._timeout = 0.2


@pytest.mark.usefixtures("no_leaks")
class TestFrontend:
    def test_a_silent_back_end(self, peers: tuple[Frontend, socket.socket]) -> None:
        wait_less(peers[0])
        with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
            peers[0].ask_u64(Request.GET_FEATURES)

    def test_a_back_end_that_drips_is_not_waited_for_longer(
        self, peers: tuple[Frontend, socket.socket]
    ) -> None:
        frontend, theirs = peers
        wait_less(frontend)
        over = threading.Event()

        def drip() -> None:
            theirs.send(struct.pack("=III", Request.GET_FEATURES, 5, 4096))
            while not over.wait(0.05):
                theirs.send(b"\0")

        thread = threading.Thread(target=drip)
        thread.start()
        try:
            started = time.monotonic()
            with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
                frontend.ask_u64(Request.GET_FEATURES)
            assert time.monotonic() - started < PATIENCE
        finally:
            over.set()
            thread.join()

    def test_a_back_end_that_goes(self, peers: tuple[Frontend, socket.socket]) -> None:
        frontend, theirs = peers
        theirs.close()
        for _ in range(2):
            with pytest.raises(BackendError, match="closed the connection"):
                frontend.ask_u64(Request.GET_FEATURES)

    def test_a_back_end_that_goes_in_the_middle_of_a_message(
        self, peers: tuple[Frontend, socket.socket]
    ) -> None:
        frontend, theirs = peers
        theirs.send(struct.pack("=III", Request.GET_FEATURES, 5, 8) + b"1234")
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(BackendError, match="in the middle of a message"):
            frontend.ask_u64(Request.GET_FEATURES)

    def test_a_back_end_that_does_not_read(self, peers: tuple[Frontend, socket.socket]) -> None:
        frontend, _ = peers
        wait_less(frontend)

        def flood() -> None:
            for _ in range(10_000):
                frontend.send(Request.SET_CONFIG, bytes(4096))

        with pytest.raises(BackendError, match="does not read its socket"):
            flood()

    @pytest.mark.parametrize(
        ("reply", "text"),
        [
            (struct.pack("=IIIQ", 15, 5, 8, 0), "found GET_PROTOCOL_FEATURES with flags 0x5"),
            (struct.pack("=IIIQ", 1, 1, 8, 0), "found GET_FEATURES with flags 0x1"),
            (struct.pack("=IIII", 1, 5, 4, 0), "expected a payload of 8 bytes, found 4"),
            (struct.pack("=III", 1, 6, 8), "expected protocol version 1, found 2"),
            (struct.pack("=III", 1, 5, 1 << 20), "expected a payload of at most"),
        ],
    )
    def test_replies_that_are_none(
        self, peers: tuple[Frontend, socket.socket], reply: bytes, text: str
    ) -> None:
        frontend, theirs = peers
        theirs.send(reply)
        with pytest.raises(BackendError, match=text):
            frontend.ask_u64(Request.GET_FEATURES)

    def test_descriptors_are_refused_and_not_received(
        self, peers: tuple[Frontend, socket.socket]
    ) -> None:
        frontend, theirs = peers
        before = open_fds()
        fds = os.pipe()
        wire.send_message(theirs, Request.GET_FEATURES, wire.FLAG_REPLY, bytes(8), fds)
        wire.close_fds(fds)
        for _ in range(2):  # nothing behind them is read either
            with pytest.raises(BackendError, match="expected no file descriptors"):
                frontend.ask_u64(Request.GET_FEATURES)
            assert open_fds() == before

    def test_descriptors_in_the_middle_of_a_message_are_refused(
        self, peers: tuple[Frontend, socket.socket]
    ) -> None:
        frontend, theirs = peers
        fds = os.pipe()
        theirs.send(b"\x01")
        socket.send_fds(theirs, [b"\0\0\0"], fds)
        wire.close_fds(fds)
        with pytest.raises(BackendError, match="expected no file descriptors"):
            frontend.ask_u64(Request.GET_FEATURES)

    def test_an_acknowledgement_that_says_no(self, peers: tuple[Frontend, socket.socket]) -> None:
        frontend, theirs = peers
        frontend.protocol_features = ProtocolFeature.REPLY_ACK
        wire.send_message(theirs, Request.SET_OWNER, wire.FLAG_REPLY, wire.pack_u64(1))
        with pytest.raises(RequestRefusedError, match=r"refused SET_OWNER \(reply 1\)"):
            frontend.tell(Request.SET_OWNER)
        wire.send_message(theirs, Request.SET_OWNER, wire.FLAG_REPLY, wire.pack_u64(0))
        frontend.tell(Request.SET_OWNER)

    def test_a_config_space_of_another_size(self, peers: tuple[Frontend, socket.socket]) -> None:
        frontend, theirs = peers
        with pytest.raises(BackendError, match="expected the protocol feature CONFIG"):
            frontend.read_config(3)
        frontend.protocol_features = ProtocolFeature.CONFIG
        for payload, text in (
            (b"", "expected 3 bytes of config space, found none"),
            (b"12345", "GET_CONFIG: expected"),
            (wire.Config(0, 2, 0, b"ab").pack(), "expected 3 bytes of config space, found 2"),
        ):
            wire.send_message(theirs, Request.GET_CONFIG, wire.FLAG_REPLY, payload)
            with pytest.raises(BackendError, match=text):
                frontend.read_config(3)

    def test_features_that_are_too_old(self, peers: tuple[Frontend, socket.socket]) -> None:
        frontend, theirs = peers
        wire.send_message(theirs, Request.GET_FEATURES, wire.FLAG_REPLY, wire.pack_u64(1 << 30))
        with pytest.raises(BackendError, match="VIRTIO_F_VERSION_1"):
            frontend.handshake()

    def test_nobody_there(self, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with pytest.raises(BackendError, match=f"cannot connect to {path}: No such file"):
            Frontend.connect(path)
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(path)
        with pytest.raises(BackendError, match="Connection refused; nothing listens"):
            Frontend.connect(path)
        with pytest.raises(BackendError, match="too long"):
            Frontend.connect(path + "x" * 200)

    def test_a_listener_that_accepts_nobody(self, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(0)
            with (
                Frontend.connect(path, timeout=0.2),
                pytest.raises(BackendError, match=r"accepted no connection within 0\.2 s"),
            ):
                Frontend.connect(path, timeout=0.2)


# All of it, against the daemon


SETUPS = [
    pytest.param(
        Setup(
            features=VERSION_1 | indirect | event_idx,
            regions=regions,
            segment_size=segment_size,
            first_index=0xFFFD,
        ),
        id="-".join(
            (
                "indirect" if indirect else "direct",
                "event_idx" if event_idx else "flags",
                f"{len(regions)}_regions",
                f"segments_of_{segment_size}" if segment_size else "whole",
            )
        ),
    )
    for indirect, event_idx, regions, segment_size in product(
        (0, INDIRECT),
        (0, EVENT_IDX),
        (Setup().regions, THREE_REGIONS),
        (None, 100),
    )
]


@pytest.mark.usefixtures("no_leaks")
class TestClient:
    @pytest.mark.parametrize("setup", SETUPS)
    def test_the_whole_story(self, daemon: Callable[..., Any], setup: Setup) -> None:
        data = secrets.token_bytes(3 * 256)
        with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
            assert client.config == (1, 32, 255)
            assert client.config.blocks == 512
            client.program_key(KEY)
            assert client.read_counter() == 0
            assert client.write(5, data) == 1
            assert client.write(509, data, 1) == 2
            assert client.read(5, 3) == data
            assert client.read(4, 5) == bytes(256) + data + bytes(256)
            assert client.read(511, 1) == data[512:]
            assert client.read_counter() == 2
            assert client.frontend.features == setup.features

    def test_state_outlives_the_connection(self, daemon: Callable[..., Any]) -> None:
        served = daemon()
        with RpmbClient.connect(served.socket_path) as client:
            client.program_key(KEY)
        for number in range(5):
            with RpmbClient.connect(served.socket_path, KEY) as client:
                assert client.read_counter() == number
                client.write(number, bytes([number]) * 256)
        with RpmbClient.connect(served.socket_path) as client:
            assert client.read(0, 5) == b"".join(bytes([number]) * 256 for number in range(5))

    def test_reads_beyond_the_limit_are_split_and_writes_are_not(
        self, daemon: Callable[..., Any]
    ) -> None:
        served = daemon("--max-read-blocks=7", "--max-write-blocks=2")
        data = secrets.token_bytes(512)
        with RpmbClient.connect(served.socket_path) as client:
            assert client.config == (1, 2, 7)
            client.program_key(KEY)
            for address in range(0, 20, 2):
                client.write(address, data)
            assert client.read(0, 20) == data * 10
            with pytest.raises(RpmbResultError, match="GENERAL_FAILURE"):
                client.write(0, data + data)

    def test_the_largest_requests(self, daemon: Callable[..., Any]) -> None:
        data = secrets.token_bytes(255 * 256)
        with RpmbClient.connect(daemon("--max-write-blocks=255").socket_path) as client:
            client.program_key(KEY)
            client.write(1, data)
            assert client.read(0, 512) == bytes(256) + data + bytes(256 * 256)

    def test_failures_by_name(self, daemon: Callable[..., Any]) -> None:
        with RpmbClient.connect(daemon().socket_path) as client:
            unready: list[Callable[[], object]] = [client.read_counter, lambda: client.read(0, 1)]
            for attempt in unready:
                with pytest.raises(RpmbResultError, match="NO_AUTH_KEY") as caught:
                    attempt()
                assert not caught.value.authenticated
            with pytest.raises(ValueError, match="needs the key"):
                client.write(0, bytes(256), 0)
            client.program_key(KEY)
            failing: list[tuple[str, Callable[[], object]]] = [
                ("PROGRAM_KEY failed: WRITE_FAILURE", lambda: client.program_key(KEY)),
                ("DATA_READ failed: ADDR_FAILURE", lambda: client.read(511, 2)),
                ("DATA_WRITE failed: ADDR_FAILURE", lambda: client.write(512, bytes(256))),
                ("DATA_WRITE failed: COUNT_FAILURE", lambda: client.write(0, bytes(256), 1)),
            ]
            for text, attempt in failing:
                with pytest.raises(RpmbResultError, match=text) as caught:
                    attempt()
                assert caught.value.authenticated
            forged = messages.write_request(0, bytes(256), 0, Authenticator(OTHER_KEY))
            with pytest.raises(RpmbResultError, match="DATA_WRITE failed: AUTH_FAILURE"):
                check_write(client.exchange(forged, 512))
            assert client.read_counter() == 0

    def test_a_wrong_key_is_noticed_before_anything_is_written(
        self, daemon: Callable[..., Any]
    ) -> None:
        served = daemon()
        with RpmbClient.connect(served.socket_path) as client:
            client.program_key(KEY)
        with RpmbClient.connect(served.socket_path, OTHER_KEY) as client:
            for attempt in (
                client.read_counter,
                lambda: client.read(0, 1),
                lambda: client.write(0, bytes(256)),
            ):
                with pytest.raises(VerificationError, match="the device has another key"):
                    attempt()

    @pytest.mark.parametrize("options", [(), ("--strict",)], ids=["plain", "strict"])
    def test_the_last_write_and_the_one_after_it(
        self, daemon: Callable[..., Any], options: tuple[str, ...]
    ) -> None:
        served = daemon(f"--initial-counter={spec.MAX_WRITE_COUNTER - 1}", *options)
        with RpmbClient.connect(served.socket_path) as client:
            client.program_key(KEY)
            assert client.write(0, bytes([9]) * 256) == spec.MAX_WRITE_COUNTER
            with pytest.raises(RpmbResultError, match=r"DATA_WRITE .* WRITE_COUNTER_EXPIRED"):
                client.write(0, bytes(256))
            assert client.read_counter() == spec.MAX_WRITE_COUNTER
            assert client.read(0, 1) == bytes([9]) * 256

    @pytest.mark.parametrize("features", [VERSION_1, VERSION_1 | EVENT_IDX, FEATURES])
    def test_many_in_flight(self, daemon: Callable[..., Any], features: int) -> None:
        setup = Setup(features=features, queue_size=128)
        with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
            client.program_key(KEY)
            for _ in range(20):
                nonces = [secrets.token_bytes(16) for _ in range(64)]
                sent = {client.submit(messages.counter_request(n), 512): n for n in nonces}
                client.flush()
                while sent:
                    for token, data in client.answers():
                        assert messages.check_counter(data, sent.pop(token), AUTHENTICATOR) == 0
            # Writes in flight together are executed in order.
            tokens = [
                client.submit(client.write_request(number, bytes([number]) * 256, number), 512)
                for number in range(64)
            ]
            client.flush()
            found: list[Answer] = []
            while len(found) < 64:
                found += client.answers()
            for number, (token, data) in enumerate(found):
                assert token == tokens[number]
                messages.check_write(data, number, number, AUTHENTICATOR)
            assert client.read_counter() == 64
            assert client.ring.free_descriptors == 128

    def test_exchange_does_not_swallow_others_answers(self, daemon: Callable[..., Any]) -> None:
        with RpmbClient.connect(daemon().socket_path) as client:
            client.submit(messages.counter_request(NONCE), 512)
            with pytest.raises(ValueError, match="in flight"):
                client.read_counter()
            client.flush()
            assert len(client.answers()) == 1

    def test_a_full_ring_takes_nothing_and_loses_nothing(self, daemon: Callable[..., Any]) -> None:
        setup = Setup(features=VERSION_1, queue_size=4)
        with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
            client.program_key(KEY)
            spans = client.memory.allocate(3 * MIB)
            client.memory.free(spans)
            for _ in range(2):
                client.submit(messages.counter_request(NONCE), 512)
            with pytest.raises(QueueError, match="does not fit"):
                client.submit(messages.counter_request(NONCE), 512)
            client.flush()
            answered = 0
            while answered < 2:
                answered += len(client.answers())
            assert client.read_counter() == 0
            assert client.memory.allocate(3 * MIB) == spans

    @pytest.mark.parametrize("features", [VERSION_1, FEATURES], ids=["direct", "indirect"])
    @pytest.mark.parametrize(
        ("request_cuts", "answer_cuts"),
        [
            ([512], [512]),
            ([1, 511], [511, 1]),
            ([196, 32, 256, 16, 4, 2, 2, 2, 2], [228, 284]),
            ([1] * 16 + [496], [16] * 32),
            ([500, 12], [512, 512, 100]),
        ],
    )
    def test_any_split(
        self,
        daemon: Callable[..., Any],
        features: int,
        request_cuts: list[int],
        answer_cuts: list[int],
    ) -> None:
        with RpmbClient.connect(daemon().socket_path, setup=Setup(features=features)) as client:
            client.program_key(KEY)
            request = messages.counter_request(NONCE)
            pieces = []
            for length in request_cuts:
                pieces.append(request[:length])
                request = request[length:]
            client.submit(pieces, answer_cuts)
            client.flush()
            ((_, answer),) = client.answers()
            assert check_counter_is(answer, 0)

    def test_buffers_that_span_regions(self, daemon: Callable[..., Any]) -> None:
        border = 0x0020_0000
        setup = Setup(regions=THREE_REGIONS)
        with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
            client.program_key(KEY)
            client.memory.reserve(border - 100, 512)
            client.memory.write(border - 100, messages.counter_request(NONCE))
            place = client.memory.allocate(512)
            client.ring.add([Segment(border - 100, 512)], [Segment(place, 512)])
            client.ring.flush()
            assert [used.length for used in client.ring.wait(PATIENCE)] == [512]
            assert check_counter_is(client.memory.read(place, 512), 0)
            client.memory.write(place, messages.counter_request(NONCE))
            client.ring.add([Segment(place, 512)], [Segment(border - 100, 512)])
            client.ring.flush()
            assert [used.length for used in client.ring.wait(PATIENCE)] == [512]
            assert check_counter_is(client.memory.read(border - 100, 512), 0)

    @pytest.mark.parametrize(
        "missing",
        [
            ProtocolFeature.REPLY_ACK,
            ProtocolFeature.CONFIGURE_MEM_SLOTS,
            ProtocolFeature.STATUS,
            PROTOCOL_FEATURES & ~ProtocolFeature.CONFIG,
        ],
        ids=["no_acknowledgements", "memory_table", "no_status", "config_only"],
    )
    def test_fewer_protocol_features(
        self, daemon: Callable[..., Any], missing: ProtocolFeature
    ) -> None:
        setup = Setup(protocol_features=PROTOCOL_FEATURES & ~missing, regions=THREE_REGIONS)
        with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
            assert client.frontend.protocol_features == PROTOCOL_FEATURES & ~missing
            client.program_key(KEY)
            assert client.write(0, bytes(256)) == 1
            client.reset_queue()
            assert client.read_counter() == 1

    def test_a_broken_chain_costs_itself_only(self, daemon: Callable[..., Any]) -> None:
        with RpmbClient.connect(daemon().socket_path) as client:
            client.program_key(KEY)
            head = client.ring.size - 1  # add() takes low indices first
            client.ring.write_descriptor(head, 0xDEAD_0000_0000, 512)
            place = client.memory.allocate(1024)
            client.memory.write(place, messages.counter_request(NONCE))
            chain = [Segment(place, 512)], [Segment(place + 512, 512)]
            first = client.ring.add(*chain)
            client.ring.offer(head)
            last = client.ring.add(*chain)
            client.ring.flush()
            used: list[Used] = []
            while len(used) < 3:
                used += client.ring.wait(PATIENCE, peer=client.frontend.fileno())
            assert used == [(first, 512), (head, 0), (last, 512)]
            assert client.read_counter() == 0

    def test_a_broken_ring_is_reported_and_works_after_a_reset(
        self, daemon: Callable[..., Any]
    ) -> None:
        with RpmbClient.connect(daemon().socket_path) as client:
            client.program_key(KEY)
            for reset in (client.reset_queue, client.reset_device):
                client.ring.offer(client.ring.size)
                client.ring.flush()
                with pytest.raises(QueueError, match="reports the queue broken"):
                    client.answers()
                reset()
                assert client.read_counter() == 0

    def test_a_reset_throws_away_what_is_in_flight(self, daemon: Callable[..., Any]) -> None:
        with RpmbClient.connect(daemon().socket_path) as client:
            client.program_key(KEY)
            for _ in range(3):
                client.submit(messages.counter_request(NONCE), 512)
            client.reset_queue()
            assert client.ring.in_flight == 0
            assert client.ring.free_descriptors == client.ring.size
            assert client.read_counter() == 0

    def test_only_reset_device_forgets_the_result(self, daemon: Callable[..., Any]) -> None:
        result_read = Frame(block_count=1, req_resp=spec.VIRTIO_RPMB_REQ_RESULT_READ).pack()
        with RpmbClient.connect(daemon().socket_path) as client:
            client.program_key(KEY)
            client.write(3, bytes(256), 0)
            client.reset_queue()
            frame = Frame.unpack(client.exchange(result_read, 512))
            assert (frame.req_resp, frame.address, frame.write_counter) == (0x0300, 3, 1)
            client.reset_device()
            frame = Frame.unpack(client.exchange(result_read, 512))
            assert (frame.req_resp, frame.result) == (0, 1)

    def test_the_device_status_starts_anew_after_a_reset(self, daemon: Callable[..., Any]) -> None:
        with RpmbClient.connect(daemon().socket_path) as client:
            assert client.frontend.get_status() == 0b1111
            client.frontend.reset_device()
            assert client.frontend.get_status() == 0
            client.frontend.start_device(FEATURES)
            assert client.frontend.get_status() == 0b1011  # all but DRIVER_OK
            client.frontend.set_status(0)
            client.frontend.start_device(FEATURES)
            assert client.frontend.get_status() == 0b1011

    def test_the_back_end_knows_where_the_ring_stopped(self, daemon: Callable[..., Any]) -> None:
        setup = Setup(first_index=0xFFFE)
        with RpmbClient.connect(daemon().socket_path, setup=setup) as client:
            client.program_key(KEY)
            for _ in range(4):
                client.read_counter()
            assert client.frontend.stop_ring() == client.ring.base == 3

    def test_a_second_client_is_told_to_wait(self, daemon: Callable[..., Any]) -> None:
        served = daemon()
        with RpmbClient.connect(served.socket_path) as first:
            with pytest.raises(BackendError, match="one front-end at a time"):
                RpmbClient.connect(served.socket_path, timeout=0.3)
            first.program_key(KEY)
        with RpmbClient.connect(served.socket_path, KEY) as third:
            assert third.read_counter() == 0

    def test_a_killed_daemon_is_noticed_at_once(self, daemon: Callable[..., Any]) -> None:
        served = daemon()
        with RpmbClient.connect(served.socket_path, timeout=PATIENCE) as client:
            client.program_key(KEY)
            served.process.send_signal(signal.SIGSTOP)
            client.submit(messages.counter_request(NONCE), 512)
            client.flush()
            killer = threading.Timer(0.1, served.process.kill)
            killer.start()
            with pytest.raises(BackendError, match="closed the connection with 1 requests"):
                client.answers()
            killer.join()
            with pytest.raises(BackendError, match="closed the connection"):
                client.reset_queue()
        served.process.wait()
        with pytest.raises(BackendError, match="cannot connect"):
            RpmbClient.connect(served.socket_path)

    def test_a_daemon_that_hangs_ends_in_an_error(self, daemon: Callable[..., Any]) -> None:
        served = daemon()
        with RpmbClient.connect(served.socket_path) as client:
            client.program_key(KEY)
            served.process.send_signal(signal.SIGSTOP)
            client._timeout = client.frontend._timeout = 0.3
            try:
                with pytest.raises(BackendError, match=r"within 0\.3 s"):
                    client.read_counter()
                with pytest.raises(BackendError, match=r"within 0\.3 s"):
                    client.reset_queue()
            finally:
                served.process.send_signal(signal.SIGCONT)

    def test_a_key_of_a_wrong_length(self, daemon: Callable[..., Any]) -> None:
        path = daemon().socket_path
        with pytest.raises(ValueError, match="32 bytes, not 31"):
            RpmbClient.connect(path, bytes(31))
        with RpmbClient.connect(path) as client:
            with pytest.raises(ValueError, match="32 bytes, not 33"):
                client.program_key(bytes(33))
            with pytest.raises(RpmbResultError, match="NO_AUTH_KEY"):
                client.read_counter()

    def test_many_connections_leave_nothing_behind(self, daemon: Callable[..., Any]) -> None:
        served = daemon()
        with RpmbClient.connect(served.socket_path) as client:
            client.program_key(KEY)
        for _ in range(50):
            with RpmbClient.connect(served.socket_path, KEY) as client:
                client.read_counter()
                assert "guest-memory" in Path("/proc/self/maps").read_text()
        assert "guest-memory" not in Path("/proc/self/maps").read_text()


def check_counter_is(answer: bytes, counter: int) -> bool:
    return messages.check_counter(answer, NONCE, AUTHENTICATOR) == counter
