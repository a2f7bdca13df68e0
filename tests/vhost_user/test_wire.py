# SPDX-License-Identifier: Apache-2.0
"""vhost-user messages: layouts, framing over a real socket, ownership of file descriptors."""

import fcntl
import os
import resource
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vhost_rpmb.errors import PeerError
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Message, MessageReader, ProtocolFeature, Request


def open_fds() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Two ends of a connection; the second does not block."""
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    far.setblocking(False)
    with near, far:
        yield near, far


def header(request: int, size: int, flags: int = wire.VERSION) -> bytes:
    return struct.pack("=III", request, flags, size)


def send_fds(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    assert socket.send_fds(sock, [data], fds) == len(data)


class TestNumbers:
    """The numbers of the specification, written down a second time."""

    def test_front_end_messages(self) -> None:
        expected = {
            "GET_FEATURES": 1,
            "SET_FEATURES": 2,
            "SET_OWNER": 3,
            "RESET_OWNER": 4,
            "SET_MEM_TABLE": 5,
            "SET_VRING_NUM": 8,
            "SET_VRING_ADDR": 9,
            "SET_VRING_BASE": 10,
            "GET_VRING_BASE": 11,
            "SET_VRING_KICK": 12,
            "SET_VRING_CALL": 13,
            "SET_VRING_ERR": 14,
            "GET_PROTOCOL_FEATURES": 15,
            "SET_PROTOCOL_FEATURES": 16,
            "GET_QUEUE_NUM": 17,
            "SET_VRING_ENABLE": 18,
            "SET_BACKEND_REQ_FD": 21,
            "GET_CONFIG": 24,
            "SET_CONFIG": 25,
            "RESET_DEVICE": 34,
            "GET_MAX_MEM_SLOTS": 36,
            "ADD_MEM_REG": 37,
            "REM_MEM_REG": 38,
            "SET_STATUS": 39,
            "GET_STATUS": 40,
        }
        assert {name: Request[name].value for name in expected} == expected
        assert [request.value for request in Request] == list(range(1, 45))

    def test_protocol_features(self) -> None:
        bits = {
            "MQ": 0,
            "REPLY_ACK": 3,
            "BACKEND_REQ": 5,
            "CONFIG": 9,
            "RESET_DEVICE": 13,
            "CONFIGURE_MEM_SLOTS": 15,
            "STATUS": 16,
        }
        assert {name: ProtocolFeature[name].bit_length() - 1 for name in bits} == bits
        assert wire.F_PROTOCOL_FEATURES == 1 << 30

    def test_header_flags(self) -> None:
        assert (wire.VERSION, wire.FLAG_REPLY, wire.FLAG_NEED_REPLY) == (1, 4, 8)

    def test_name_of_an_unknown_message(self) -> None:
        assert wire.request_name(3) == "SET_OWNER"
        assert wire.request_name(4000) == "message 4000"


class TestPayloads:
    """Layouts, against struct formats written from the specification."""

    def test_u64(self) -> None:
        assert wire.pack_u64(0x0102030405060708) == struct.pack("=Q", 0x0102030405060708)
        assert wire.unpack_u64(struct.pack("=Q", 7)) == 7

    def test_vring_state(self) -> None:
        state = wire.VringState(vring=1, num=256)
        assert state.pack() == struct.pack("=II", 1, 256)
        assert wire.VringState.unpack(state.pack()) == state

    def test_vring_address(self) -> None:
        address = wire.VringAddress(
            vring=1, flags=2, descriptor_table=3, used_ring=4, available_ring=5, log=6
        )
        assert address.pack() == struct.pack("=IIQQQQ", 1, 2, 3, 4, 5, 6)
        assert wire.VringAddress.unpack(address.pack()) == address

    def test_single_region(self) -> None:
        region = wire.MemoryRegion(guest_address=1, size=2, user_address=3, mmap_offset=4)
        assert wire.pack_single_region(region) == struct.pack("=QQQQQ", 0, 1, 2, 3, 4)
        assert wire.unpack_single_region(wire.pack_single_region(region)) == region

    def test_memory_table(self) -> None:
        regions = (wire.MemoryRegion(1, 2, 3, 4), wire.MemoryRegion(5, 6, 7, 8))
        packed = wire.pack_memory_table(regions)
        assert packed == struct.pack("=II8Q", 2, 0, 1, 2, 3, 4, 5, 6, 7, 8)
        assert wire.unpack_memory_table(packed) == regions
        assert wire.unpack_memory_table(wire.pack_memory_table([])) == ()

    def test_config(self) -> None:
        config = wire.Config(offset=1, size=2, flags=1, data=b"ab")
        assert config.pack() == struct.pack("=III2s", 1, 2, 1, b"ab")
        assert wire.Config.unpack(config.pack()) == config

    @pytest.mark.parametrize(
        ("unpack", "good"),
        [
            (wire.unpack_u64, wire.pack_u64(1)),
            (wire.VringState.unpack, wire.VringState(0, 1).pack()),
            (wire.VringAddress.unpack, wire.VringAddress(0, 0, 0, 0, 0).pack()),
            (wire.unpack_single_region, wire.pack_single_region(wire.MemoryRegion(1, 2, 3, 4))),
            (wire.unpack_memory_table, wire.pack_memory_table([wire.MemoryRegion(1, 2, 3, 4)])),
            (wire.Config.unpack, wire.Config(0, 3, 0, b"abc").pack()),
        ],
    )
    def test_wrong_length(self, unpack, good) -> None:  # type: ignore[no-untyped-def]
        unpack(good)
        for bad in (b"", good[:4], good[:-1], good + b"\0"):
            with pytest.raises(ValueError, match=r"expected .* found \d+"):
                unpack(bad)

    def test_memory_table_with_an_absurd_count(self) -> None:
        with pytest.raises(ValueError, match="4294967295 memory regions"):
            wire.unpack_memory_table(struct.pack("=II", 0xFFFF_FFFF, 0))


class TestSend:
    def test_bytes_on_the_wire(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        wire.send_message(near, Request.SET_FEATURES, wire.FLAG_NEED_REPLY, wire.pack_u64(5))
        assert far.recv(100) == struct.pack("=IIIQ", 2, 0x9, 8, 5)

    def test_sent_descriptors_stay_open(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        with open(os.memfd_create("descriptor")) as file:
            wire.send_message(near, Request.SET_LOG_FD, fds=[file.fileno()])
            os.fstat(file.fileno())
            with MessageReader(far).read() or pytest.fail("no message") as message:
                assert os.fstat(message.fds[0]).st_rdev == os.fstat(file.fileno()).st_rdev

    def test_large_payload_in_parts(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        far.setblocking(True)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        payload = os.urandom(1 << 20)
        sender = threading.Thread(target=wire.send_message, args=(near, 1, 0, payload))
        sender.start()
        message = MessageReader(far, max_payload=1 << 20).read()
        sender.join()
        assert message is not None
        assert message.payload == payload

    def test_send_to_a_full_socket_fails(self, pair: tuple[socket.socket, socket.socket]) -> None:
        _, far = pair
        with suppress(BlockingIOError):
            while True:
                far.send(bytes(4096))
        with pytest.raises(BlockingIOError):
            wire.send_message(far, Request.GET_FEATURES, wire.FLAG_REPLY, bytes(4096))


class TestRead:
    def test_read_without_a_message_returns_none(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        assert MessageReader(pair[1]).read() is None

    def test_one_message(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        near.sendall(header(Request.SET_FEATURES, 8, 0x9) + bytes(range(8)))
        reader = MessageReader(far)
        message = reader.read()
        assert message is not None
        assert (message.request, message.flags, message.payload, message.fds) == (
            Request.SET_FEATURES,
            0x9,
            bytes(range(8)),
            [],
        )
        assert reader.read() is None

    def test_byte_by_byte_with_a_descriptor(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        reader = MessageReader(far)
        data = header(Request.SET_VRING_KICK, 8) + wire.pack_u64(0)
        with open(os.memfd_create("descriptor")) as file:
            send_fds(near, data[:1], [file.fileno()])
        for offset in range(1, len(data)):
            assert reader.read() is None
            near.sendall(data[offset : offset + 1])
        with reader.read() or pytest.fail("no message") as message:
            assert message.payload == wire.pack_u64(0)
            assert len(message.fds) == 1

    def test_many_messages_in_one_send(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        near.sendall(
            b"".join(header(Request.SET_FEATURES, 8) + wire.pack_u64(n) for n in range(500))
        )
        reader = MessageReader(far)
        for number in range(500):
            message = reader.read()
            assert message is not None
            assert wire.unpack_u64(message.payload) == number
        assert reader.read() is None

    def test_descriptors_belong_to_the_message_they_came_with(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        names = ["first", "second", "third"]
        files = [os.memfd_create(name) for name in names]
        try:
            wire.send_message(near, 1, payload=b"no descriptor")
            wire.send_message(near, 2, payload=b"one", fds=files[:1])
            wire.send_message(near, 3)
            wire.send_message(near, 4, fds=files[1:])
            wire.send_message(near, 5)
        finally:
            wire.close_fds(files)
        reader = MessageReader(far)
        found = {}
        while message := reader.read():
            with message:
                paths = [os.readlink(f"/proc/self/fd/{fd}") for fd in message.fds]
                found[message.request] = [path.split(":")[1].split(" ")[0] for path in paths]
        assert found == {1: [], 2: ["first"], 3: [], 4: ["second", "third"], 5: []}

    def test_descriptors_in_slices_of_one_message(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        data = header(Request.SET_MEM_TABLE, 4) + b"abcd"
        with open(os.memfd_create("descriptor")) as file:
            send_fds(near, data[:3], [file.fileno()])
            send_fds(near, data[3:12], [file.fileno()] * 2)
            send_fds(near, data[12:], [file.fileno()])
        with MessageReader(far).read() or pytest.fail("no message") as message:
            assert len(message.fds) == 4
            assert message.fds_complete

    def test_descriptors_are_close_on_exec(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        with open(os.memfd_create("descriptor")) as file:
            os.set_inheritable(file.fileno(), True)
            wire.send_message(near, 1, fds=[file.fileno()])
        with MessageReader(far).read() or pytest.fail("no message") as message:
            assert fcntl.fcntl(message.fds[0], fcntl.F_GETFD) & fcntl.FD_CLOEXEC

    def test_blocking_socket(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        far.setblocking(True)
        data = header(1, 4) + b"abcd"

        def send() -> None:
            for byte in data:
                near.sendall(bytes([byte]))

        sender = threading.Thread(target=send)
        sender.start()
        message = MessageReader(far).read()
        sender.join()
        assert message is not None
        assert message.payload == b"abcd"

    @settings(max_examples=50, deadline=None)
    @given(data=st.data())
    def test_messages_are_read_from_any_slices(self, data: st.DataObject) -> None:
        messages = data.draw(
            st.lists(
                st.tuples(st.integers(0, 2**32 - 1), st.binary(max_size=80)), min_size=1, max_size=8
            )
        )
        stream = b"".join(header(request, len(body)) + body for request, body in messages)
        cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=20).map(sorted))
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        found = []
        with near, far:
            far.setblocking(False)
            reader = MessageReader(far)
            for start, end in zip([0, *cuts], [*cuts, len(stream)], strict=True):
                near.sendall(stream[start:end])
                while message := reader.read():
                    found.append((message.request, message.payload))
        assert found == messages


class TestEnd:
    def test_disconnect_between_messages(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        near.sendall(header(1, 0))
        near.close()
        reader = MessageReader(far)
        assert reader.read() is not None
        with pytest.raises(EOFError, match=r"^the connection ended$"):
            reader.read()

    def test_disconnect_within_a_message(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        near.sendall(header(1, 8) + b"abc")
        near.close()
        with pytest.raises(EOFError, match="middle of a message"):
            MessageReader(far).read()

    def test_reset(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        far.sendall(b"unread")
        near.close()
        with pytest.raises(EOFError, match="Connection reset"):
            MessageReader(far).read()


class TestUnbelievable:
    @pytest.mark.parametrize("version", [0, 2, 3])
    def test_other_version(self, pair: tuple[socket.socket, socket.socket], version: int) -> None:
        near, far = pair
        near.sendall(header(Request.GET_FEATURES, 0, version))
        with pytest.raises(PeerError, match=f"GET_FEATURES: .* version 1, found {version}"):
            MessageReader(far).read()

    def test_payload_at_and_beyond_the_limit(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        reader = MessageReader(far)
        near.sendall(header(1, wire.MAX_PAYLOAD) + bytes(wire.MAX_PAYLOAD))
        message = reader.read()
        assert message is not None
        assert len(message.payload) == wire.MAX_PAYLOAD
        near.sendall(header(1, wire.MAX_PAYLOAD + 1))
        with pytest.raises(PeerError, match="at most 4096 bytes, found 4097"):
            reader.read()


class TestOwnership:
    """Descriptors belong to one object and are closed when nobody takes them."""

    def test_message_closes_descriptors_that_were_not_taken(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        before = open_fds()
        with open(os.memfd_create("descriptor")) as file:
            wire.send_message(near, 1, fds=[file.fileno()] * 3)
        with MessageReader(far).read() or pytest.fail("no message"):
            assert open_fds() == before + 3
        assert open_fds() == before

    def test_taken_descriptors_are_not_closed(self) -> None:
        reader, writer = os.pipe()
        with Message(1, 1, b"", [reader, writer]) as message:
            assert message.take_fds() == [reader, writer]
        os.close(reader)
        os.close(writer)

    @pytest.mark.parametrize("count", [wire.MAX_FDS, wire.MAX_FDS + 1, 253])
    def test_excess_descriptors_mark_the_message_incomplete(
        self, pair: tuple[socket.socket, socket.socket], count: int
    ) -> None:
        near, far = pair
        before = open_fds()
        with open(os.memfd_create("descriptor")) as file:
            wire.send_message(near, 1, fds=[file.fileno()] * count)
        with MessageReader(far).read() or pytest.fail("no message") as message:
            assert message.fds_complete == (count <= wire.MAX_FDS)
            assert len(message.fds) <= wire.MAX_FDS
            assert open_fds() == before + len(message.fds)
        assert open_fds() == before

    def test_descriptors_with_every_byte(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        before = open_fds()
        reader = MessageReader(far)
        data = header(1, 300) + bytes(300)
        message = None
        with open(os.memfd_create("descriptor")) as file:
            for offset in range(len(data)):
                send_fds(near, data[offset : offset + 1], [file.fileno()] * 100)
                message = reader.read()
                assert open_fds() <= before + 1 + wire.MAX_FDS
        assert message is not None
        assert not message.fds_complete
        message.close()
        assert open_fds() == before

    def test_incompleteness_ends_with_the_message(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        reader = MessageReader(far)
        with open(os.memfd_create("descriptor")) as file:
            wire.send_message(near, 1, fds=[file.fileno()] * 100)
            wire.send_message(near, 2, fds=[file.fileno()])
        with reader.read() or pytest.fail("no message") as message:
            assert not message.fds_complete
        with reader.read() or pytest.fail("no message") as message:
            assert message.fds_complete
            assert len(message.fds) == 1

    def test_no_free_descriptor(self, pair: tuple[socket.socket, socket.socket]) -> None:
        near, far = pair
        with open(os.memfd_create("descriptor")) as file:
            wire.send_message(near, 1, fds=[file.fileno()] * 8)
        before = open_fds()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        highest = max(int(name) for name in os.listdir("/proc/self/fd"))
        fillers = [os.dup(far.fileno()) for _ in range(highest + 1 - before)]
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 3, hard))
        try:
            message = MessageReader(far).read()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for fd in fillers:
                os.close(fd)
        assert message is not None
        assert not message.fds_complete
        assert len(message.fds) < 8
        message.close()
        assert open_fds() == before

    def test_reader_closes_descriptors_of_an_incomplete_message(
        self, pair: tuple[socket.socket, socket.socket]
    ) -> None:
        near, far = pair
        before = open_fds()
        reader = MessageReader(far)
        with open(os.memfd_create("descriptor")) as file:
            send_fds(near, header(1, 8), [file.fileno()] * 2)
        assert reader.read() is None
        assert open_fds() == before + 2
        reader.close()
        reader.close()
        assert open_fds() == before
