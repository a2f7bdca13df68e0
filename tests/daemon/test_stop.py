# SPDX-License-Identifier: Apache-2.0
"""The end of a daemon: by a signal or with its only front-end."""

from __future__ import annotations

import signal
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.support.daemon import GET_FEATURES, OFFERED, Launch, connect, greet, until
from tests.support.documents import ROOT
from tests.support.driver import KEY
from vhost_rpmb.driver.errors import ClientError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.testing import RunningDevice
from vhost_rpmb.vhost_user import wire


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_an_idle_daemon(launch: Launch, path: Path, number: int) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    process.stop(number)
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_stops_a_daemon_with_front_ends(launch: Launch, path: Path, number: int) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    with connect(path) as sock, connect(path) as waiting:
        assert greet(sock) == OFFERED
        sock.sendall(GET_FEATURES[:7])
        process.stop(number)
        for end in (sock, waiting):
            with suppress(ConnectionError):  # a reset if something was not read yet
                assert end.recv(100) == b""
    assert not path.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_under_load_keeps_every_answered_write(
    launch: Launch, path: Path, engine: Engine, number: int
) -> None:
    process = launch(f"--socket-path={path}", "-v", engine=engine.name).ready()
    written = []

    def write() -> None:
        with suppress(ClientError), RpmbClient.connect(str(path)) as client:
            client.program_key(KEY)
            for counter in range(1_000_000):
                written.append(client.write(counter % 8, bytes(256), counter))

    guest = threading.Thread(target=write)
    guest.start()
    until(lambda: len(written) > 20 or not guest.is_alive())
    process.stop(number)
    guest.join()
    process = launch(f"--socket-path={path}", "-v", engine=engine.name).ready()
    with RpmbClient.connect(str(path), KEY) as client:
        assert client.read_counter() in (len(written), len(written) + 1)
    process.stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_repeated_signals_stop_the_daemon_cleanly(launch: Launch, path: Path, number: int) -> None:
    process = launch(f"--socket-path={path}", "-v").ready()
    for _ in range(5):
        process.send(number)
    assert process.ended() == 0


@pytest.mark.parametrize("step", range(12))
def test_signal_during_the_start_leaves_nothing_behind(
    launch: Launch, path: Path, step: int
) -> None:
    """Before the daemon takes the signal over it has nothing open: it may just die."""
    process = launch(f"--socket-path={path}")
    time.sleep(0.03 * step)
    process.send(signal.SIGTERM)
    assert process.ended() in (0, -signal.SIGTERM)
    assert not path.exists()
    launch(f"--socket-path={path}", "-v").ready().stop()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_with_an_open_state_stops_cleanly(launch: Launch, path: Path, number: int) -> None:
    process = launch(f"--socket-path={path}")
    until(Path(f"{process.flash}.state").exists)
    process.stop(number)
    assert not path.exists()


def test_once_ends_with_the_first_front_end(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "--once", "-v").ready()
    with connect(path) as sock:
        assert greet(sock) == OFFERED
        assert path.exists()
    assert process.ended() == 0
    assert not path.exists()


SIGNALLED_AT_THE_END = """
import os, sys

class Late:
    # The interpreter deletes it after it has restored the dispositions of signals.
    def __del__(self, kill=os.kill, process=os.getpid(), number={number:d}):
        kill(process, number)

sys.path.insert(0, {folder!r})
from vhost_rpmb.cli import main
sys.late = Late()
sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_at_the_very_end_makes_no_failure(tmp_path: Path, number: int) -> None:
    """As one that comes when the only front-end has left already."""
    device = RunningDevice(tmp_path, "--once", "--sandbox=off")  # in it no signal can be sent
    program = SIGNALLED_AT_THE_END.format(number=number, folder=str(ROOT))
    device.command_line[: device.command_line.index("vhost_rpmb") + 1] = [
        *(sys.executable, "-S", "-I", "-c", program)
    ]
    device.start()
    with device.client() as client:
        client.program_key(KEY)
    assert device._process is not None
    assert device._process.wait() == 0


def test_once_ends_with_a_front_end_that_breaks_the_protocol(launch: Launch, path: Path) -> None:
    process = launch(f"--socket-path={path}", "--once", "-v").ready()
    with connect(path) as sock:
        sock.sendall(bytes(wire.HEADER_SIZE))
        assert sock.recv(1) == b""
    assert process.ended() == 0
    assert "broke the protocol: message 0: expected protocol version 1" in process.log
