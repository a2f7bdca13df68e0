# SPDX-License-Identifier: Apache-2.0
"""A hostile daemon against ``vhost-rpmb-client``: whatever it answers, one line and an end in time.

A client succeeds with the right output, or it fails with one line: never a traceback, a signal, a
wrong output or a wait beyond its timeout.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import queue
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.campaign import DIVISOR, sample
from tests.support.daemon import environment, spawned
from tests.support.fake_backend import (
    FEATURES,
    PROTOCOL_FEATURES,
    Answer,
    Clients,
    Device,
    Ended,
    FakeBackend,
    OnAnswer,
    OnReply,
    Reply,
)
from tests.support.oracle import Frame
from tests.support.rig import write_key
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.memory import DEFAULT_REGIONS, GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request

KEY = b"the key bytes that nobody prints"
OTHER_KEY = bytes(32)
DATA = bytes(range(256)) * 2
WORKERS = 6
PROMPT, PATIENT = 0.4, 30.0  # seconds of --timeout: where the client has to wait, and elsewhere
SLACK = 25.0  # seconds that a busy machine takes for a client's start and end
ALL_ONES = (1 << 64) - 1

VERBS = ("read-block", "read-counter", "write-block", "write-key", "load", "dump", "info")
REPLIES = (
    *(Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES, Request.SET_OWNER, Request.SET_STATUS),
    *(Request.SET_FEATURES, Request.SET_STATUS, Request.GET_STATUS, Request.GET_CONFIG),
    *(Request.GET_MAX_MEM_SLOTS, Request.ADD_MEM_REG, Request.SET_VRING_NUM),
    *(Request.SET_VRING_BASE, Request.SET_VRING_ADDR, Request.SET_VRING_ERR),
    *(Request.SET_VRING_CALL, Request.SET_VRING_KICK, Request.SET_VRING_ENABLE),
    *(Request.SET_STATUS, Request.GET_VRING_BASE),
)
SHARED = REPLIES.index(Request.ADD_MEM_REG)  # from here on the back-end has the client's memory


class Bench:
    """Clients, several at once, and the files that they are given."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.key, self.data = str(folder / "key"), str(folder / "data")
        write_key(Path(self.key), KEY)
        Path(self.data).write_bytes(DATA)
        self._idle: queue.SimpleQueue[Clients] = queue.SimpleQueue()
        for _ in range(WORKERS):
            self._idle.put(stack.enter_context(Clients(folder)))

    def arguments(self, verb: str) -> tuple[str, ...]:
        return {
            "read-block": (verb, "3", "2", "-", self.key),
            "read-counter": (verb, self.key),
            "write-block": (verb, "5", self.data, self.key),
            "write-key": (verb, self.key),
            "load": (verb, "--address=5", self.data, self.key),
            "dump": (verb, "-", self.key),
            "info": (verb, self.key),
        }[verb]

    def run(self, case: Case) -> tuple[FakeBackend, Ended]:
        backend = FakeBackend(Device(None if case.verb == "write-key" else KEY))
        backend.on_reply = case.on_reply
        backend.on_answer = case.on_answer
        backend.on_signed = case.on_signed
        if case.config is not None:
            backend.config = case.config
        timeout = PROMPT if case.waits else PATIENT
        clients = self._idle.get()
        try:
            ended = clients.meet(backend, f"--timeout={timeout}", *self.arguments(case.verb))
        finally:
            self._idle.put(clients)
        return backend, ended

    def wrong(self, case: Case) -> str | None:
        """What is wrong with how a client ended, or None."""
        backend, ended = self.run(case)
        told = ("blocks were written, from", "warning: the write counter has expired")
        lines = [
            line for line in ended.stderr.splitlines() if not any(text in line for text in told)
        ]
        problem = None
        if ended.status not in {0, 1, 2} or (
            case.status is not None and ended.status != case.status
        ):
            problem = f"exit status {ended.status}"
        elif ended.status and not (
            len(lines) == 1 and lines[0].startswith("vhost-rpmb-client: error: ")
        ):
            problem = "not one line of error"
        elif ended.status and ended.stdout:
            problem = f"{len(ended.stdout)} bytes of output"
        elif not ended.status and (
            lines or not (case.lies or self.right(case.verb, backend, ended))
        ):
            problem = "a wrong success"
        elif case.text not in ended.stderr:
            problem = f"expected {case.text!r}"
        elif ended.seconds > (PROMPT if case.waits else 0) + SLACK:
            problem = f"{ended.seconds:.1f} s"
        elif KEY in ended.stdout or KEY.decode() in ended.stderr:
            problem = "it shows the key"
        return problem and f"{case.verb}, {case.name}: {problem}: {ended.stderr!r}"

    @staticmethod
    def right(verb: str, backend: FakeBackend, ended: Ended) -> bool:
        device = backend.device
        match verb:
            case "read-block":
                return ended.stdout == bytes(device.blocks[3 * 256 : 5 * 256])
            case "read-counter":
                return ended.stdout == b"Counter value: 0x00000000\n"
            case "write-block" | "load":
                return bytes(device.blocks[5 * 256 : 7 * 256]) == DATA
            case "write-key":
                return device.key == KEY
            case "dump":  # of as many blocks as the back-end claims to have
                size = backend.config[0] * spec.CAPACITY_UNIT
                return ended.stdout == bytes(device.blocks)[:size]
            case _:
                return ended.stdout.startswith(b"capacity: ")


