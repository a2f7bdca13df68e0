# SPDX-License-Identifier: Apache-2.0
"""Front-ends that leave something behind which nobody takes away, or make a system call wait."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.daemon import Daemon, DaemonFactory, spawned
from tests.support.oracle import KEY
from tests.support.raw import enable_again_and_again, hammer
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.frontend import PROTOCOL_FEATURES, Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import MemoryRegion, Request

# The promise is 2 s and 3 s; a busy machine may take longer. It took a minute or more.
STOP = 6.0
NEXT = 9.0
FULL = 2**64 - 2
LINGER = struct.pack("=ii", 1, 600)
RESET = struct.pack("=ii", 1, 0)
FUSE = Path(__file__).parent.parent / "support/fuse.py"


@pytest.fixture
def running(daemon: DaemonFactory) -> Daemon:
    """A daemon with a key, in the sandbox wherever there is one."""
    started = daemon()
    with RpmbClient.connect(str(started.socket_path)) as client:
        client.program_key(KEY)
    return started


def assert_serves(running: Daemon, after: str = "") -> None:
    try:
        with RpmbClient.connect(str(running.socket_path), key=KEY, timeout=NEXT) as client:
            assert client.read_counter() == 0
    except BackendError as error:
        pytest.fail(f"{after}: {error}")


def assert_stops(running: Daemon) -> None:
    running.send(signal.SIGTERM)
    assert running.wait(STOP) == 0


def connect(running: Daemon) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(running.socket_path))
    features = wire.pack_u64(PROTOCOL_FEATURES)
    wire.send_message(sock, Request.SET_PROTOCOL_FEATURES, payload=features)
    return sock


def message(request: int, payload: bytes = b"", flags: int = 0) -> bytes:
    return struct.pack("=III", request, wire.VERSION | flags, len(payload)) + payload


# How a front-end leaves a descriptor with the daemon: the bytes that come with it.
REGION = wire.pack_single_region(MemoryRegion(0, 4096, 0, 0))
LEFT = {
    "request channel": message(Request.SET_BACKEND_REQ_FD),
    "kick": message(Request.SET_VRING_KICK, wire.pack_u64(0)),
    "call": message(Request.SET_VRING_CALL, wire.pack_u64(0)),
    "error": message(Request.SET_VRING_ERR, wire.pack_u64(0)),
    "memory": message(Request.ADD_MEM_REG, REGION),
    "memory table": message(
        Request.SET_MEM_TABLE, wire.pack_memory_table([MemoryRegion(0, 4096, 0, 0)])
    ),
    "in-flight region": message(
        Request.SET_INFLIGHT_FD, wire.InflightDescription(4096, 0, 1, 64).pack()
    ),
    "dirty log": message(Request.SET_LOG_BASE, wire.LogDescription(4096, 0).pack()),
    "descriptor of the dirty log": message(Request.SET_LOG_FD),
    "removed memory": message(Request.REM_MEM_REG, REGION),
    "message without descriptors": message(Request.GET_FEATURES),
    "half a header": message(Request.SET_BACKEND_REQ_FD)[:6],
    "half a payload": message(Request.SET_VRING_KICK, wire.pack_u64(0))[:16],
}


def test_connection_ends_while_its_own_end_is_kept(running: Daemon) -> None:
    """Kept anywhere, or in the queue of what is kept, it would hide its end from the daemon."""
    for queued, (how, data) in itertools.product((False, True), LEFT.items()):
        with connect(running) as sock:
            near, far = socket.socketpair()
            with near, far:
                if queued:
                    socket.send_fds(far, [b"x"], [sock.fileno()])
                left = near if queued else sock
                socket.send_fds(sock, [data], [left.fileno()])
        assert_serves(running, f"{how}, {queued=}")
    assert_stops(running)


def test_connection_ends_while_its_own_end_is_kept_and_a_front_end_waits(running: Daemon) -> None:
    """Nobody takes it out of that queue, but the process that connected has ended.

    Not ``accepted``: it ended before the daemon accepted its connection.
    """
    for accepted in (True, False):
        if not accepted:
            running.send(signal.SIGSTOP)
        script = f"""
