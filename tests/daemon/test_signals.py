# SPDX-License-Identifier: Apache-2.0
"""Signals that the parent left blocked or ignored: both programs work all the same."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, SANDBOX, is_asleep, spawned, until
from tests.support.oracle import read_counter
from tests.support.raw import enable_again_and_again, hammer
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring, Segment
from vhost_rpmb.engine import Engine
from vhost_rpmb.testing import RunningDevice

KEY = bytes(range(32))
# Starts a command as the worst of parents would.
START = """
import os, signal, sys
for number in (signal.SIGALRM, signal.SIGPIPE, signal.SIGBUS):
    signal.signal(number, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
os.execv(sys.argv[1], sys.argv[1:])
"""
PARENT = [sys.executable, "-c", START]


def wait_for_sleep(pid: int) -> None:
    """Wait until a process sleeps in a system call."""
    until(lambda: is_asleep(pid))


@pytest.fixture
def device(engine: Engine, tmp_path: Path) -> Iterator[RunningDevice]:
    """A running device with a key whose parent blocked every signal and ignored some."""
    device = RunningDevice(tmp_path, *SANDBOX)
    device.command_line = [*PARENT, *device.command_line]
    device.environment["VHOST_RPMB_ENGINE"] = engine.name
    device.start()
    with device.client() as client:
        client.program_key(KEY)
    yield device
    device.kill()


@pytest.fixture
def frontend(device: RunningDevice) -> Iterator[Frontend]:
    with Frontend.connect(str(device.socket_path)) as frontend:
        frontend.handshake()
        frontend.start_device(0)
        yield frontend


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory(sealed=False) as memory:
        yield memory


def ask(ring: Ring) -> None:
    """Add a request and kick."""
    request = ring.memory.allocate(1024)
    ring.memory.write(request, read_counter())
    ring.add([Segment(request, 512)], [Segment(request + 512, 512)])
    ring.publish()
    ring.kick()


def test_no_signal_stays_blocked(device: RunningDevice, frontend: Frontend) -> None:
    """Those that interrupt a blocked write and report lost memory have handlers."""
    with GuestMemory() as memory:
        frontend.share_memory(memory)
        status = Path(f"/proc/{device.pid}/status").read_text()
    masks = dict(line.split(":\t") for line in status.splitlines() if line.startswith("Sig"))
    assert int(masks["SigBlk"], 16) == 0
    for number in (signal.SIGALRM, signal.SIGBUS):
        assert int(masks["SigCgt"], 16) >> number - 1 & 1, number


def ends(device: RunningDevice, number: int = signal.SIGTERM) -> None:
    """Check that the signal ends it, cleanly."""
    process = device._process
    assert process is not None
    process.send_signal(number)
    assert process.wait(PATIENCE) == 0, device.log


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_daemon(device: RunningDevice, number: int) -> None:
    ends(device, number)


def test_full_call_eventfd_does_not_hold_the_daemon(
    device: RunningDevice, frontend: Frontend, memory: GuestMemory
) -> None:
    """A write to it would block, and is left out; the stop is served."""
    with Ring(memory) as ring:
        frontend.share_memory(memory)
        frontend.start_ring(ring)
        os.set_blocking(ring.call_fd, True)
        os.eventfd_read(ring.call_fd)  # the signal that comes when a vring starts
        os.eventfd_write(ring.call_fd, 2**64 - 2)
        ask(ring)
        until(lambda: ring.used_index == 1)
        wait_for_sleep(device.pid)
        ends(device)


def test_call_eventfd_that_is_filled_at_the_last_moment(
    device: RunningDevice, frontend: Frontend, memory: GuestMemory
) -> None:
    """Another process fills it between a look and a write, which then blocks: a timer ends that."""
    with Ring(memory) as ring:
        frontend.share_memory(memory)
        frontend.start_ring(ring)
        os.set_blocking(ring.call_fd, True)
        with hammer("refill", ring.call_fd):
            enable_again_and_again(frontend)
            ends(device)


def test_guest_memory_that_is_truncated_does_not_end_the_daemon(
    device: RunningDevice, frontend: Frontend, memory: GuestMemory
) -> None:
    with Ring(memory) as ring:
        frontend.share_memory(memory)
        frontend.start_ring(ring)
        os.set_blocking(ring.error_fd, True)
        os.ftruncate(memory.regions[0].fd, 0)
        ring.kick()
        assert os.eventfd_read(ring.error_fd)  # the ring is broken
        frontend.get_status()
    frontend.close()
    with device.client(KEY) as client:
        assert client.read_counter() == 0
    device.stop()


def test_closed_output_pipe_ends_the_client_with_an_error(device: RunningDevice) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [
            *(*PARENT, sys.executable, "-m", "vhost_rpmb.client"),
            *(f"--socket-path={device.socket_path}", "info"),
        ],
        stdout=writer,
        stderr=subprocess.PIPE,
        timeout=PATIENCE,
        check=False,
    )
    os.close(writer)
    assert (done.returncode, b"Broken pipe" in done.stderr) == (1, True), done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_the_client(tmp_path: Path, number: int) -> None:
    path = str(tmp_path / "socket")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        with spawned(
            [
                *(*PARENT, sys.executable, "-m", "vhost_rpmb.client"),
                *(f"--socket-path={path}", "read-counter"),
            ]
        ) as client:
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(12)
                wait_for_sleep(client.pid)  # for the answer
                client.send_signal(number)
                assert client.wait(PATIENCE) == (
                    130 if number == signal.SIGINT else -signal.SIGTERM
                )