@dataclass(frozen=True)
class Case:
    """One client and one way in which its back-end deviates.

    ``waits``: the client has to run into its timeout. ``lies``: with the right key about what
    only the device knows, so that the output cannot be judged.
    """

    name: str
    verb: str = "read-block"
    on_reply: OnReply = lambda _backend, _number, _reply: None
    on_answer: OnAnswer = lambda _backend, _number, _answer: None
    on_signed: OnAnswer = lambda _backend, _number, _answer: None
    config: bytes | None = None
    waits: bool = False
    lies: bool = False
    status: int | None = None
    text: str = ""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    with ExitStack() as stack:
        yield Bench(tmp_path_factory.mktemp("clients"), stack)


def check(bench: Bench, cases: Iterable[Case]) -> None:
    with ThreadPoolExecutor(WORKERS) as pool:
        assert not [problem for problem in pool.map(bench.wrong, sample(cases)) if problem]


def at(number: int, **changes: Any) -> Callable[[FakeBackend, int, Any], None]:
    """A hook that sets these attributes of the reply or answer with this number."""

    def change(_backend: FakeBackend, found: int, what: Reply | Answer) -> None:
        if found == number:
            for name, value in changes.items():
                setattr(what, name, value)

    return change


def test_fake_back_end_passes_without_changes(bench: Bench) -> None:
    for verb in VERBS:
        assert bench.wrong(Case("nothing", verb, status=0)) is None
    backend, _ = bench.run(Case("nothing"))
    assert tuple(backend.replies) == REPLIES


# Replies


