# SPDX-License-Identifier: Apache-2.0
"""The vhost-user byte stream: messages, file descriptors, kicks, and a ring behind them."""

from __future__ import annotations

import logging
import mmap
import os
import socket
import struct
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.fuzz.targets import Disk, Source, Target
from tests.support.oracle import program_key, read_counter, read_data, read_result, write_data
from vhost_rpmb.daemon.eventloop import EventLoop
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import PeerError
from vhost_rpmb.log import LimitedLog, Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.session import Session
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request, VringState
from vhost_rpmb.virtio import spec as virtio

PAGE = 4096
OFFERED = PROTOCOL_FEATURES | wire.ProtocolFeature.LOG_SHMFD
NEGOTIATED = PROTOCOL_FEATURES & ~wire.ProtocolFeature.GPA_ADDRESSES
ARENA = 8 * PAGE  # all that the guest has, in one memfd
GUEST, USER = 0x4000_0000, 0x7F00_0000_0000
# Where things lie in the arena unless the input says something else, in bytes.
DESCRIPTORS, AVAILABLE, USED, RECORD, BUFFERS = 0, PAGE, 2 * PAGE, 3 * PAGE, 4 * PAGE
SIZE = 8  # of the queue
LOG = (GUEST + 2 * ARENA) // (8 * PAGE)  # bytes of the dirty log
FEATURES = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_F_INDIRECT_DESC
    | 1 << virtio.VIRTIO_F_EVENT_IDX
    | wire.F_PROTOCOL_FEATURES
)
REGIONS = (
    MemoryRegion(GUEST, ARENA, USER, 0),
    MemoryRegion(GUEST, 4 * PAGE, USER, 0),
    MemoryRegion(GUEST + 4 * PAGE, 4 * PAGE, USER + 4 * PAGE, 4 * PAGE),
    MemoryRegion(GUEST + ARENA, ARENA, USER + ARENA, 0),
    MemoryRegion(GUEST + PAGE // 2, PAGE, USER, PAGE // 2),
)
SMALL = (0, 1, 2, 3, SIZE, 7, 0xF, 0x100, 0x101, 0x8000, 0xFFFF, 0x1_0000, 0xFFFF_FFFF)
LARGE = (
    *(FEATURES, FEATURES ^ wire.F_PROTOCOL_FEATURES, int(PROTOCOL_FEATURES), 1 << 63, 2**64 - 1),
    *(FEATURES | wire.F_LOG_ALL, int(NEGOTIATED | wire.ProtocolFeature.LOG_SHMFD)),
)
REQUESTS = (*Request, Request.ADD_MEM_REG, Request.SET_VRING_KICK, 0, 45, 0xFFFF_FFFF)
FLAGS = (wire.VERSION, wire.VERSION | wire.FLAG_NEED_REPLY, 1, 9, 9, 9, 5, 0, 2, 0x11, 0xFFFF_FFFF)
MAX_STEPS = 48
MAX_TURNS = 20  # of the event loop after one step; a guest can keep a ring full for ever

_HEADER = struct.Struct("=III")
_DESCRIPTOR = struct.Struct("<QIHH")


class _Records(logging.Handler):
    """Keeps what was logged."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


class _Files:
    """One file of every kind that a front-end can pass."""

    def __init__(self, name: str, folder: Path) -> None:
        self.arena, self.short, self.log = (os.memfd_create(name, os.MFD_CLOEXEC) for _ in range(3))
        os.ftruncate(self.arena, ARENA)
        os.ftruncate(self.log, LOG)
        os.ftruncate(self.short, PAGE)
        flags = os.EFD_CLOEXEC | os.EFD_NONBLOCK
        self.kick, self.call, self.error = (os.eventfd(0, flags) for _ in range(3))
        self.pipe_out, self.pipe_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.dead_out, dead_in = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.close(dead_in)
        self._sockets = socket.socketpair()
        self._loop = EventLoop()
        self.all = (
            self.arena,
            self.kick,
            self.call,
            self.error,
            self.short,
            os.open(f"/proc/self/fd/{self.arena}", os.O_RDONLY | os.O_CLOEXEC),
            self.pipe_out,
            self.pipe_in,
            self.dead_out,
            *(end.fileno() for end in self._sockets),
            os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
            os.open(folder, os.O_PATH | os.O_CLOEXEC),
            os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
            os.dup(self._loop.epoll.fileno()),
            self.log,
        )

    def signals(self) -> list[int]:
        """Take what was signalled, so that the next input finds nothing."""
        counts = []
        for fd in (self.kick, self.call, self.error):
            try:
                counts.append(os.eventfd_read(fd))
            except BlockingIOError:
                counts.append(0)
        with suppress(BlockingIOError):
            counts.append(len(os.read(self.pipe_out, 1 << 16)))
        for end in self._sockets:
            with suppress(BlockingIOError):
                counts.append(len(os.read(end.fileno(), 1 << 16)))
        return counts

    def close(self) -> None:
        self._loop.close()
        for end in self._sockets:
            end.detach()
        for fd in self.all:
            os.close(fd)


class Stream(Target):
    """A front-end of which nothing can be expected."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        super().__init__(engine, folder)
        self._disk = Disk(folder)
        self._name = f"stream-{engine.name}"
        self._files = _Files(self._name, folder)
        for end in self._files._sockets:
            end.setblocking(False)
        self._map = mmap.mmap(self._files.arena, ARENA)
        self._attention = os.eventfd(1, os.EFD_CLOEXEC)
        self._logger = logging.getLogger("vhost_rpmb")
        self._runs = 0
        self._mappings = self._count_mappings()

    def close(self) -> None:
        os.close(self._attention)
        self._map.close()
        self._files.close()
        self._disk.close()

    def run(self, data: bytes) -> list[object]:
        source = Source(data)
        self._map[:] = bytes(ARENA)
        os.pwrite(self._files.log, bytes(LOG), 0)
        self._disk.prepare(source.pick((True, True, False)), 0)
        device = self.engine.RpmbDevice(self._disk)
        log = _Records()
        level, propagate = self._logger.level, self._logger.propagate
        self._logger.addHandler(log)
        self._logger.setLevel(logging.DEBUG)
        self._logger.propagate = False
        files = os.listdir("/proc/self/fd")
        self._sock, far = socket.socketpair()
        self._sock.setblocking(False)
        self._loop = EventLoop()
        self._backend = Session(
            *(far, device, self.engine, self._loop, LimitedLog(Logger("vhost_rpmb.limited"))),
            protocol_features=OFFERED,
        )
        self._far = far.fileno()
        self._loop.add(self._far, self._receive)
        self._reader = wire.MessageReader(self._sock)
        self._heads = 0
        self._end: list[object] = []
        self._trace: list[object] = []
        for _ in range(MAX_STEPS):
            if not source.left or self._end:
                break
            source.pick(_STEPS)(self, source)
            self._settle()
        self._disconnect()
        self._reader.close()
        self._sock.close()
        self._loop.close()
        # What may wait is closed by threads.
        deadline = time.monotonic() + 10
        while os.listdir("/proc/self/fd") != files:
            assert time.monotonic() < deadline, "a file descriptor leaked"
            time.sleep(0.0001)
        # To look takes longer than the rest of an input.
        if not self._runs % 16:
            assert self._count_mappings() == self._mappings, "a memory mapping leaked"
        self._runs += 1
        self._logger.removeHandler(log)
        self._logger.setLevel(level)  # not by the attribute: children remember what was enabled
        self._logger.propagate = propagate
        return [
            *self._trace,
            self._end,
            log.lines,
            self._files.signals(),
            self._map[:],
            os.pread(self._files.log, LOG, 0),
            *self._disk.left_behind(),
        ]

    def _count_mappings(self) -> int:
        return Path("/proc/self/maps").read_text().count(self._name)

    # The event loop

    def _receive(self) -> None:
        try:
            self._backend.receive()
        except (EOFError, PeerError) as error:  # nothing else may come out of it
            self._end = [type(error).__name__, str(error)]
            self._disconnect()

    def _disconnect(self) -> None:
        if self._far >= 0:
            self._loop.remove(self._far)
            self._far = -1
            self._backend.close()

    def _settle(self) -> None:
        """Let the back-end work until nothing happens any more; take its replies."""
        for _ in range(MAX_TURNS):
            happened = self._loop.wait(0)
            happened |= self._backend.pending
            # As if something wanted attention all the time: the back-end never sleeps then.
            self._loop.add(self._attention, lambda: None)
            self._backend.run()
            self._loop.remove(self._attention)
            if not happened:
                break
        with suppress(EOFError, ConnectionError):
            while (reply := self._reader.read()) is not None:
                assert reply.flags == wire.FLAG_REPLY | wire.VERSION
                with reply:
                    assert len(reply.fds) == (reply.request == Request.GET_INFLIGHT_FD)
                self._trace.append((reply.request, reply.payload))

    def _send(self, data: bytes, fds: list[int]) -> None:
        """Send bytes as they are, the descriptors with the first of them."""
        with suppress(BlockingIOError, ConnectionError):
            if fds:
                socket.send_fds(self._sock, [data or b"\0"], fds)
            else:
                self._sock.sendall(data)

    # The steps of an input

    def _message(self, source: Source) -> None:
        """Any message, mostly with what belongs to it."""
        request = source.pick(REQUESTS)
        flags = source.pick(FLAGS)
        how = source.number(1)
        payload = source.take(source.number(1)) if how & 3 == 3 else self._payload(request, source)
        size = source.number(4) if how & 0x1C == 0x1C else len(payload)
        if how & 0x60 == 0x60:
            fds = [source.pick(self._files.all) for _ in range(source.pick((0, 1, 2, 33, 253)))]
        else:
            fds = self._fds(request, payload)
        if request == Request.SET_LOG_BASE:
            # One in guest memory would show the order of writes and marks, which is the engine's.
            fds = [self._files.log if fd == self._files.arena else fd for fd in fds]
        data = _HEADER.pack(request, flags, size) + payload
        if how & 0x80:
            cut = source.number(1) % len(data)
            self._send(data[:cut], fds if cut else [])
            self._settle()
            data, fds = data[cut:], [] if cut else fds
        self._send(data, fds)

    def _payload(self, request: int, source: Source) -> bytes:
        if request in _U64:
            return wire.pack_u64(self._number(source))
        if request in _STATE:
            return VringState(source.pick((0, 0, 0, 1)), source.pick(SMALL)).pack()
        if request == Request.SET_VRING_ADDR:
            parts = [
                USER + near if source.number(1) & 3 else source.number(8)
                for near in (DESCRIPTORS, USED, AVAILABLE)
            ]
            flags = source.pick((0, 0, 0, 1))
            log = source.pick((0, GUEST + USED, PAGE - 1, 2**62 - 1, 2**64 - 1)) if flags else 0
            return wire.VringAddress(0, flags, *parts)._replace(log=log).pack()
        if request == Request.SET_LOG_BASE:
            size = source.pick((LOG, LOG, PAGE, 0, 1, LOG + 1, 1 << 63))
            return wire.LogDescription(size, source.pick((0, 0, 0, 1, 1 << 63))).pack()
        if request == Request.SET_MEM_TABLE:
            return wire.pack_memory_table(
                [self._region(source) for _ in range(source.pick((1, 1, 2, 0, 3, 32, 33)))]
            )
        if request in (Request.ADD_MEM_REG, Request.REM_MEM_REG):
            return wire.pack_single_region(self._region(source))
        if request in (Request.GET_INFLIGHT_FD, Request.SET_INFLIGHT_FD):
            return wire.InflightDescription(
                source.pick((PAGE, PAGE, 0, 1, 319, 320, 1 << 63)),
                source.pick((RECORD, RECORD, 0, 1, ARENA, 1 << 63)),
                source.pick((1, 1, 1, 0, 2, 0xFFFF)),
                source.pick((SIZE, SIZE, 0, 3, 64, 0x8000, 0xFFFF)),
            ).pack()
        if request in (Request.GET_CONFIG, Request.SET_CONFIG):
            size = source.pick((3, 1, 0, 4, 255))
            return wire.Config(source.pick((0, 1, 3, 2**32 - 1)), size, 0, bytes(size)).pack()
        return b""

    def _number(self, source: Source) -> int:
        kind = source.number(1)
        if kind < 200:
            return (*SMALL, *LARGE)[kind % (len(SMALL) + len(LARGE))]
        return source.number(8)

    def _region(self, source: Source) -> MemoryRegion:
        if source.number(1) < 200:
            return source.pick(REGIONS)
        guest, size, user = (
            self._number(source) if source.number(1) & 1 else GUEST for _ in range(3)
        )
        return MemoryRegion(guest, size, user, source.pick((0, PAGE, ARENA, 2**63, 2**64 - 1)))

    def _fds(self, request: int, payload: bytes) -> list[int]:
        """The descriptors that belong to a message."""
        files = self._files
        if request == Request.SET_MEM_TABLE:
            return [files.arena] * min(payload[0] if payload else 0, 253)
        if request in (Request.ADD_MEM_REG, Request.SET_INFLIGHT_FD):
            return [files.arena]
        if request == Request.SET_LOG_BASE:
            return [files.log]
        if request == Request.SET_BACKEND_REQ_FD:
            return [files._sockets[0].fileno()]
        of = {
            Request.SET_VRING_KICK: files.kick,
            Request.SET_VRING_CALL: files.call,
            Request.SET_VRING_ERR: files.error,
            Request.SET_LOG_FD: files.call,
        }.get(Request(request) if request in set(Request) else Request.GET_FEATURES)
        return [] if of is None or payload[1:2] == b"\1" else [of]

    def _handshake(self, source: Source) -> None:
        """The first so many messages of a good front-end."""
        files = self._files
        addresses = wire.VringAddress(0, 0, USER + DESCRIPTORS, USER + USED, USER + AVAILABLE)
        talk: list[tuple[int, bytes, list[int]]] = [
            (Request.SET_PROTOCOL_FEATURES, wire.pack_u64(NEGOTIATED), []),
            (Request.SET_FEATURES, wire.pack_u64(FEATURES), []),
            (Request.ADD_MEM_REG, wire.pack_single_region(REGIONS[0]), [files.arena]),
            (Request.SET_VRING_NUM, VringState(0, SIZE).pack(), []),
            (Request.SET_VRING_BASE, VringState(0, self._heads).pack(), []),
            (Request.SET_VRING_ADDR, addresses.pack(), []),
            (Request.SET_VRING_CALL, wire.pack_u64(0), [files.call]),
            (Request.SET_VRING_ERR, wire.pack_u64(0), [files.error]),
            (Request.SET_VRING_KICK, wire.pack_u64(0), [files.kick]),
            (Request.SET_VRING_ENABLE, VringState(0, 1).pack(), []),
        ]
        flags = source.pick((9, 1))
        shape = source.number(1)
        if shape & 0x40:
            negotiated = NEGOTIATED | wire.ProtocolFeature.LOG_SHMFD
            talk[0] = (Request.SET_PROTOCOL_FEATURES, wire.pack_u64(negotiated), [])
            talk[1] = (Request.SET_FEATURES, wire.pack_u64(FEATURES | wire.F_LOG_ALL), [])
            marked = addresses._replace(flags=wire.VRING_ADDRESS_LOG, log=GUEST + USED)
            talk[5] = (Request.SET_VRING_ADDR, marked.pack(), [])
            talk.insert(2, (Request.SET_LOG_BASE, wire.LogDescription(LOG, 0).pack(), [files.log]))
        if shape & 0x80:
            region = wire.InflightDescription(PAGE, RECORD, 1, SIZE).pack()
            talk.insert(3, (Request.SET_INFLIGHT_FD, region, [files.arena]))
        for request, payload, fds in talk[: len(talk) - shape % 10]:
            self._send(_HEADER.pack(request, flags, len(payload)) + payload, fds)

    def _record(self, source: Source) -> None:
        """Change the in-flight region: what a process left behind, or anything."""
        head, following = source.number(1) % (SIZE + 1), source.number(1) % (SIZE + 1)
        used = (self._heads - source.pick((0, 1, 2, 8, 9, 0x8000))) & 0xFFFF
        how = source.number(1)
        if how & 1:
            version = source.pick((1, 1, 1, 0, 2))
            self._store(RECORD, struct.pack("=QHHHH", 0, version, SIZE, head, used))
        if how & 2:
            entry = struct.pack("=B5xHQ", source.pick((1, 0, 255)), following, source.number(1))
            self._store(RECORD + 16 + 16 * (head % SIZE), entry)
        if how & 4:
            self._store(RECORD + source.number(2) % PAGE, source.take(8))

    def _raw(self, source: Source) -> None:
        self._send(source.take(source.number(1)), [])

    def _kick(self, source: Source) -> None:
        if source.number(1) & 3:
            os.eventfd_write(self._files.kick, 1)
        else:
            with suppress(BlockingIOError):
                os.write(self._files.pipe_in, b"\1")

    def _chain(self, source: Source) -> None:
        """Make a chain available that is good, but for a bit here and there."""
        requests: tuple[Callable[[], bytes], ...] = (
            read_counter,
            program_key,
            read_result,
            lambda: read_data(source.number(1), source.pick((1, 2, 0))),
            lambda: write_data(self._disk.counter, 1, source.take(1) * 256) + read_result(),
        )
        frame = source.pick(requests)()
        slot = self._heads % (SIZE // 2)
        first = 2 * slot
        where = BUFFERS + slot * 4 * spec.FRAME_SIZE
        self._store(where, frame)
        answer = source.pick((512, 1024, 1, 0, 0x10000))
        self._store(
            DESCRIPTORS + 16 * first,
            _DESCRIPTOR.pack(GUEST + where, len(frame), 1, first + 1)
            + _DESCRIPTOR.pack(GUEST + where + 1024, answer, source.pick((2, 2, 2, 3, 4)), 0),
        )
        self._store(
            AVAILABLE + 4 + 2 * (self._heads % SIZE), bytes([first, source.number(1) // 255])
        )
        self._heads = (self._heads + 1) & 0xFFFF
        self._store(AVAILABLE + 2, self._heads.to_bytes(2, "little"))

    def _bytes(self, source: Source) -> None:
        """Write anything anywhere into guest memory."""
        self._store(source.number(2), source.take(source.number(1) % 32))

    def _store(self, offset: int, data: bytes) -> None:
        offset %= ARENA
        data = data[: ARENA - offset]
        self._map[offset : offset + len(data)] = data

    def _hang_up(self, source: Source) -> None:
        with suppress(OSError):
            self._sock.shutdown(source.pick((socket.SHUT_WR, socket.SHUT_RD, socket.SHUT_RDWR)))


_U64 = {
    Request.SET_FEATURES,
    Request.SET_PROTOCOL_FEATURES,
    Request.SET_VRING_KICK,
    Request.SET_VRING_CALL,
    Request.SET_VRING_ERR,
    Request.SET_STATUS,
}
_STATE = {
    Request.SET_VRING_NUM,
    Request.SET_VRING_BASE,
    Request.GET_VRING_BASE,
    Request.SET_VRING_ENABLE,
}
_STEPS = (
    Stream._message,
    Stream._handshake,
    Stream._message,
    Stream._chain,
    Stream._message,
    Stream._kick,
    Stream._message,
    Stream._chain,
    Stream._bytes,
    Stream._raw,
    Stream._record,
    Stream._message,
    Stream._hang_up,
)
