# SPDX-License-Identifier: Apache-2.0
"""Front-ends that a daemon serves, one after the other."""

from __future__ import annotations

import os
import resource
import socket
import struct
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import (
    GET_FEATURES,
    OFFERED,
    PATIENCE,
    Launch,
    Process,
    connect,
    greet,
    is_asleep,
    listens,
    until,
)
from tests.support.driver import KEY
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request


def set_limit(process: Process, fds: int) -> None:
    """Let a daemon have no descriptor from this number on."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (fds, hard))


@pytest.fixture
def running(launch: Launch, path: Path, engine: Engine) -> Process:
    """A daemon that waits for a front-end, with its start complete."""
    process = launch(f"--socket-path={path}", "-v", engine=engine.name).ready()
    with connect(path) as sock:
        assert greet(sock) == OFFERED
    until(lambda: "front-end disconnected" in process.log and is_asleep(process.pid))
    return process


def test_requests_are_served(running: Process, path: Path) -> None:
    with RpmbClient.connect(str(path)) as client:
        assert client.config == (1, 32, 255)
        client.program_key(KEY)
        assert client.write(3, b"x" * 256) == 1
    with RpmbClient.connect(str(path), KEY) as client:
        assert client.read(3, 1) == b"x" * 256
        assert client.read_counter() == 1
    running.stop()


def test_next_front_end_is_served_after_a_disconnect(running: Process, path: Path) -> None:
    with RpmbClient.connect(str(path)) as client:
        client.program_key(KEY)
    for counter in range(5):
        client = RpmbClient.connect(str(path), KEY)
        client.submit(client.write_request(0, bytes(256), counter), spec.FRAME_SIZE)
        client.flush()
        client.answers()
        client._resources.close()  # without a farewell
    running.stop()


@pytest.mark.memory
def test_connections_leak_no_memory_or_descriptor(running: Process, path: Path) -> None:
    fds = running.fds()
    with RpmbClient.connect(str(path)) as client:
        client.program_key(KEY)

    def visit(count: int) -> None:
        for number in range(count):
            if number % 10 == 0:
                with RpmbClient.connect(str(path), KEY) as client:
                    assert client.read_counter() == 0
            else:
                with connect(path) as sock:
                    assert greet(sock) == OFFERED

    visit(50)
    memory = running.memory()
    visit(400)
    until(lambda: running.fds() == fds)
    assert running.memory() - memory < 2048
    running.stop()


def test_peers_that_break_the_protocol_are_disconnected(running: Process, path: Path) -> None:
    fds = running.fds()
    eventfd = os.eventfd(0)
    attacks: list[tuple[bytes, list[int]]] = [
        (b"\0", []),
        (GET_FEATURES[:5], [eventfd] * 5),
        (os.urandom(4096), []),
        (GET_FEATURES + b"\1", [eventfd] * 200),
        (struct.pack("=III", Request.SET_MEM_TABLE, wire.VERSION, 0xFFFF_FFFF), [eventfd]),
        (struct.pack("=IIIQ", Request.SET_VRING_KICK, wire.VERSION, 8, 0), [eventfd]),
    ]
    begin = time.monotonic()
    for _ in range(10):
        for data, descriptors in attacks:
            with connect(path) as sock:
                socket.send_fds(sock, [data], descriptors)
    os.close(eventfd)
    with connect(path) as sock:
        assert greet(sock) == OFFERED
    until(lambda: running.fds() == fds)
    lines = running.log.count("broke the protocol")  # of many: one in ten seconds
    assert 1 <= lines <= 1 + (time.monotonic() - begin) / 10
    running.stop()


def test_one_front_end_is_served_at_a_time(running: Process, path: Path) -> None:
    with connect(path) as first, connect(path) as second, connect(path) as third:
        assert greet(first) == OFFERED
        second.sendall(GET_FEATURES)
        second.settimeout(0.2)
        with pytest.raises(TimeoutError):
            second.recv(100)
        third.close()  # gives up waiting
        first.close()
        second.settimeout(PATIENCE)
        assert len(second.recv(100)) == 20
    with connect(path) as sock:
        assert greet(sock) == OFFERED
    running.stop()


def test_few_descriptors_are_enough(running: Process, path: Path) -> None:
    """One for a front-end, however many wait; those that a message brings are given back."""
    fds = running.fds()
    set_limit(running, fds + 2)
    with ExitStack() as stack:
        first, second, *_ = [stack.enter_context(connect(path)) for _ in range(30)]
        eventfd = os.eventfd(0)
        socket.send_fds(first, [GET_FEATURES], [eventfd] * 20)
        os.close(eventfd)
        assert first.recv(100) == b""
        assert greet(second) == OFFERED
    assert "GET_FEATURES: some of its file descriptors were lost" in running.log
    running.stop()


def test_front_end_waits_until_a_descriptor_is_free(running: Process, path: Path) -> None:
    set_limit(running, running.fds())
    with connect(path) as sock:
        until(lambda: "a front-end cannot be accepted: Too many open files" in running.log)
        set_limit(running, 100)
        assert greet(sock) == OFFERED
    assert running.log.count("cannot be accepted") == 1
    running.stop()


def test_slow_peer_is_served(running: Process, path: Path) -> None:
    with connect(path) as sock:
        for byte in GET_FEATURES:
            sock.sendall(bytes([byte]))
            time.sleep(0.01)
        assert len(sock.recv(100)) == 20
    running.stop()


def test_image_is_updated_when_idle(running: Process, path: Path) -> None:
    with RpmbClient.connect(str(path)) as client:
        client.program_key(KEY)
        client.write(5, b"idle" * 64)
        until(lambda: running.flash.read_bytes()[5 * 256 :].startswith(b"idle" * 64))
    running.stop()


def test_nothing_is_logged_without_v(launch: Launch, path: Path, engine: Engine) -> None:
    process = launch(f"--socket-path={path}", engine=engine.name)
    until(lambda: listens(path))
    with Frontend.connect(str(path)) as frontend:
        frontend.handshake()
    process.stop()
    assert process.log == ""


def test_messages_are_logged_with_vv(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "-vv").ready()
    with connect(path) as sock:
        greet(sock)
    process.stop()
    assert "debug: GET_FEATURES: flags 0x1, 0 bytes, 0 file descriptors" in process.log