def reply_changes(number: int) -> Iterator[tuple[str, dict[str, Any], bool]]:
    """Changes of a reply's parts: name, attributes, and whether the client has to wait."""
    request = REPLIES[number]
    for other in (0, 1, 18, 0xFFFF, 0xFFFF_FFFF):
        if other != request:
            yield f"request {other}", {"request": other}, False
    for flags in (0, 1, 2, 3, 4, 6, 7, 0xFFFF_FFFC):
        yield f"flags {flags:#x}", {"flags": flags}, False
    # Unknown flags and NEED_REPLY are ignored, as the specification has it for the unknown.
    for flags in (0xD, 0x15, 0xFFFF_FFFD):
        yield f"flags {flags:#x}", {"flags": flags}, False
    last = request == Request.GET_VRING_BASE
    for size, waits in ((0, last), (1, False), (7, False), (9, True), (4096, True)):
        yield f"size {size}", {"size": size}, waits
    for size in (4097, 1 << 31, 0xFFFF_FFFF):
        yield f"size {size}", {"size": size}, False
    for length in (0, 1, 7, 9, 12, 16, 4096, 5000):
        yield f"{length} bytes", {"payload": bytes(length)}, False
    for cut in (0, 1, 11, 12, 13, 19, 20):
        yield f"cut {cut}", {"cut": cut}, False
    for count in (1, 33, 253):
        yield f"{count} descriptors", {"fds": [0] * count}, False
    yield "twice", {"extra": Reply(request, bytes(8)).pack()}, False
    yield "garbage behind it", {"extra": b"\xa5" * 100}, False
    yield "late", {"delay": PROMPT + 0.2}, True
    values = [0, 1, 2, 1 << 32, 1 << 63, ALL_ONES]
    if request in {Request.GET_FEATURES, Request.GET_PROTOCOL_FEATURES}:
        offered = int(FEATURES if request == Request.GET_FEATURES else PROTOCOL_FEATURES)
        values += [offered ^ 1 << bit for bit in range(35)]
    for value in values:
        yield f"value {value:#x}", {"payload": wire.pack_u64(value)}, False


ACKNOWLEDGED = REPLIES.index(Request.SET_OWNER)
# Acknowledgements are all handled alike: one has every change, the others those of one kind each.
REDUCED = ("request 0", "flags 0x1", "size 0", "0 bytes", "cut 0", "cut 13", "1 desc", "value 0x1")


def test_every_field_of_every_reply(bench: Bench) -> None:
    cases = []
    for number, request in enumerate(REPLIES):
        complete = request.name.startswith("GET") or number == ACKNOWLEDGED
        for name, changes, waits in reply_changes(number):
            if complete or name.startswith(REDUCED):
                title = f"reply {number} to {request.name}: {name}"
                cases.append(Case(title, on_reply=at(number, **changes), waits=waits))
    check(bench, cases)


def test_replies_in_pieces_are_understood(bench: Bench) -> None:
    def in_bytes(_backend: FakeBackend, _number: int, reply: Reply) -> None:
        reply.piece = 1

    check(bench, [Case("in bytes", on_reply=in_bytes, status=0)])


def test_silence_at_each_point_ends_at_the_timeout(bench: Bench) -> None:
    cases = [
        Case(
            f"silence instead of reply {number}",
            on_reply=at(number, payload=b"", size=100),
            waits=True,
            status=0 if request == Request.GET_VRING_BASE else 1,
            text="" if request == Request.GET_VRING_BASE else "did not answer within 0.4 s",
        )
        for number, request in enumerate(REPLIES)
    ]
    cases.append(
        Case(
            "a request that is not answered",
            on_signed=at(0, step=0, call=False),
            waits=True,
            status=1,
            text="did not answer a request within 0.4 s",
        )
    )
    check(bench, cases)


def test_descriptors_are_never_received(bench: Bench) -> None:
    """Not even to be closed: how long that takes, the back-end decides."""
    peers: list[socket.socket] = []

    def pass_a_lingering_socket(backend: FakeBackend, number: int, _reply: Reply) -> None:
        """A TCP socket that takes a minute to be closed, and whose last copy is the client's."""
        if number != ACKNOWLEDGED:
            return
        with socket.create_server(("127.0.0.1", 0)) as server:
            lingering = socket.create_connection(server.getsockname())
            peers.append(server.accept()[0])
        lingering.setblocking(False)
        with suppress(BlockingIOError):
            while True:  # its peer does not read, so this stays unsent
                lingering.send(bytes(1 << 16))
        lingering.setblocking(True)
        lingering.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        with backend.client_stopped():
            socket.send_fds(backend.connection, [b"x"], [lingering.fileno()])
            lingering.close()

    try:
        case = Case("lingering", on_reply=pass_a_lingering_socket, waits=True, text="file desc")
        assert bench.wrong(case) is None
    finally:
        for peer in peers:
            peer.close()


# The config space


