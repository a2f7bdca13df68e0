# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.rig import PATIENCE, SANDBOX, Rig, make_image
from vhost_rpmb import engine as engines


def pytest_configure() -> None:
    # What a script starts with & ignores SIGINT, and so would everything that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what only root can run, where it is another user: the summary counts it."""
    if os.geteuid() != 0:
        left_out = [item for item in items if item.get_closest_marker("needs_root")]
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


@pytest.fixture(params=engines.ENGINES)
def engine(request: pytest.FixtureRequest) -> engines.Engine:
    """Each engine in turn: a behaviour test runs on both."""
    return engines.load(request.param)


@pytest.fixture
def flash(tmp_path: Path) -> Path:
    """A fresh image of 128 KiB."""
    return make_image(tmp_path / "flash.img")


RigFactory = Callable[..., Rig]


@pytest.fixture
def make_rig(engine: engines.Engine, flash: Path) -> Iterator[RigFactory]:
    """Make rigs on one engine and, unless told otherwise, one image; closed at the end."""
    rigs: list[Rig] = []

    def make(path: Path = flash, **options: object) -> Rig:
        rigs.append(Rig(engine, path, **options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        if rig.guest.regions:
            rig.close()


@pytest.fixture
def rig(make_rig: RigFactory) -> Rig:
    """A device on a fresh image, without a key."""
    return make_rig()


@pytest.fixture
def keyed(rig: Rig) -> Rig:
    """A device whose key is programmed."""
    rig.program()
    return rig


@dataclass
class Daemon:
    """A running vhost-user-rpmb and where it keeps its files."""

    process: subprocess.Popen[str]
    socket_path: Path
    flash_path: Path

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def stop(self) -> str:
        """End it as an operator would; it has to end cleanly. Return what it said."""
        self.process.send_signal(signal.SIGTERM)
        _, errors = self.process.communicate(timeout=PATIENCE)
        assert self.process.returncode == 0, errors
        return errors


DaemonFactory = Callable[..., Daemon]


@pytest.fixture
def daemon(engine: engines.Engine, flash: Path, tmp_path: Path) -> Iterator[DaemonFactory]:
    """Start real daemons on one engine and one image; killed at the end if still there."""
    started: list[Daemon] = []

    def start(*options: str, flash_path: Path = flash) -> Daemon:
        path = tmp_path / f"vhost{len(started)}.sock"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "vhost_rpmb",
                f"--socket-path={path}",
                f"--flash-path={flash_path}",
                *SANDBOX,
                *options,
            ],
            env=environment(options) | {"VHOST_RPMB_ENGINE": engine.name},
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(Daemon(process, path, flash_path))
        wait_for_socket(process, path)
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.kill()
        elif running.process.stderr and not running.process.stderr.closed:
            running.process.communicate()


def environment(options: Sequence[str] = ("--sandbox=on",)) -> dict[str, str]:
    """The environment of a process, without coverage if it is to be in the sandbox."""
    if "--sandbox=on" not in options:
        return dict(os.environ)
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


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
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "S"


def wait_for_socket(process: subprocess.Popen[str], path: Path) -> None:
    """Wait until a daemon listens; fail with what it says if it ends instead."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise AssertionError(f"the daemon ended: {process.communicate()[1]}")
        with socket.socket(socket.AF_UNIX) as probe:
            if path.exists() and not probe.connect_ex(str(path)):
                return
        time.sleep(0.005)
    raise AssertionError("the daemon does not listen")
