# SPDX-License-Identifier: Apache-2.0
"""Real daemons, killed between any two messages of a migration: exactly one of them answers.

A service manager keeps their connections, so that the front-end goes on as if nothing had happened.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.campaign import sample
from tests.support.daemon import PATIENCE
from tests.support.hosts import ACCEPTED, SETUP, MovingFrontend, StateRefusedError, resume
from tests.support.oracle import KEY
from tests.support.rig import write_key
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import BackendError, QueueError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user.wire import StateDirection

COUNTER = 16  # of a full device, whose state is more than a pipe holds
STEPS = 10
SIDES = ("source", "destination")


class Move:
    """The front-end of both sides; `steps` stops between any two messages."""

    def __init__(self, folder: Path, engine: Engine, mode: str, stack: ExitStack) -> None:
        shared = folder / "shared"
        write_key(folder / "rpmb.key", KEY)
        (folder / "fence").mkdir()
        self.hosts: dict[str, Supervised] = {}
        for side in SIDES:
            home = shared if mode == "shared" else folder / side
            home.mkdir(exist_ok=True)
            options = [f"--migration={mode}"]
            if mode == "copy":
                options.append(f"--fence-path={folder / 'fence'}")
                options.append(f"--key-path={home / 'rpmb.key'}")
                write_key(home / "rpmb.key", KEY)
            if side == "destination":
                options.append("--incoming")
            (home / "socket").unlink(missing_ok=True)
            self.hosts[side] = stack.enter_context(Supervised(home, *options, engine=engine.name))
            if side == "source":
                self.here = stack.enter_context(self._machine("source"))
                self.here.program_key(KEY)
                for start in range(0, 32 * COUNTER, 32):
                    self.here.write(start, bytes([start // 32]) * 8192)
        self._stack = stack
        self.arriving = MovingFrontend.connect(self.hosts["destination"].path, timeout=PATIENCE)
        stack.enter_context(self.arriving)
        self.blob = b""
        self.complete = False

    def _machine(self, side: str) -> RpmbClient:
        frontend = MovingFrontend.connect(self.hosts[side].path, timeout=PATIENCE)
        return RpmbClient(frontend, timeout=PATIENCE, setup=SETUP)

    def steps(self) -> Iterator[None]:
        """Move the device; StateRefusedError and OSError end it as a front-end would."""
        source = self.here.frontend
        assert isinstance(source, MovingFrontend)
        source.stop_ring()
        yield
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=0) as file:
            self._accepted(source.transfer(StateDirection.SAVE, writing), writing)
            yield
            parts = [file.read(1 << 12)]
            yield
            while part := file.read(1 << 20):
                parts.append(part)
        yield
        self._good(source.check())
        self.blob, self.complete = b"".join(parts), True
        yield
        self.arriving.handshake(SETUP.protocol_features)
        yield
        reading, writing = os.pipe()
        with open(writing, "wb", buffering=0) as file:
            self._accepted(self.arriving.transfer(StateDirection.LOAD, reading), reading)
            yield
            file.write(self.blob[: 1 << 12])
            yield
            rest = memoryview(self.blob)[1 << 12 :]
            while rest:
                rest = rest[file.write(rest) :]
        yield
        self._good(self.arriving.check())
        yield

    def _accepted(self, reply: int, fd: int) -> None:
        os.close(fd)
        if reply != ACCEPTED:
            raise StateRefusedError

    def _good(self, reply: int) -> None:
        if reply:
            raise StateRefusedError

    def answers(self, side: str) -> bool:
        """Whether a side answers when its machine runs; with all data, if so."""
        machine = self.here
        if side == "destination":
            if not self.complete:
                return False
            self.arriving.handshake(SETUP.protocol_features)  # a machine that is started again
            with suppress(StateRefusedError, BackendError):
                self.arriving.load(self.blob)
            machine = self._stack.enter_context(
                RpmbClient(self.arriving, KEY, timeout=PATIENCE, setup=SETUP)
            )
        else:
            resume(machine)
        try:
            assert machine.read_counter() == COUNTER
        except QueueError:
            return False
        assert machine.read(0, 512) == b"".join(bytes([n]) * 8192 for n in range(COUNTER))
        assert machine.write(0, b"z" * 256) == COUNTER + 1
        return True


@pytest.mark.parametrize("mode", ["copy", "shared"])
@pytest.mark.parametrize(
    ("step", "side", "first"),
    sample([(step, side, first) for step in range(STEPS) for side in SIDES for first in SIDES]),
)
def test_killed_daemons(
    tmp_path: Path, engine: Engine, mode: str, step: int, side: str, first: str
) -> None:
    with ExitStack() as stack:
        move = Move(tmp_path, engine, mode, stack)
        with suppress(StateRefusedError, BrokenPipeError):
            for number, _ in enumerate(move.steps()):
                if number == step:
                    move.hosts[side].manager.restart(signal.SIGKILL)
        order = SIDES if first == "source" else SIDES[::-1]
        answering = [name for name in order if move.answers(name)]
        assert len(answering) == 1
        if not move.complete:
            assert answering == ["source"]
        for host in move.hosts.values():
            assert "Traceback" not in host.manager.log