def test_every_field_of_the_config_space(bench: Bench) -> None:
    number = REPLIES.index(Request.GET_CONFIG)
    cases = []
    for verb in ("info", "dump", "read-block", "write-block", "load"):
        for capacity in (0, 1, 2, 127, 128, 129, 200, 255):
            status = 1 if capacity > spec.MAX_CAPACITY_UNITS else None
            text = f"found {capacity}" if status else ""
            config = bytes((capacity, 32, 255))
            cases.append(Case(f"{config!r}", verb, config=config, status=status, text=text))
        for config in (b"\1\0\0", b"\1\1\1", b"\1\0\xff", b"\1\xff\0", b"\1\xff\xff"):
            too_few = verb == "write-block" and config[1] == 1
            cases.append(Case(f"{config!r}", verb, config=config, status=2 if too_few else 0))
    for config in (b"", b"\1", b"\1\2", b"\1\2\3\4", bytes(256), bytes(4000)):
        cases.append(Case(f"{len(config)} bytes", config=config, status=1))
    for head in ((1, 3), (3, 3), (0xFFFF_FFFF, 3), (0, 2), (0, 4), (0, 1 << 31)):
        payload = struct.pack("=III", *head, 0) + bytes((1, 32, 255))
        cases.append(Case(f"{head}", on_reply=at(number, payload=payload), status=1))
    for flags in (1, 2, 0xFFFF_FFFF):
        payload = struct.pack("=III", 0, 3, flags) + bytes((1, 32, 255))
        cases.append(Case(f"flags {flags}", on_reply=at(number, payload=payload)))
    check(bench, cases)


# The used ring


def ring_changes(head: int, length: int) -> Iterator[tuple[str, dict[str, Any], bool, int | None]]:
    """Name, attributes of the answer, whether the client waits, and how it has to end."""
    for other in (*(head ^ 1 << bit for bit in range(32)), 64, 0xFFFF_FFFF):
        yield f"head {other}", {"head": other}, False, 1
    for other in {*(length ^ 1 << bit for bit in range(32)), 0, 1, length - 1, 0xFFFF_FFFF}:
        yield f"length {other}", {"length": other}, False, 1
    yield "index + 0", {"step": 0}, True, 1
    for step in (2, 3, 64, 65, 0x7FFF, 0x8000, 0xFFFF):
        yield f"index + {step}", {"step": step}, False, 1
    for bit in range(16):
        yield f"flags {1 << bit}", {"used_flags": 1 << bit}, False, 0
    for event in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        yield f"event {event}", {"available_event": event}, False, 0
    yield "no call", {"call": False}, True, None
    yield "error", {"error": True}, False, None
    yield "error alone", {"error": True, "step": 0}, False, 1
    yield "an end", {"hang_up": True}, False, 1
    yield "late", {"delay": PROMPT + 0.2}, True, 1


def test_every_field_of_the_used_ring(bench: Bench) -> None:
    check(
        bench,
        [
            Case(name, on_signed=at(0, **changes), waits=waits, status=status)
            for name, changes, waits, status in ring_changes(63, 2 * spec.FRAME_SIZE)
        ],
    )


# Responses


FIELDS: dict[str, tuple[bytes | int, ...]] = {
    "key_mac": (bytes(32), b"\xff" * 32),
    "data": (bytes(256), b"\xff" * 256),
    "nonce": (bytes(16), b"\xff" * 16),
    "write_counter": (1, 2, 0x7FFF_FFFF, 0xFFFF_FFFF),
    "address": (0, 1, 0xFFFF),
    "block_count": (0, 1, 3, 0xFFFF),
    "result": (*range(9), 0x80, 0x85, 0xFFFF),
    "req_resp": (0, 1, 4, 5, *range(0x100, 0x600, 0x100), 0xFFFF),
}
ANSWERS = (
    ("read-block", 0, 0), ("read-block", 0, 1), ("read-counter", 0, 0), ("write-key", 0, 0),
    ("write-block", 0, 0), ("write-block", 1, 0),
)  # fmt: skip


