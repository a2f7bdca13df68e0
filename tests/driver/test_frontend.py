# SPDX-License-Identifier: Apache-2.0
"""The front-end against back-ends that misbehave."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE
from tests.support.driver import open_fds
from vhost_rpmb.driver.errors import BackendError, RequestRefusedError
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request

pytestmark = pytest.mark.usefixtures("no_leaks")


@pytest.fixture
def peers() -> Iterator[tuple[Frontend, socket.socket]]:
    ours, theirs = socket.socketpair()
    with theirs, Frontend(ours, timeout=PATIENCE) as frontend:
        yield frontend, theirs


def wait_less(frontend: Frontend) -> None:
    """Let a front-end give up soon, where its back-end is known to stay silent."""
    frontend._timeout = 0.2


def test_silent_back_end_times_out(peers: tuple[Frontend, socket.socket]) -> None:
    wait_less(peers[0])
    with pytest.raises(BackendError, match=r"did not answer within 0\.2 s"):
        peers[0].ask_u64(Request.GET_FEATURES)


def test_slow_bytes_do_not_extend_the_timeout(
    peers: tuple[Frontend, socket.socket],
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


def test_disconnect_is_reported(peers: tuple[Frontend, socket.socket]) -> None:
    frontend, theirs = peers
    theirs.close()
    for _ in range(2):
        with pytest.raises(BackendError, match="closed the connection"):
            frontend.ask_u64(Request.GET_FEATURES)


def test_disconnect_in_the_middle_of_a_message_is_reported(
    peers: tuple[Frontend, socket.socket],
) -> None:
    frontend, theirs = peers
    theirs.send(struct.pack("=III", Request.GET_FEATURES, 5, 8) + b"1234")
    theirs.shutdown(socket.SHUT_WR)
    with pytest.raises(BackendError, match="in the middle of a message"):
        frontend.ask_u64(Request.GET_FEATURES)


def test_back_end_that_does_not_read_times_out(peers: tuple[Frontend, socket.socket]) -> None:
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
def test_invalid_reply_is_refused(
    peers: tuple[Frontend, socket.socket], reply: bytes, text: str
) -> None:
    frontend, theirs = peers
    theirs.send(reply)
    with pytest.raises(BackendError, match=text):
        frontend.ask_u64(Request.GET_FEATURES)


def test_descriptors_are_refused_and_not_received(peers: tuple[Frontend, socket.socket]) -> None:
    frontend, theirs = peers
    before = open_fds()
    fds = os.pipe()
    wire.send_message(theirs, Request.GET_FEATURES, wire.FLAG_REPLY, bytes(8), fds)
    for fd in fds:
        os.close(fd)
    for _ in range(2):  # nothing behind them is read either
        with pytest.raises(BackendError, match="expected no file descriptors"):
            frontend.ask_u64(Request.GET_FEATURES)
        assert open_fds() == before


def test_descriptors_in_the_middle_of_a_message_are_refused(
    peers: tuple[Frontend, socket.socket],
) -> None:
    frontend, theirs = peers
    fds = os.pipe()
    theirs.send(b"\x01")
    socket.send_fds(theirs, [b"\0\0\0"], fds)
    for fd in fds:
        os.close(fd)
    with pytest.raises(BackendError, match="expected no file descriptors"):
        frontend.ask_u64(Request.GET_FEATURES)


def test_negative_acknowledgement_is_an_error(peers: tuple[Frontend, socket.socket]) -> None:
    frontend, theirs = peers
    frontend.protocol_features = ProtocolFeature.REPLY_ACK
    wire.send_message(theirs, Request.SET_OWNER, wire.FLAG_REPLY, wire.pack_u64(1))
    with pytest.raises(RequestRefusedError, match=r"refused SET_OWNER \(reply 1\)"):
        frontend.tell(Request.SET_OWNER)
    wire.send_message(theirs, Request.SET_OWNER, wire.FLAG_REPLY, wire.pack_u64(0))
    frontend.tell(Request.SET_OWNER)


def test_config_space_of_another_size_is_refused(peers: tuple[Frontend, socket.socket]) -> None:
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


def test_legacy_back_end_is_refused(peers: tuple[Frontend, socket.socket]) -> None:
    frontend, theirs = peers
    wire.send_message(theirs, Request.GET_FEATURES, wire.FLAG_REPLY, wire.pack_u64(1 << 30))
    with pytest.raises(BackendError, match="VIRTIO_F_VERSION_1"):
        frontend.handshake()


def test_connect_without_a_listener_is_an_error(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with pytest.raises(BackendError, match=f"cannot connect to {path}: No such file"):
        Frontend.connect(path)
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    with pytest.raises(BackendError, match="Connection refused; nothing listens"):
        Frontend.connect(path)
    with pytest.raises(BackendError, match="too long"):
        Frontend.connect(path + "x" * 200)


def test_connect_to_a_full_backlog_times_out(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen(0)
        with (
            Frontend.connect(path, timeout=0.2),
            pytest.raises(BackendError, match=r"accepted no connection within 0\.2 s"),
        ):
            Frontend.connect(path, timeout=0.2)
