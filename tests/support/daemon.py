# SPDX-License-Identifier: Apache-2.0
"""Daemons as processes: `Daemon` is ready when it has started, `Process` is any other start."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vhost_rpmb.rpmb import spec
from vhost_rpmb.testing import RunningDevice
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request
from vhost_rpmb.virtio import features

# Seconds to wait for a state that comes at once on a machine without other work.
PATIENCE = 120.0
# What a daemon of a test is started with: under coverage it writes a file at its end, which the
# sandbox refuses; and QEMU's user emulation has no sandbox.
NO_SANDBOX = "COVERAGE_PROCESS" in str(os.environ.keys()) or "VHOST_RPMB_EMULATED" in os.environ
SANDBOX = ["--sandbox=off"] if NO_SANDBOX else []


def environment(options: Sequence[str] = ("--sandbox=on",)) -> dict[str, str]:
    """The environment of a process, without coverage if it is to be in the sandbox.

    Without that of the worker either: a suite that the process runs is not distributed.
    """
    left_out = ("PYTEST_XDIST", *(["COVERAGE"] if "--sandbox=on" in options else []))
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


GET_FEATURES = struct.pack("=III", Request.GET_FEATURES, wire.VERSION, 0)
OFFERED = features.DEFAULT | wire.F_PROTOCOL_FEATURES


class Daemon(RunningDevice):
    """A daemon of one engine, not yet started; image, socket and log stand in its folder."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        engine: str | None = None,
        sandbox: Sequence[str] = (),
        inject: str | None = None,
        home: Sequence[str] = (),
    ) -> None:
        """``home``: options that name the home of the device's state in place of an image."""
        super().__init__(folder, *sandbox, *options, inject=inject)
        if home:
            at = self.command_line.index(f"--flash-path={self.flash_path}")
            self.command_line[at : at + 1] = home
        kept = environment(options)
        self.environment = {k: v for k, v in self.environment.items() if k in kept}
        if engine is not None:
            self.environment["VHOST_RPMB_ENGINE"] = engine

    @property
    def running(self) -> bool:
        assert self._process is not None
        return self._process.poll() is None

    def send(self, number: int) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for the end of the daemon; return its exit status."""
        assert self._process is not None
        return self._process.wait(timeout)


DaemonFactory = Callable[..., Daemon]


def installed_program(name: str, module: str) -> list[str]:
    """How one of our console scripts is started: itself, or by its module if not installed."""
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.exists() else [sys.executable, "-m", module]


def installed_daemon(folder: Path, engine: str | None = None) -> Daemon:
    """A daemon as an operator starts it, with a key file; not yet started."""
    daemon = Daemon(folder, f"--key-path={folder / 'rpmb.key'}", "--verbose", engine=engine)
    options = daemon.command_line.index("vhost_rpmb") + 1
    daemon.command_line[:options] = installed_program("vhost-user-rpmb", "vhost_rpmb")
    return daemon


@contextmanager
def spawned(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[Any]]:
    """A process of any program; killed at the end, also if the test fails."""
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            process.kill()


class Process:
    """A vhost-user-rpmb with any options, started and not waited for."""

    def __init__(
        self,
        directory: Path,
        *arguments: str,
        engine: str = "pure",
        pass_fds: tuple[int, ...] = (),
        variables: dict[str, str] | None = None,
    ) -> None:
        self.flash = directory / "flash"
        if not self.flash.exists():
            self.flash.write_bytes(bytes(spec.CAPACITY_UNIT))
        self._log = directory / f"log-{time.monotonic_ns()}"
        with self._log.open("w") as log:
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vhost_rpmb", f"--flash-path={self.flash}"),
                    *SANDBOX,
                    *arguments,
                ],
                env=os.environ | {"VHOST_RPMB_ENGINE": engine} | (variables or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
            )
        self.pid = self._popen.pid

    @property
    def log(self) -> str:
        return self._log.read_text()

    def ready(self, text: str = "listening on") -> Process:
        """Wait until its log has this text, by default that of a start with -v."""
        until(lambda: text in self.log or self._popen.poll() is not None)
        assert self._popen.poll() is None, self.log
        return self

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def ended(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; return the exit status. It never ends with a traceback."""
        status = self._popen.wait(timeout)
        assert "Traceback" not in self.log
        return status

    def refused(self, *texts: str) -> None:
        """Check that it has ended with one line of error that holds these texts."""
        assert self.ended() == 2
        lines = self.log.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("vhost-user-rpmb: error: ")
        for text in texts:
            assert text in lines[0]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it as an operator does; it has to end cleanly and at once."""
        self.send(number)
        assert self.ended() == 0, self.log

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Resident memory in KiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS")


Launch = Callable[..., Process]


def listens(path: Path) -> bool:
    """Whether a process accepts connections at a socket path."""
    with socket.socket(socket.AF_UNIX) as probe:
        return not probe.connect_ex(str(path))


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


def greet(sock: socket.socket) -> int:
    """Ask a daemon for its features."""
    sock.sendall(GET_FEATURES)
    return wire.unpack_u64(sock.recv(100)[wire.HEADER_SIZE :])


def until(condition: Callable[[], bool]) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "the condition did not become true in time"
        time.sleep(0.005)


def processor_time(pid: int) -> float:
    """The processor time of a process in seconds, by its clock: see clock_getcpuclockid(3)."""
    return time.clock_gettime(~pid << 3 | 2)


def is_asleep(pid: int) -> bool:
    """Whether a process waits for something."""
    return _state(pid) == "S"


def is_stopped(pid: int) -> bool:
    """Whether a signal has stopped a process, which SIGCONT lets continue."""
    return _state(pid) == "T"


def _state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
