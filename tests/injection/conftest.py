# SPDX-License-Identifier: Apache-2.0
"""Devices that inject faults; after each test their files have to be sound."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX, Daemon
from tests.support.oracle import KEY
from tests.support.rig import Rig, RigFactory, write_key
from vhost_rpmb.engine import Engine
from vhost_rpmb.injection.device import InjectedDevice
from vhost_rpmb.injection.script import load
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths

FaultyDaemon = Callable[..., Daemon]
FaultyRig = Callable[..., Rig]


def rule(text: str, **numbers: object) -> str:
    """One rule of a script: lines in a row are separated by semicolons."""
    lines = [*text.split("; "), *(f"{name} = {number}" for name, number in numbers.items())]
    return "\n".join(["[[rule]]", *lines, ""])


def check_files(flash: Path) -> None:
    """The files of a stopped device are complete and agree."""
    report = verify(Paths.resolve(str(flash)))
    assert (report.damaged, report.pending, report.disagreement) == ([], [], "")
    assert report.clean


@pytest.fixture
def faulty_daemon(engine: Engine, tmp_path: Path) -> Iterator[FaultyDaemon]:
    """Start a daemon with a script of faults, its key programmed."""
    made: list[Daemon] = []

    def start(script: str) -> Daemon:
        key = tmp_path / "key"
        write_key(key, KEY)
        options = (f"--key-path={key}", "--key-set", "-v")
        device = Daemon(tmp_path, *options, engine=engine.name, sandbox=SANDBOX, inject=script)
        made.append(device)
        device.start()
        return device

    yield start
    try:
        for device in made:
            if device.running:
                device.stop()
            assert "Traceback" not in device.log
            assert KEY.hex() not in device.log
            check_files(device.flash_path)
    finally:
        for device in made:
            device.kill()


@pytest.fixture
def faulty(
    engine: Engine, make_rig: RigFactory, flash: Path, tmp_path: Path
) -> Iterator[FaultyRig]:
    """Make a device with a script of faults in this process; with a key unless told otherwise.

    One at a time, on one image: the one before is stopped.
    """
    made: list[tuple[Rig, InjectedDevice]] = []

    def stop() -> None:
        while made:
            rig, device = made.pop()
            device.close()
            rig.close()
            check_files(flash)

    def make(script: str, *, keyed: bool = True) -> Rig:
        stop()
        rig = make_rig()
        if keyed:
            rig.program()
        path = tmp_path / "script.toml"
        path.write_text(script)
        make_device = partial(engine.RpmbDevice, rig.store)
        device = InjectedDevice(load(str(path)), rig.store, make_device, engine, time.sleep)
        rig.device = device  # type: ignore[assignment]
        made.append((rig, device))
        return rig

    yield make
    stop()