import socket, struct
served, waiting = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
for sock in (served, waiting):
    sock.connect({str(running.socket_path)!r})
served.send({LEFT["message without descriptors"]!r})
if {accepted}:
    assert served.recv(20)
socket.send_fds(waiting, [b"x"], [served.fileno()])
"""
        subprocess.run([sys.executable, "-S", "-c", script], check=True, timeout=60)
        running.send(signal.SIGCONT)
        assert_serves(running, f"{accepted=}")
    assert_stops(running)


def test_connection_that_another_process_took_over_goes_on(running: Daemon) -> None:
    """Until another front-end wants its place."""
    script = f"""
import os, socket
with socket.socket(socket.AF_UNIX) as sock:
    sock.connect({str(running.socket_path)!r})
    with socket.socket(fileno=0) as parent:
        socket.send_fds(parent, [b"x"], [sock.fileno()])
"""
    near, far = socket.socketpair()
    with near:
        with far:
            subprocess.run(
                [sys.executable, "-S", "-c", script], stdin=far.fileno(), check=True, timeout=60
            )
        _, (fd,), _, _ = socket.recv_fds(near, 1, 1)
    with socket.socket(fileno=fd) as sock:
        sock.settimeout(NEXT)
        for _ in range(3):
            sock.send(LEFT["message without descriptors"])
            assert sock.recv(20)
        assert_serves(running)
        assert sock.recv(20) == b""


@contextmanager
def started(running: Daemon) -> Iterator[tuple[Frontend, Ring]]:
    """A front-end of that daemon with a ring that runs and eventfds that block."""
    with (
        GuestMemory() as memory,
        Ring(memory) as ring,
        Frontend.connect(running.socket_path) as frontend,
    ):
        frontend.handshake()
        frontend.start_device(0)
        frontend.share_memory(memory)
        frontend.start_ring(ring)
        for fd in (ring.call_fd, ring.error_fd):
            os.set_blocking(fd, True)
        os.eventfd_read(ring.call_fd)  # the signal that comes when a vring starts
        yield frontend, ring


@contextmanager
def without_room(ring: Ring, raced: bool) -> Iterator[None]:
    """The call eventfd has no room, or another process makes some and takes it again."""
    if raced:  # before the daemon writes
        with hammer("refill", ring.call_fd):
            yield
    else:
        os.eventfd_write(ring.call_fd, FULL)
        yield


@pytest.mark.parametrize("raced", [False, True])
def test_full_call_eventfd_and_many_messages_before_the_stop(running: Daemon, raced: bool) -> None:
    with started(running) as (frontend, ring), without_room(ring, raced):
        enable_again_and_again(frontend)
        assert_stops(running)


def test_full_call_eventfd_and_many_messages_before_the_next_front_end(running: Daemon) -> None:
    for raced in (False, True):
        with started(running) as (frontend, ring), without_room(ring, raced):
            enable_again_and_again(frontend)
            frontend.close()
            assert_serves(running, f"{raced=}")
    assert_stops(running)


def test_full_error_eventfd(running: Daemon) -> None:
    """A ring that breaks again and again."""
    with started(running) as (frontend, ring):
        os.eventfd_write(ring.error_fd, FULL)
        ring.offer(1000)
        ring.publish()
        start = time.monotonic()
        for _ in range(10):
            frontend.tell(Request.SET_VRING_KICK, wire.pack_u64(0), [ring.kick_fd])
        assert time.monotonic() - start < NEXT
        frontend.close()
        assert_serves(running)
    assert_stops(running)


@pytest.fixture
def lingering() -> Iterator[Callable[[], socket.socket]]:
    """TCP sockets whose close waits for a peer that never reads; ended for good at the end."""
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))

        def make() -> socket.socket:
            sock = socket.create_connection(listener.getsockname())
            peer, _ = listener.accept()
            # The peer's end goes first, with a reset, which wakes whoever waits still.
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            stack.callback(peer.close)
            sock.setblocking(False)
            try:
                while True:
                    sock.send(bytes(1 << 16))
            except BlockingIOError:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER)
            return sock

        yield make


# Where the descriptors are: the bytes before them, the bytes with them, how these are sent.
PLACES = {
    "in messages": (b"", LEFT["message without descriptors"], 0),
    "in half a message": (b"", LEFT["half a header"], 0),
    "behind the message that ends it all": (bytes(12), b"x", 0),
    "out of band": (b"", b"x", socket.MSG_OOB),
}


def test_sockets_whose_close_waits(running: Daemon, lingering: Callable[[], socket.socket]) -> None:
    for queued, place in itertools.product((False, True), PLACES):
        before, beside, flags = PLACES[place]
        with connect(running) as sock:
            running.send(signal.SIGSTOP)
            sock.send(before)
            for _ in range(10):
                with ExitStack() as stack:
                    left = stack.enter_context(lingering())
                    if queued:
                        near, far = (stack.enter_context(end) for end in socket.socketpair())
                        socket.send_fds(far, [b"x"], [left.fileno()])
                        left = near
                    socket.send_fds(sock, [beside], [left.fileno()], flags)
            running.send(signal.SIGCONT)
        assert_serves(running, f"{place}, {queued=}")
    assert_stops(running)


def test_sockets_that_wait_with_front_ends_that_wait(
    running: Daemon, lingering: Callable[[], socket.socket]
) -> None:
    with connect(running), connect(running) as waiting:
        for _ in range(20):
            with lingering() as left:
                socket.send_fds(waiting, [b"x"], [left.fileno()])
        assert_stops(running)


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """A file on a FUSE file system that answers this process only."""
    folder = tmp_path / "silent"
    folder.mkdir()
    command = [sys.executable, "-S", str(FUSE), str(folder), str(os.getpid())]
    with spawned(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        yield folder / "file"
        process.communicate()
        assert process.returncode == 0


def send_files(sock: socket.socket, data: bytes, path: Path, count: int = 1) -> None:
    """Send descriptors of which none is left here: processes that start here would close them."""
    files = [os.open(path, os.O_RDWR) for _ in range(count)]
    with suppress(OSError):  # the daemon may have ended the connection
        socket.send_fds(sock, [data], files)
    for fd in files:
        os.close(fd)


@pytest.mark.needs_root
def test_file_whose_close_waits_for_ever(running: Daemon, silent: Path) -> None:
    for how, data in LEFT.items():
        with connect(running) as sock:
            for _ in range(3):
                send_files(sock, data, silent)
        assert_serves(running, how)


@pytest.mark.needs_root
def test_image_is_free_after_a_stop_although_a_close_waits(
    running: Daemon, silent: Path, daemon: DaemonFactory
) -> None:
    """The kernel keeps the process as long as its thread waits; the next one can start."""
    with connect(running) as sock:
        send_files(sock, LEFT["message without descriptors"], silent)
        assert sock.recv(20) == b""  # refused
    assert_serves(running)
    running.send(signal.SIGTERM)
    until(lambda: not running.socket_path.exists())
    until(lambda: state_of(running) == "Z")
    assert_serves(daemon())


@pytest.mark.needs_root
def test_more_files_than_threads_to_close_them(running: Daemon, silent: Path) -> None:
    """The rest stays open, with the front-end's own end: then the daemon ends the connection."""
    refused = message(Request.SET_VRING_NUM, bytes(8), wire.FLAG_NEED_REPLY)
    with connect(running) as sock:
        for _ in range(8):
            send_files(sock, refused, silent, 8)
        with suppress(OSError):
            socket.send_fds(sock, [LEFT["request channel"]], [sock.fileno()])
    assert_serves(running)


def state_of(running: Daemon) -> str:
    """The state of the process's first thread, as ps shows it."""
    return Path(f"/proc/{running.pid}/stat").read_text().rpartition(")")[2].split()[0]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
