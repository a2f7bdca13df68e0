# SPDX-License-Identifier: Apache-2.0
"""The files of each host say where the device is: `verify` and `info` of the client."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.migration.test_copy import holds, is_fenced
from tests.migration.test_guide import client
from tests.support.hosts import SETUP, Host, leave, resume
from tests.support.oracle import KEY


def reported(host: Host) -> tuple[str, int, str]:
    """The state, generation and line that both verbs report on the files of a stopped host."""
    files = f"--flash-path={host.flash_path}"
    found = set()
    for verb in ("verify", "info"):
        values = json.loads(client(host.folder, "--json", verb, files).stdout)
        done = client(host.folder, verb, files)
        assert (done.returncode, values["problem"]) == (0, None), done.stderr
        (line,) = [each for each in done.stdout.splitlines() if each.startswith("possession: ")]
        found.add((values["possession"], values["generation"], line.partition(": ")[2]))
    assert len(found) == 1
    return found.pop()


def test_device_that_was_handed_over(source: Host, destination: Host) -> None:
    destination.stop()
    vacant = ("vacant", 0, "incoming, the device is expected from another host")
    assert reported(destination) == vacant
    destination.start()
    with source.machine(KEY) as machine:
        blob = leave(machine)
    with destination.connect() as arrived:
        arrived.handshake(SETUP.protocol_features)
        arrived.load(blob)
    source.stop()
    destination.stop()
    state, generation, line = reported(source)
    assert (state, generation) == ("exported", 1)
    assert line.startswith("handed to another host, generation 1: use it there, or see")
    imported = ("imported", 1, "arrived from another host, not used yet, generation 1")
    assert reported(destination) == imported
    destination.start()
    with destination.machine(KEY) as machine:
        holds(machine)
    destination.stop()
    assert reported(destination) == ("active", 1, "the device is here, generation 1")


def test_fenced_device(source: Host, destination: Host) -> None:
    with source.machine(KEY) as machine:
        blob = leave(machine)
        with destination.machine(KEY, blob) as arrived:
            holds(arrived)
        resume(machine)
        is_fenced(machine)
    source.stop()
    assert reported(source) == ("superseded", 1, "fenced, another host is active in generation 1")


@pytest.mark.parametrize("mode", ["off", "shared"])
def test_device_that_never_left(tmp_path: Path, mode: str) -> None:
    host = Host(tmp_path / "host", f"--migration={mode}")
    try:
        host.start()
    finally:
        host.stop()
    assert reported(host) == ("active", 0, "the device is here, generation 0")
