# SPDX-License-Identifier: Apache-2.0
"""The socket that a daemon makes: its mode, its path, other files there."""

from __future__ import annotations

import os
import socket
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.support.daemon import OFFERED, Launch, Process, connect, greet
from vhost_rpmb import system
from vhost_rpmb.daemon import listener


def test_mode_does_not_depend_on_the_umask(launch: Launch, path: Path) -> None:
    umask = os.umask(0)
    try:
        process = launch(f"--socket-path={path}", "-v").ready()
    finally:
        os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o600
    process.stop()


def test_mode_is_set_before_the_socket_listens(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    class Observed(system.socket.socket):
        def bind(self, address: object) -> None:
            super().bind(address)  # type: ignore[arg-type]
            modes.append(path.stat().st_mode & 0o777)

    umask = os.umask(0)
    try:
        monkeypatch.setattr(system.socket, "socket", Observed)
        with ExitStack() as stack:
            listener.listen(str(path), None, stack)
        assert os.umask(0) == 0
    finally:
        os.umask(umask)
    assert modes == [0o600]
    assert not path.exists()


def test_stale_socket_is_replaced(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    process.kill()
    assert path.exists()
    process = launch(f"--socket-path={path}", "-v").ready()
    with connect(path) as sock:
        assert greet(sock) == OFFERED
    process.stop()


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_live_socket_is_refused_without_a_connection(
    launch: Launch, path: Path, kind: socket.SocketKind
) -> None:
    with socket.socket(socket.AF_UNIX, kind) as other:
        other.bind(str(path))
        if kind == socket.SOCK_STREAM:
            other.listen()
        other.setblocking(False)
        launch(f"--socket-path={path}").refused(str(path), "another process is listening")
        with pytest.raises(BlockingIOError):
            other.accept() if kind == socket.SOCK_STREAM else other.recv(1)
    assert path.is_socket()


def test_socket_of_another_daemon_is_refused(launch: Launch, path: Path, tmp_path: Path) -> None:
    process = launch(f"--socket-path={path}", "--once", "-v").ready()
    other = tmp_path / "other"
    other.mkdir()
    second = Process(other, f"--socket-path={path}")
    second.refused(str(path), "another process is listening")
    with connect(path) as sock:  # the attempt did not count as its one front-end
        assert greet(sock) == OFFERED
    assert process.ended() == 0


@pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
def test_other_file_is_refused_and_kept(
    launch: Launch, path: Path, tmp_path: Path, kind: str
) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
    elif kind == "link":
        path.symlink_to(tmp_path / "nowhere")
    else:
        os.mkfifo(path)
    before = path.lstat()
    launch(f"--socket-path={path}").refused(str(path), "another kind of file")
    assert os.path.samestat(path.lstat(), before)


def test_path_that_is_too_long_is_refused(launch: Launch, tmp_path: Path) -> None:
    length = 108 - len(os.fsencode(tmp_path)) - 1
    launch(f"--socket-path={tmp_path}/{'x' * length}").refused("at most 107 bytes, found 108")
    name = tmp_path / ("x" * (length - 1))
    launch(f"--socket-path={name}", "-v").ready().stop()


def test_missing_folder_is_refused(launch: Launch, tmp_path: Path) -> None:
    path = tmp_path / "missing" / "socket"
    launch(f"--socket-path={path}").refused(str(path), "No such file or directory")


def test_socket_of_a_successor_is_not_removed(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(path))
        process.stop()
        assert path.exists()


def test_stop_succeeds_without_the_socket(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    path.unlink()
    process.stop()


def test_no_socket_is_left_when_the_state_cannot_be_opened(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    second = launch(f"--socket-path={path}.2")
    assert second.ended() == 1
    assert len(second.log.splitlines()) == 1
    assert not Path(f"{path}.2").exists()
    process.stop()
