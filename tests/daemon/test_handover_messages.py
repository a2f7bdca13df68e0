# SPDX-License-Identifier: Apache-2.0
"""Each message is handled and answered exactly once, wherever the daemon is killed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from itertools import pairwise
from pathlib import Path

import pytest

from tests.support.campaign import DIVISOR, sample
from tests.support.daemon import SANDBOX, until
from tests.support.faulty import POINTS, Faults
from tests.support.supervised import Supervised
from vhost_rpmb import memfd
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.vhost_user import inflight, wire
from vhost_rpmb.vhost_user.backend import PROTOCOL_FEATURES
from vhost_rpmb.vhost_user.wire import MemoryRegion, ProtocolFeature, Request, VringState
from vhost_rpmb.virtio import spec as virtio

PAGE = 4096
AFTER_THE_REPLY = ("replied", "removed")  # the front-end can be faster than the daemon
VERSION_1 = 1 << virtio.VIRTIO_F_VERSION_1
OFFERED = PROTOCOL_FEATURES | ProtocolFeature.LOG_SHMFD | ProtocolFeature.DEVICE_STATE
LOGGED = wire.F_PROTOCOL_FEATURES | wire.F_LOG_ALL
DONE, FAILED = wire.pack_u64(0), wire.pack_u64(1)
FIRST, SECOND = (
    MemoryRegion(address, 4 * PAGE, 0x7000_0000 + address, address) for address in (0, 4 * PAGE)
)


class Files:
    """Descriptors of a front-end, each of a kind that a message has."""

    def __init__(self, stack: ExitStack) -> None:
        self.memory = os.memfd_create("memory")
        os.ftruncate(self.memory, 8 * PAGE)
        for ring in (1, 2):  # the available and the used index, where the vring begins
            os.pwrite(self.memory, b"\7", ring * PAGE + 2)
        self.region = memfd.create("in-flight", inflight.stride(8))
        self.other_memory = os.memfd_create("other")
        os.ftruncate(self.other_memory, 8 * PAGE)
        self.kick, self.call, self.error = (os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3))
        near, _far = (stack.enter_context(end) for end in socket.socketpair())
        self.channel = near.fileno()
        events = self.kick, self.call, self.error
        for fd in (self.memory, self.other_memory, self.region, *events):
            stack.callback(os.close, fd)


@pytest.fixture
def files() -> Iterator[Files]:
    with ExitStack() as stack:
        yield Files(stack)


# Request, payload, descriptors, reply.
Step = tuple[Request, bytes, tuple[int, ...], bytes]


def conversation(files: Files) -> list[Step]:
    """Messages of every kind; most of them are answered otherwise if they are handled twice."""
    first, second = wire.pack_single_region(FIRST), wire.pack_single_region(SECOND)
    table = wire.pack_memory_table([FIRST, SECOND])
    addresses = wire.VringAddress(0, 0, 0x7000_0000, 0x7000_2000, 0x7000_1000)
    index, ring = wire.pack_u64(0), VringState(0, 8)
    status = wire.pack_u64(virtio.VIRTIO_STATUS_ACKNOWLEDGE)
    config = wire.Config(0, 3, 0, bytes(3))
    asked = wire.InflightDescription(0, 0, 1, 8)
    region = asked._replace(mmap_size=inflight.stride(8)).pack()
    log = wire.LogDescription(PAGE, PAGE)
    marked = addresses._replace(flags=wire.VRING_ADDRESS_LOG, log=2 * PAGE)
    return [
        (Request.SET_OWNER, b"", (), DONE),
        (Request.SET_OWNER, b"", (), DONE),
        (Request.SET_FEATURES, wire.pack_u64(VERSION_1 | wire.F_PROTOCOL_FEATURES), (), DONE),
        (Request.GET_PROTOCOL_FEATURES, b"", (), wire.pack_u64(OFFERED)),
        (Request.GET_QUEUE_NUM, b"", (), wire.pack_u64(1)),
        (Request.GET_MAX_MEM_SLOTS, b"", (), wire.pack_u64(509)),
        (Request.GET_CONFIG, config.pack(), (), config._replace(data=b"\1\x20\xff").pack()),
        (Request.SET_STATUS, status, (), DONE),
        (Request.GET_STATUS, b"", (), status),
        (Request.ADD_MEM_REG, first, (files.memory,), DONE),
        (Request.ADD_MEM_REG, first, (files.memory,), FAILED),
        (Request.ADD_MEM_REG, second, (files.memory,), DONE),
        (Request.REM_MEM_REG, second, (), DONE),
        (Request.REM_MEM_REG, second, (files.memory,), FAILED),
        (Request.REM_MEM_REG, first, (files.memory,), DONE),
        (Request.SET_MEM_TABLE, table, (files.memory, files.memory), DONE),
        (Request.SET_MEM_TABLE, table, (files.memory, files.other_memory), DONE),
        (Request.GET_INFLIGHT_FD, asked.pack(), (), region),
        (Request.SET_INFLIGHT_FD, region, (files.memory,), DONE),
        (Request.SET_INFLIGHT_FD, region, (files.region,), DONE),
        (Request.SET_VRING_NUM, ring.pack(), (), DONE),
        (Request.SET_VRING_BASE, VringState(0, 7).pack(), (), DONE),
        (Request.SET_VRING_ADDR, addresses.pack(), (), DONE),
        (Request.SET_VRING_CALL, index, (files.call,), DONE),
        (Request.SET_VRING_ERR, index, (files.error,), DONE),
        (Request.SET_VRING_KICK, index, (files.memory,), FAILED),
        (Request.SET_VRING_KICK, index, (files.kick,), DONE),
        (Request.SET_VRING_ENABLE, VringState(0, 1).pack(), (), DONE),
        (Request.SET_VRING_NUM, ring.pack(), (), FAILED),  # it is running
        (Request.SET_INFLIGHT_FD, region, (files.region,), FAILED),
        (Request.SET_VRING_ERR, index, (files.call,), DONE),
        (Request.SET_VRING_CALL, index, (files.call,), DONE),
        (Request.SET_VRING_CALL, wire.pack_u64(wire.VRING_NO_FD), (), DONE),
        (Request.SET_BACKEND_REQ_FD, b"", (files.channel,), DONE),
        (Request.GET_VRING_BASE, ring.pack(), (), VringState(0, 7).pack()),
        (Request.SET_LOG_BASE, log.pack(), (files.memory,), log.pack()),
        (Request.SET_LOG_BASE, log.pack(), (files.other_memory,), log.pack()),
        (Request.SET_LOG_FD, b"", (files.memory,), FAILED),
        (Request.SET_LOG_FD, b"", (files.call,), DONE),
        (Request.SET_FEATURES, wire.pack_u64(VERSION_1 | LOGGED), (), DONE),
        (Request.SET_VRING_ADDR, marked.pack(), (), DONE),
        (Request.RESET_OWNER, b"", (), DONE),
        (Request.SET_OWNER, b"", (), DONE),
        (Request.RESET_DEVICE, b"", (), DONE),
        (Request.IOTLB_MSG, bytes(32), (), FAILED),
    ]


class Running:
    """A daemon that dies at points, and a front-end of it."""

    def __init__(self, folder: Path, stack: ExitStack, engine: str) -> None:
        self.faults = Faults(folder)
        options = (
            "--fd=3",
            f"--flash-path={folder / 'flash.img'}",
            "-v",
            "--migration=copy",
            *SANDBOX,
        )
        self.daemon = stack.enter_context(
            Supervised(folder, engine=engine, command=self.faults.command(*options))
        )
        self.manager = self.daemon.manager
        self.frontend = stack.enter_context(self.daemon.frontend())
        # The front-end's own reader expects no descriptors in replies.
        self.frontend._reader = wire.MessageReader(self.frontend._sock)
        # The vring has user addresses, unlike those of its memory.
        features = wire.pack_u64(OFFERED & ~ProtocolFeature.GPA_ADDRESSES)
        self.frontend.send(Request.SET_PROTOCOL_FEATURES, features, flags=wire.FLAG_NEED_REPLY)
        self.takes(Request.SET_PROTOCOL_FEATURES, DONE)

    def send(self, step: Step) -> None:
        request, payload, fds, _ = step
        self.frontend.send(request, payload, fds, wire.FLAG_NEED_REPLY)

    def takes(self, request: Request, payload: bytes) -> None:
        with self.frontend.receive() as reply:
            assert (Request(reply.request), reply.payload) == (request, payload)
            assert len(reply.fds) == (request == Request.GET_INFLIGHT_FD)

    def ends_cleanly(self) -> None:
        """Nothing was answered twice, and nothing is left when the front-end has gone."""
        self.frontend.send(Request.GET_QUEUE_NUM)
        self.takes(Request.GET_QUEUE_NUM, wire.pack_u64(1))
        self.frontend.close()
        self.daemon.becomes_empty()
        assert not [line for line in self.daemon.warnings if "refused" not in line]


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def chosen(steps: list[Step], turn: int) -> set[int]:
    """Numbers of the messages at which a daemon is killed: all, or a sample.

    A sample has a quarter of the messages with descriptors, another one at each turn.
    """
    if DIVISOR == 1:
        return set(range(len(steps)))
    with_descriptors = [number for number, step in enumerate(steps) if step[2]]
    return {*sample(range(len(steps))), *with_descriptors[turn % 4 :: 4]}


# The engine has no part in messages, but in the vring that they set up.
@pytest.mark.parametrize(
    ("point", "engine_name"),
    [(point, ("fast", "pure")[number % 2]) for number, point in enumerate(POINTS)],
)
def test_each_message_is_handled_once(
    tmp_path: Path, stack: ExitStack, files: Files, point: str, engine_name: str
) -> None:
    running = Running(tmp_path, stack, engine_name)
    deaths = 0
    steps = conversation(files)
    killed = chosen(steps, POINTS.index(point))
    for number, step in enumerate(steps):
        armed = number in killed
        running.faults.arm(point if armed else "")
        running.send(step)
        running.takes(step[0], step[3])
        if armed and point in AFTER_THE_REPLY:  # every message has these
            until(lambda: not running.faults.armed)
        deaths += armed and not running.faults.armed
    running.faults.arm("")
    assert deaths >= 3
    running.manager.wait(lambda: len(running.manager.statuses) >= deaths)
    assert running.manager.statuses == [-9] * deaths
    assert not any(os.pread(files.region, PAGE, 0))  # since RESET_DEVICE
    running.ends_cleanly()


@pytest.mark.parametrize("engine_name", ["fast", "pure"])
def test_messages_queue_while_there_is_no_process(
    tmp_path: Path, stack: ExitStack, files: Files, engine_name: str
) -> None:
    """Those without descriptors come before others with: the kernel shows these on a peek."""
    running = Running(tmp_path, stack, engine_name)
    steps = conversation(files)
    for start in range(0, len(steps), 6):
        with running.manager.down():
            for step in steps[start : start + 6]:
                running.send(step)
        for request, _, _, reply in steps[start : start + 6]:
            running.takes(request, reply)
    running.ends_cleanly()


@pytest.mark.parametrize("point", ["saving", "consumed", "handled", "replied"])
def test_queued_messages_are_handled_once(
    tmp_path: Path, stack: ExitStack, files: Files, point: str
) -> None:
    running = Running(tmp_path, stack, "fast")
    steps = conversation(files)
    for start in range(0, len(steps), 4):
        with running.manager.down():
            for step in steps[start : start + 4]:
                running.send(step)
            running.faults.arm(point)
        for request, _, _, reply in steps[start : start + 4]:
            running.takes(request, reply)
    running.faults.arm("")
    running.ends_cleanly()


CUTS = {  # bytes
    "header and payload": [wire.HEADER_SIZE],
    "in the header": [1, 7],
    "in the payload": [wire.HEADER_SIZE + 3],
    "often": list(range(1, wire.HEADER_SIZE + wire.U64_SIZE, 1 if DIVISOR == 1 else 4)),
}


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("killed", ["between", "saved", "consumed"])
def test_split_message_is_handled_once(
    tmp_path: Path, stack: ExitStack, files: Files, cut: str, killed: str
) -> None:
    """Its descriptor comes with the first byte."""
    running = Running(tmp_path, stack, "fast")
    data = wire.pack_message(Request.SET_VRING_KICK, wire.FLAG_NEED_REPLY, wire.pack_u64(0))
    borders = [0, *CUTS[cut], len(data)]
    pieces = [data[start:end] for start, end in pairwise(borders)]
    sock = running.frontend._sock
    for number, piece in enumerate(pieces):
        starts = running.manager.starts
        if killed != "between":
            running.faults.arm(killed)
        socket.send_fds(sock, [piece], [] if number else [files.kick])
        if killed == "between":
            running.manager.kill()
        else:
            running.manager.wait(lambda starts=starts: running.manager.starts > starts)  # type: ignore[misc]
            running.manager.wait_ready()
    running.faults.arm("")
    running.takes(Request.SET_VRING_KICK, DONE)
    running.manager.wait(lambda: "rpmb-conn" in running.manager.names)
    running.ends_cleanly()


@pytest.mark.parametrize(("engine_name", "cut"), [("fast", wire.HEADER_SIZE + 4), ("pure", 5)])
def test_rest_of_a_message_arrives_while_there_is_no_process(
    tmp_path: Path, stack: ExitStack, files: Files, engine_name: str, cut: int
) -> None:
    """The last of its descriptors comes with it, and the next message is behind it."""
    running = Running(tmp_path, stack, engine_name)
    sock = running.frontend._sock
    steps = conversation(files)
    split = chosen(steps, cut)
    position = 0
    while position < len(steps):
        step, *others = steps[position : position + 2]
        request, payload, fds, reply = step
        data = wire.pack_message(request, wire.FLAG_NEED_REPLY, payload)
        early = fds[: -(-len(fds) // 2)]
        socket.send_fds(sock, [data[:cut]], early)
        with running.manager.down() if position in split else nullcontext():
            if data[cut:]:
                socket.send_fds(sock, [data[cut:]], fds[len(early) :])
            for other in others:
                running.send(other)
        for request, _, _, reply in (step, *others):
            running.takes(request, reply)
        position += 2
    running.ends_cleanly()


def test_message_that_always_kills_does_not_loop(
    tmp_path: Path, stack: ExitStack, files: Files
) -> None:
    running = Running(tmp_path, stack, "fast")
    running.faults.arm("!handled")
    running.send(conversation(files)[0])
    with pytest.raises(BackendError, match="closed the connection"):
        running.frontend.receive()
    running.faults.arm("")
    assert "3 starts failed to continue it" in running.manager.log
    with running.daemon.frontend() as frontend:
        frontend.handshake()