def in_frame(number: int, position: int, **fields: bytes | int) -> OnAnswer:
    def change(_backend: FakeBackend, found: int, answer: Answer) -> None:
        if found == number:
            answer.frames[position] = answer.frames[position]._replace(**fields)  # type: ignore[arg-type]

    return change


def test_every_field_of_every_response(bench: Bench) -> None:
    cases = []
    for verb, number, position in ANSWERS:
        for field, values in FIELDS.items():
            for count, value in enumerate(values):
                name = f"answer {number}, frame {position}: {field} {value!r}"
                change = in_frame(number, position, **{field: value})
                cases.append(Case(f"{name}, not signed", verb, on_signed=change))
                if field != "key_mac" and count < 3:
                    cases.append(Case(f"{name}, signed", verb, on_answer=change, lies=True))
        cases += [
            Case("other key", verb, on_answer=at(number, key=OTHER_KEY), status=1),
            Case("no frames", verb, on_signed=at(number, frames=[]), status=1),
            Case("part of a frame", verb, on_signed=at(number, length=256), status=1),
        ]
        cases.append(Case("stuff", verb, on_signed=at(number, stuff=b"\xff" * 196), status=0))

    def swap(_backend: FakeBackend, _number: int, answer: Answer) -> None:
        answer.frames.reverse()

    cases.append(Case("frames that changed places", on_signed=swap, status=1))
    check(bench, cases)


def test_replayed_answer_is_refused(bench: Bench) -> None:
    kept: list[list[Frame]] = []

    def replay(_backend: FakeBackend, _number: int, answer: Answer) -> None:
        kept.append(answer.frames)
        answer.frames = kept[0]

    check(bench, [Case("first", on_signed=replay, status=0)])
    check(bench, [Case("again", on_signed=replay, status=1, text="nonce")])


# Memory


def attack(backend: FakeBackend) -> None:
    """All that would make the next access of the client fault."""
    for size in (0, 4096, 1 << 30):
        with suppress(OSError):
            os.ftruncate(backend.memfd, size)
    with suppress(OSError):
        fcntl.fcntl(backend.memfd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)


def test_memory_that_a_back_end_cuts_off(bench: Bench) -> None:
    def cut(number: int) -> OnReply:
        return lambda backend, found, _reply: attack(backend) if found == number else None

    def cut_before(backend: FakeBackend, _number: int, _answer: Answer) -> None:
        attack(backend)

    cases = [
        Case(f"at reply {number}", on_reply=cut(number), status=0)
        for number in range(SHARED, len(REPLIES))
    ]
    cases.append(Case("before an answer", on_signed=cut_before, status=0))
    check(bench, cases)


def test_memory_that_a_back_end_rewrites(bench: Bench) -> None:
    def scribble(number: int, content: bytes | None) -> OnReply:
        def write(backend: FakeBackend, found: int, _reply: Reply) -> None:
            if found == number and backend.memory is not None:
                if content is None:
                    backend.memory.madvise(mmap.MADV_REMOVE)
                else:
                    backend.memory[: 1 << 20] = content

        return write

    check(
        bench,
        [
            Case(f"at reply {number}", verb, on_reply=scribble(number, content), waits=True)
            for number in range(SHARED, len(REPLIES))
            for content in (None, b"\xff" * (1 << 20), os.urandom(1 << 20))
            for verb in ("read-block", "write-block")
        ],
    )


def test_guest_memory_is_sealed_unless_a_test_wants_it_otherwise() -> None:
    with GuestMemory() as memory:
        fd, size = memory.regions[0].fd, DEFAULT_REGIONS[0].size
        for other in (0, size - 1, size + 1):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, other)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        with mmap.mmap(fd, size) as mapped:  # as a back-end does
            mapped[0] = 1
            assert memory.read(DEFAULT_REGIONS[0].guest_address, 1) == b"\1"
    with GuestMemory(sealed=False) as memory:
        os.ftruncate(memory.regions[0].fd, 0)


