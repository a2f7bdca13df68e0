# SPDX-License-Identifier: Apache-2.0
"""A back-end of its own, honest but for what a test changes, and clients that meet it.

`FakeBackend` plays one connection by the protocol, over a device that it keeps in memory. Before a
reply or an answer leaves, a hook may change any part of it. `Clients` runs ``vhost-rpmb-client`` in
processes that are forked from one that has imported it, so that a test has time for hundreds.
"""

from __future__ import annotations

import json
import mmap
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from tests.support import oracle
from tests.support.oracle import Frame
from vhost_rpmb.closing import Closing
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, ProtocolFeature, Request
from vhost_rpmb.virtio import spec as virtio

FEATURES = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_F_INDIRECT_DESC
    | 1 << virtio.VIRTIO_F_EVENT_IDX
    | wire.F_PROTOCOL_FEATURES
)
PROTOCOL_FEATURES = (
    ProtocolFeature.REPLY_ACK
    | ProtocolFeature.CONFIG
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
    | ProtocolFeature.STATUS
)
BLOCKS = spec.CAPACITY_UNIT // spec.BLOCK_SIZE
PATIENCE = 60.0  # seconds until a client that does not end is ended


@dataclass
class Reply:
    """A vhost-user reply before it leaves; ``size`` None is the payload's own."""

    request: int
    payload: bytes
    flags: int = wire.VERSION | wire.FLAG_REPLY
    size: int | None = None
    fds: Sequence[int] = ()
    extra: bytes = b""  # sent behind it
    cut: int | None = None  # so many bytes of it are sent, then the connection is closed
    piece: int | None = None  # sent in pieces of so many bytes
    delay: float = 0.0  # seconds

    def pack(self) -> bytes:
        size = len(self.payload) if self.size is None else self.size
        return struct.pack("=III", self.request, self.flags, size) + self.payload + self.extra


@dataclass
class Answer:
    """What goes back through the ring for one chain, before it is stored."""

    head: int
    frames: list[Frame]
    stuff: bytes = b""  # what the stuff bytes of the frames hold
    length: int | None = None  # None: as many bytes as were stored
    step: int = 1  # by how much the used index moves
    used_flags: int = 0
    available_event: int | None = None
    call: bool = True
    error: bool = False
    hang_up: bool = False
    delay: float = 0.0
    key: bytes | None = None  # signs with this one instead of the device's

    def data(self) -> bytes:
        return b"".join(
            self.stuff.ljust(spec.FRAME_KEY_MAC, b"\0")[: spec.FRAME_KEY_MAC]
            + frame.pack()[spec.FRAME_KEY_MAC :]
            for frame in self.frames
        )


class Device:
    """The honest device: one key, one counter, blocks."""

    def __init__(self, key: bytes | None) -> None:
        self.key = key
        self.counter = 0
        self.blocks = bytearray(os.urandom(BLOCKS * spec.BLOCK_SIZE))

    def respond(self, frames: list[Frame]) -> list[Frame]:
        """The answer to the requests of one chain, without a MAC."""
        first = frames[0]
        match first.req_resp:
            case spec.VIRTIO_RPMB_REQ_PROGRAM_KEY:
                self.key = first.key_mac
                return [Frame(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY)]
            case spec.VIRTIO_RPMB_REQ_GET_WRITE_COUNTER:
                response = Frame(nonce=first.nonce, req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER)
                if self.key is None:
                    return [response._replace(result=spec.VIRTIO_RPMB_RES_NO_AUTH_KEY)]
                return [response._replace(write_counter=self.counter)]
            case spec.VIRTIO_RPMB_REQ_DATA_WRITE:
                data = b"".join(frame.data for frame in frames[: first.block_count])
                start = first.address * spec.BLOCK_SIZE
                self.blocks[start : start + len(data)] = data
                self.counter += 1
                return [
                    Frame(
                        address=first.address,
                        write_counter=self.counter,
                        req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE,
                    )
                ]
            case _:
                response = first._replace(req_resp=spec.VIRTIO_RPMB_RESP_DATA_READ)
                if first.address + first.block_count > BLOCKS:
                    return [response._replace(result=spec.VIRTIO_RPMB_RES_ADDR_FAILURE)]
                start = first.address * spec.BLOCK_SIZE
                return [
                    response._replace(data=bytes(self.blocks[at : at + spec.BLOCK_SIZE]))
                    for at in range(
                        start, start + first.block_count * spec.BLOCK_SIZE, spec.BLOCK_SIZE
                    )
                ]

    def sign(self, frames: list[Frame], key: bytes | None = None) -> list[Frame]:
        """The frames with the MAC of the message in the last one."""
        key = key or self.key
        if key is None:
            return frames
        return oracle.sign(frames, key)


OnReply = Callable[["FakeBackend", int, Reply], None]
OnAnswer = Callable[["FakeBackend", int, Answer], None]


