# SPDX-License-Identifier: Apache-2.0
"""The daemon is restarted or killed while the state of its device is transferred.

A service manager keeps the connection, not the transfer: that fails, both sides learn it, and the
front-end may repeat it. Exactly one host answers in the end.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests.migration.test_copy import is_fenced
from tests.support.daemon import PATIENCE
from tests.support.faulty import LOADING, POINTS, SAVING
from tests.support.hosts import (
    ACCEPTED,
    SETUP,
    PatientFrontend,
    leave,
    resume,
)
from tests.support.oracle import KEY
from tests.support.sides import Side
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user.wire import StateDirection

BLOCKS = 320  # more than a pipe takes
DATA = bytes(range(1, 256)) * BLOCKS + bytes([7]) * BLOCKS

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("untraced")]


@pytest.fixture
def mode(request: pytest.FixtureRequest) -> str:
    return str(getattr(request, "param", "copy"))


@pytest.fixture
def options(mode: str, copying: list[str]) -> list[str]:
    return copying if mode == "copy" else ["--migration=shared"]


@pytest.fixture
def source(engine: Engine, options: list[str], tmp_path: Path) -> Iterator[Side]:
    folder = tmp_path / "source"
    with Side(folder, engine, f"--flash-path={folder / 'flash.img'}", *options) as side:
        with side.machine() as machine:
            machine.program_key(KEY)
            for start in range(0, BLOCKS, 32):
                machine.write(start, DATA[start * 256 : (start + 32) * 256])
        yield side


@pytest.fixture
def destination(
    engine: Engine, mode: str, options: list[str], source: Side, tmp_path: Path
) -> Iterator[Side]:
    folder = tmp_path / "destination"
    flash = source.flash if mode == "shared" else folder / "flash.img"
    with Side(folder, engine, f"--flash-path={flash}", *options, "--incoming") as side:
        yield side


def holds(machine: RpmbClient) -> None:
    """Check that a machine has all of the device."""
    assert machine.read_counter() == BLOCKS // 32
    for start in range(0, BLOCKS, 32):
        assert machine.read(start, 32) == DATA[start * 256 : (start + 32) * 256]


def cases(points: Sequence[str], own: Sequence[str]) -> pytest.MarkDecorator:
    """Points of a transfer and of each message, and the mode's ``own`` in the other mode."""
    found = [pytest.param("copy", point) for point in points]
    found += [pytest.param("shared", point) for point in own]
    # Those of a message have tests of their own (tests/daemon/test_handover_messages.py).
    found += [
        pytest.param("copy", point, marks=() if point == "replied" else pytest.mark.long)
        for point in POINTS
    ]
    return pytest.mark.parametrize(("mode", "point"), found, indirect=["mode"])


@cases(SAVING, ("giving", "given", "moved"))
def test_killed_source_hands_over_again(source: Side, destination: Side, point: str) -> None:
    with source.machine(KEY, arming=partial(source.faults.arm, point)) as here:
        blob = leave(here)
        assert not source.faults.armed
        with destination.machine(KEY, blob) as there:
            holds(there)
            resume(here)
            is_fenced(here)


@pytest.mark.parametrize("point", SAVING)
def test_killed_source_continues(source: Side, destination: Side, point: str) -> None:
    """The migration is given up; whatever was sent is worth nothing from then on."""
    with source.machine(KEY, arming=partial(source.faults.arm, point)) as here:
        blob = leave(here)
        assert not source.faults.armed
        resume(here)
        holds(here)
        with destination.machine(KEY, blob) as there:
            is_fenced(there)


@cases(LOADING, ("moved", "loading", "loaded"))
def test_killed_destination_receives_again(source: Side, destination: Side, point: str) -> None:
    with source.machine(KEY) as here:
        blob = leave(here)
        with destination.machine(KEY, blob, partial(destination.faults.arm, point)) as there:
            assert not destination.faults.armed
            holds(there)
            resume(here)
            is_fenced(here)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
class TestPart:
    """Restarted when a part of the state was transferred, as `systemctl restart` does it."""

    def test_source(self, source: Side, destination: Side, number: int) -> None:
        with source.machine(KEY) as here:
            frontend = here.frontend
            assert isinstance(frontend, PatientFrontend)
            frontend.stop_ring()
            reading, writing = os.pipe()
            assert frontend.transfer(StateDirection.SAVE, writing) == ACCEPTED
            os.close(writing)
            with open(reading, "rb") as file:
                assert len(file.read(1000)) == 1000
                source.manager.restart(number)
                file.read()  # ends: no process keeps the pipe
            assert frontend.check() == 1
            with destination.machine(KEY, frontend.save()) as there:
                holds(there)
                resume(here)
                is_fenced(here)

    def test_destination(self, source: Side, destination: Side, number: int) -> None:
        with source.machine(KEY) as here:
            blob = leave(here)
            frontend = PatientFrontend.connect(destination.path, timeout=PATIENCE)
            frontend.handshake(SETUP.protocol_features)
            reading, writing = os.pipe()
            assert frontend.transfer(StateDirection.LOAD, reading) == ACCEPTED
            os.close(reading)
            os.write(writing, blob[:1000])
            destination.manager.restart(number)
            with pytest.raises(BrokenPipeError):
                os.write(writing, blob)  # no process keeps the pipe
            os.close(writing)
            assert frontend.check() == 1
            frontend.load(blob)
            frontend.close()
            with destination.machine(KEY) as there:
                holds(there)
                resume(here)
                is_fenced(here)