def test_back_end_that_cannot_map_the_memory(bench: Bench) -> None:
    """As docs/guides/client.md has it."""
    refused = at(SHARED, payload=wire.pack_u64(1))
    check(bench, [Case("refused", on_reply=refused, status=1, text="refused ADD_MEM_REG")])


def test_eventfds_are_watched_but_never_read() -> None:
    """A read could wait for ever: the back-end may clear O_NONBLOCK and take the count itself."""
    with GuestMemory() as memory, Ring(memory, 8) as ring:
        for fd in (ring.call_fd, ring.error_fd):
            fcntl.fcntl(fd, fcntl.F_SETFL, 0)
        head = ring.add([Segment(0, 1)])
        ring.publish()

        def answer() -> None:
            for _ in range(3):  # calls before there is an answer
                os.eventfd_write(ring.call_fd, 1)
                time.sleep(0.01)
            ring.memory.write(ring.used_ring + 4, struct.pack("<II", head, 0))
            ring.memory.store16(ring.used_ring + 2, 1)
            os.eventfd_write(ring.call_fd, 1)

        device = threading.Thread(target=answer)
        device.start()
        assert ring.wait(PATIENT) == [(head, 0)]
        device.join()
        with pytest.raises(BackendError, match="within 0"):
            ring.wait(0.01)
        ring.reset()
        os.set_blocking(ring.call_fd, False)
        assert os.eventfd_read(ring.call_fd) == 4


def test_full_kick_eventfd(bench: Bench) -> None:
    """A write to it would wait for ever: the back-end may clear O_NONBLOCK."""

    def fill(backend: FakeBackend, number: int, _reply: Reply) -> None:
        if number == REPLIES.index(Request.SET_VRING_ENABLE):
            kick = backend.fds[-1] = backend.fds.pop(Request.SET_VRING_KICK)  # not looked at again
            os.set_blocking(kick, True)
            os.eventfd_write(kick, 2**64 - 2)

    text = "did not answer a request within 0.4 s"
    check(bench, [Case("full", on_reply=fill, waits=True, status=1, text=text)])


def test_kick_eventfd_that_is_filled_at_the_last_moment() -> None:
    """The client's timer ends a write that blocks although the poll before it found room."""
    script = """
import os, signal
from vhost_rpmb import process
from vhost_rpmb.client import cli
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
signal.signal(signal.SIGALRM, signal.SIG_IGN)  # a parent may leave it so
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM])
process.reset_signals()
cli._bound_kicks()
with GuestMemory() as memory, Ring(memory, 8) as ring:
    ring._room.unregister(ring.kick_fd)
    ring._room.register(os.eventfd(0), 4)  # has room, as the kick eventfd had when it was polled
    ring.kick_fd = os.eventfd(0)
    os.eventfd_write(ring.kick_fd, 2**64 - 2)
    print("ready", flush=True)
    try:
        ring.kick()
    except BackendError as error:
        print(error)
"""
    with spawned([sys.executable, "-c", script], stdout=subprocess.PIPE) as client:
        out, _ = client.communicate(timeout=PATIENT)
    assert out == b"ready\nthe back-end made a kick wait\n"


# Whatever comes to mind