@dataclass
class FakeBackend:
    """One connection's back-end. The hooks see the number of the reply or answer, from 0 on.

    ``on_answer`` sees the answer before it is signed, ``on_signed`` what will be stored.
    """

    device: Device
    config: bytes = bytes((1, 32, 255))
    on_reply: OnReply = lambda _backend, _number, _reply: None
    on_answer: OnAnswer = lambda _backend, _number, _answer: None
    on_signed: OnAnswer = lambda _backend, _number, _answer: None
    replies: list[int] = field(default_factory=list)
    answers: int = 0
    memfd: int = -1
    memory: mmap.mmap | None = None
    fds: dict[int, int] = field(default_factory=dict)

    def serve(self, connection: socket.socket) -> None:
        """Serve until one of both ends the connection."""
        self.connection = connection
        self._status = self._next = 0
        self._hung_up = False
        connection.setblocking(False)
        reader = wire.MessageReader(connection)
        try:
            with suppress(OSError, EOFError):
                self._serve(reader)
        finally:
            reader.close()
            connection.close()
            wire.close_fds([*self.fds.values(), *([self.memfd] if self.memfd >= 0 else [])])
            if self.memory is not None:
                self.memory.close()

    @contextmanager
    def client_stopped(self) -> Iterator[None]:
        """Keep the client from running, so that it sees everything that is done here at once."""
        peer = self.connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
        pid = struct.unpack("iII", peer)[0]
        os.kill(pid, signal.SIGSTOP)
        while ") T " not in Path(f"/proc/{pid}/stat").read_text():
            time.sleep(0.001)
        yield
        os.kill(pid, signal.SIGCONT)

    def hang_up(self) -> None:
        self._hung_up = True

    def _serve(self, reader: wire.MessageReader) -> None:
        while not self._hung_up:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            kick = self.fds.get(Request.SET_VRING_KICK)
            if kick is not None:
                poll.register(kick, select.POLLIN)
            ready = dict(poll.poll(PATIENCE * 1000))
            if not ready:
                raise OSError("the client does not end")
            if kick in ready:
                with suppress(BlockingIOError):
                    os.eventfd_read(kick)
                self._process()
            elif (message := reader.read()) is not None:
                with message:
                    self._handle(message)

    def _handle(self, message: wire.Message) -> None:
        answer: bytes | None = None
        payload = message.payload
        match message.request:
            case Request.GET_FEATURES:
                answer = wire.pack_u64(FEATURES)
            case Request.SET_FEATURES:
                if wire.unpack_u64(payload) >> virtio.VIRTIO_F_RING_PACKED & 1:
                    raise EOFError("a test offered a ring layout that is not known here")
            case Request.GET_PROTOCOL_FEATURES:
                answer = wire.pack_u64(PROTOCOL_FEATURES)
            case Request.GET_MAX_MEM_SLOTS:
                answer = wire.pack_u64(8)
            case Request.GET_STATUS:
                answer = wire.pack_u64(self._status)
            case Request.SET_STATUS:
                self._status = wire.unpack_u64(payload)
            case Request.GET_CONFIG:
                answer = wire.Config(0, len(self.config), 0, self.config).pack()
            case Request.GET_VRING_BASE:
                answer = wire.VringState(0, self._next).pack()
            case Request.ADD_MEM_REG:
                self._share(wire.unpack_single_region(payload), message.take_fds()[0])
            case Request.SET_MEM_TABLE:
                self._share(wire.unpack_memory_table(payload)[0], message.take_fds()[0])
            case Request.SET_VRING_NUM:
                self._size = wire.VringState.unpack(payload).num
            case Request.SET_VRING_ADDR:
                self._rings = wire.VringAddress.unpack(payload)
            case Request.SET_VRING_KICK | Request.SET_VRING_CALL | Request.SET_VRING_ERR:
                self.fds[message.request] = message.take_fds()[0]
        if answer is None and message.flags & wire.FLAG_NEED_REPLY:
            answer = wire.pack_u64(0)
        if answer is not None:
            self._send(Reply(message.request, answer))

    def _send(self, reply: Reply) -> None:
        self.replies.append(reply.request)
        self.on_reply(self, len(self.replies) - 1, reply)
        time.sleep(reply.delay)
        data = reply.pack()
        if reply.cut is not None:
            data = data[: reply.cut]
            self.hang_up()
        pieces = range(0, len(data), reply.piece or len(data) or 1)
        for start in pieces:
            fds = reply.fds if start == pieces[-1] else ()
            part = data[start : start + pieces.step]
            socket.send_fds(self.connection, [part], list(fds))

    def _share(self, place: MemoryRegion, fd: int) -> None:
        self._place, self.memfd = place, fd
        self.memory = mmap.mmap(fd, place.size, offset=place.mmap_offset)

    # The ring

    def _process(self) -> None:
        memory = self.memory
        assert memory is not None
        available = self._rings.available_ring - self._place.user_address
        while self._next != struct.unpack_from("<H", memory, available + 2)[0]:
            (head,) = struct.unpack_from(
                "<H", memory, available + 4 + 2 * (self._next % self._size)
            )
            self._next = (self._next + 1) & 0xFFFF
            request, room = self._chain(head)
            frames = [
                Frame.unpack(request[at : at + spec.FRAME_SIZE])
                for at in range(0, len(request), spec.FRAME_SIZE)
            ]
            answer = Answer(head, self.device.respond(frames))
            number, self.answers = self.answers, self.answers + 1
            self.on_answer(self, number, answer)
            answer.frames = self.device.sign(answer.frames, answer.key)
            self.on_signed(self, number, answer)
            time.sleep(answer.delay)
            if answer.hang_up:
                self.hang_up()
                return
            self._store(answer, room)

    def _chain(self, head: int) -> tuple[bytes, list[tuple[int, int]]]:
        memory = self.memory
        assert memory is not None
        table = self._rings.descriptor_table - self._place.user_address
        index, request, room = head, b"", []
        while True:
            address, length, flags, following = struct.unpack_from(
                "<QIHH", memory, table + 16 * index
            )
            place = address - self._place.guest_address
            if flags & virtio.VIRTQ_DESC_F_INDIRECT:
                table, index = place, 0
                continue
            if flags & virtio.VIRTQ_DESC_F_WRITE:
                room.append((place, length))
            else:
                request += memory[place : place + length]
            if not flags & virtio.VIRTQ_DESC_F_NEXT:
                return request, room
            index = following

    def _store(self, answer: Answer, room: list[tuple[int, int]]) -> None:
        memory = self.memory
        assert memory is not None
        data = answer.data()
        for place, length in room:
            part, data = data[:length], data[length:]
            memory[place : place + len(part)] = part
        length = len(answer.data()) if answer.length is None else answer.length
        used = self._rings.used_ring - self._place.user_address
        index = (self._next - 1) & 0xFFFF
        struct.pack_into("<II", memory, used + 4 + 8 * (index % self._size), answer.head, length)
        event = self._next if answer.available_event is None else answer.available_event
        struct.pack_into("<H", memory, used + 4 + 8 * self._size, event)
        struct.pack_into("<HH", memory, used, answer.used_flags, (index + answer.step) & 0xFFFF)
        if answer.error:
            os.eventfd_write(self.fds[Request.SET_VRING_ERR], 1)
        if answer.call:
            os.eventfd_write(self.fds[Request.SET_VRING_CALL], 1)


