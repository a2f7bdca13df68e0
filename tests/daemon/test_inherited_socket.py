# SPDX-License-Identifier: Apache-2.0
"""A socket that a daemon inherits: listening, connected, or none."""

from __future__ import annotations

import os
import socket
from contextlib import closing
from pathlib import Path

import pytest

from tests.support.daemon import OFFERED, PATIENCE, Launch, connect, greet
from vhost_rpmb.daemon import listener
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import UsageError


def test_listening_socket_is_served_and_kept(launch: Launch, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        process = launch(f"--fd={fd}", "-v", pass_fds=(fd,))
        for _ in range(3):
            with connect(path) as sock:
                assert greet(sock) == OFFERED
    process.stop()
    assert path.exists()  # not ours


def test_once_serves_one_connection_of_a_listening_socket(launch: Launch, path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        fd = listener.fileno()
        process = launch(f"--fd={fd}", "--once", pass_fds=(fd,))
        with connect(path) as sock:
            assert greet(sock) == OFFERED
        assert process.ended() == 0
    assert path.exists()  # the socket belongs to the process that made it


def test_connected_socket_is_served_until_its_end(launch: Launch, engine: Engine) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with far:
        fd = far.fileno()
        process = launch(f"--fd={fd}", "-v", engine=engine.name, pass_fds=(fd,))
    with RpmbClient(Frontend(near)) as client:
        assert client.config == (1, 32, 255)
    assert process.ended() == 0


def test_signal_closes_a_connected_socket(launch: Launch) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with near:
        with far:
            process = launch(f"--fd={far.fileno()}", pass_fds=(far.fileno(),))
        near.settimeout(PATIENCE)
        assert greet(near) == OFFERED
        process.stop()
        assert near.recv(1) == b""


@pytest.mark.parametrize(
    ("family", "kind", "found"),
    [
        (socket.AF_UNIX, socket.SOCK_DGRAM, "another kind of socket"),
        (socket.AF_UNIX, socket.SOCK_SEQPACKET, "another kind of socket"),
        (socket.AF_INET, socket.SOCK_STREAM, "another kind of socket"),
        (socket.AF_UNIX, socket.SOCK_STREAM, "does neither"),
    ],
)
def test_other_socket_is_refused(
    launch: Launch, family: socket.AddressFamily, kind: socket.SocketKind, found: str
) -> None:
    with socket.socket(family, kind) as sock:
        fd = sock.fileno()
        launch(f"--fd={fd}", pass_fds=(fd,)).refused(f"--fd={fd}", "listens or is connected", found)


def test_file_is_refused(launch: Launch, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        fd = file.fileno()
        launch(f"--fd={fd}", pass_fds=(fd,)).refused("Socket operation on non-socket")


def test_descriptor_opened_with_o_path_is_refused(launch: Launch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "s"))
        fd = os.open(tmp_path / "s", os.O_PATH)
    launch(f"--fd={fd}", pass_fds=(fd,)).refused(f"--fd={fd}: expected", "with O_PATH")
    os.close(fd)


@pytest.mark.parametrize("fd", [3, 7, 500, 2**31 - 1])
def test_unopened_descriptor_is_refused(launch: Launch, fd: int) -> None:
    launch(f"--fd={fd}").refused(f"--fd={fd}: expected a UNIX stream socket")


def test_adopted_socket_is_not_inheritable() -> None:
    near, far = socket.socketpair()
    fd = os.dup(far.fileno())
    os.set_inheritable(fd, True)
    with near, far:
        sock, listening = listener.adopt(fd)
        with closing(sock):
            assert not listening
            assert sock.fileno() == fd
            assert not os.get_inheritable(fd)


def test_refused_descriptor_is_closed() -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        fd = os.dup(sock.fileno())
    with pytest.raises(UsageError):
        listener.adopt(fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