raw_replies = st.binary(max_size=64)
numbers = st.integers(0, len(REPLIES) - 1)
reply_parts = st.fixed_dictionaries(
    {},
    optional={
        "request": st.integers(0, 0xFFFF_FFFF),
        "flags": st.integers(0, 0xFFFF_FFFF),
        "size": st.integers(0, 64) | st.integers(0, 0xFFFF_FFFF),
        "payload": st.binary(max_size=40) | st.integers(0, ALL_ONES).map(wire.pack_u64),
        "extra": raw_replies,
        "cut": st.integers(0, 40),
        "fds": st.lists(st.just(0), max_size=3),
        "piece": st.integers(1, 30),
    },
)
frames = st.builds(
    Frame,
    key_mac=st.binary(min_size=32, max_size=32),
    data=st.binary(min_size=256, max_size=256),
    nonce=st.binary(min_size=16, max_size=16),
    write_counter=st.integers(0, 0xFFFF_FFFF),
    address=st.integers(0, 0xFFFF),
    block_count=st.integers(0, 0xFFFF),
    result=st.integers(0, 0xFFFF),
    req_resp=st.integers(0, 0xFFFF),
)
answer_parts = st.fixed_dictionaries(
    {},
    optional={
        "head": st.integers(0, 0xFFFF_FFFF),
        "length": st.integers(0, 2048) | st.integers(0, 0xFFFF_FFFF),
        "step": st.integers(0, 0xFFFF),
        "used_flags": st.integers(0, 0xFFFF),
        "available_event": st.integers(0, 0xFFFF),
        "frames": st.lists(frames, max_size=3),
        "call": st.booleans(),
        "error": st.booleans(),
    },
)


@settings(max_examples=100 // DIVISOR, deadline=None)
@given(
    verb=st.sampled_from(
        ("read-block", "read-counter", "write-block", "write-key", "load", "info")
    ),
    replies=st.dictionaries(numbers, reply_parts, max_size=2),
    answers=st.dictionaries(st.integers(0, 1), answer_parts, max_size=2),
    config=st.binary(min_size=3, max_size=3) | st.just(bytes((1, 32, 255))),
)
def test_client_survives_any_deviation(
    bench: Bench,
    verb: str,
    replies: dict[int, dict[str, Any]],
    answers: dict[int, dict[str, Any]],
    config: bytes,
) -> None:
    def on_reply(_backend: FakeBackend, number: int, reply: Reply) -> None:
        for name, value in replies.get(number, {}).items():
            setattr(reply, name, value)

    def on_signed(_backend: FakeBackend, number: int, answer: Answer) -> None:
        for name, value in answers.get(number, {}).items():
            setattr(answer, name, value)

    case = Case(
        f"{replies} {answers}", verb, on_reply, on_signed=on_signed, config=config, waits=True
    )
    assert bench.wrong(case) is None


# Core dumps


@pytest.mark.needs_sigsegv
def test_no_core_dump_of_a_client(tmp_path: Path) -> None:
    path, key = str(tmp_path / "sock"), tmp_path / "key"
    write_key(key, KEY)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        command = [
            *(sys.executable, "-m", "vhost_rpmb.client", f"--socket-path={path}"),
            *("--timeout=60", "read-counter", str(key)),
        ]
        listener.settimeout(60)
        with spawned(command, env=environment()) as client, listener.accept()[0] as connection:
            assert connection.recv(12)  # now it has the key and waits
            limits = Path(f"/proc/{client.pid}/limits").read_text()
            assert re.search(r"Max core file size +0 +0 ", limits)
            client.send_signal(signal.SIGSEGV)
            _, ended = os.waitpid(client.pid, 0)
            client.returncode = -signal.SIGSEGV
    assert os.WTERMSIG(ended) == signal.SIGSEGV
    assert not os.WCOREDUMP(ended)


def test_client_is_not_dumpable(tmp_path: Path) -> None:
    """Neither for a pipe that takes core dumps, which heeds no limit, nor for a debugger."""
    script = (
        "import ctypes, sys; from vhost_rpmb.client.cli import main; "
        "print(main(sys.argv[1:]), ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))"  # PR_GET_DUMPABLE
    )
    done = subprocess.run(
        [sys.executable, "-c", script, f"--socket-path={tmp_path / 'none'}", "read-counter"],
        capture_output=True,
        env=environment(),
        timeout=60,
    )
    assert done.stdout == b"1 0\n"


def test_library_client_leaves_its_process_alone(tmp_path: Path) -> None:
    script = f"""
import ctypes
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.rpmb import RpmbClient
try:
    RpmbClient.connect({str(tmp_path / "none")!r}, bytes(32))
except BackendError:
    print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=60)
    assert done.stdout == b"1\n"