class Ended(NamedTuple):
    """How a client ended: exit status (negative: a signal), its streams, and seconds it took."""

    status: int
    stdout: bytes
    stderr: str
    seconds: float


_NURSERY = """
import faulthandler, gc, json, os, sys, tempfile, time, traceback
from vhost_rpmb.daemon import sandbox
from vhost_rpmb.client import cli
from vhost_rpmb.driver import rpmb

gc.freeze()  # what is never collected is not copied by a fork

for line in sys.stdin:
    arguments, patience = json.loads(line)
    streams = [tempfile.TemporaryFile() for _ in range(2)]
    started = time.monotonic()
    pid = os.fork()
    if not pid:
        faulthandler.dump_traceback_later(patience, exit=True)
        for fd, stream in enumerate(streams, 1):
            os.dup2(stream.fileno(), fd)
        try:
            status = cli.main(arguments)
        except BaseException:
            traceback.print_exc()
            status = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, ended = os.waitpid(pid, 0)
    seconds = time.monotonic() - started
    texts = []
    for stream in streams:
        stream.seek(0)
        texts.append(stream.read().decode("latin-1"))
        stream.close()
    print(json.dumps([os.waitstatus_to_exitcode(ended), *texts, seconds]), flush=True)
"""


class Clients(Closing):
    """Clients, one after another, each a process of its own; a context manager."""

    def __init__(self, folder: Path) -> None:
        self._path = str(folder / f"fake-{id(self):x}.sock")
        self._process = subprocess.Popen(
            [sys.executable, "-c", _NURSERY], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def meet(self, backend: FakeBackend, *arguments: str) -> Ended:
        """Run one client against one back-end."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self._path)
            try:
                listener.listen()
                listener.settimeout(PATIENCE)
                order = [[f"--socket-path={self._path}", *arguments], int(PATIENCE)]
                self._process.stdin.write(json.dumps(order).encode() + b"\n")
                self._process.stdin.flush()
                backend.serve(listener.accept()[0])
            finally:
                os.unlink(self._path)
                # Also after an error: it would be taken for how the next client ended.
                ended = self._process.stdout.readline()
        status, stdout, stderr, seconds = json.loads(ended)
        return Ended(status, stdout.encode("latin-1"), stderr, seconds)

    def close(self) -> None:
        self._process.communicate(b"")
