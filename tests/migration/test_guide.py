# SPDX-License-Identifier: Apache-2.0
"""What the guide to migration prints, run as it is printed, and the verb `release`."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.migration.conftest import Hosts
from tests.migration.test_copy import is_fenced
from tests.support.daemon import PATIENCE, SANDBOX, installed_program, listens, until
from tests.support.documents import blocks_of_guide, commands
from tests.support.hosts import Host, MovingFrontend, copy_options, leave, resume
from tests.support.oracle import KEY
from vhost_rpmb.driver.rpmb import RpmbClient

from tests.support.hosts import SETUP  # isort: skip

COMMANDS = [line for block in blocks_of_guide("migration") for line in commands(block.text)]


@contextmanager
def run(folder: Path, *beginnings: str) -> Iterator[None]:
    """Run the commands of the guide that begin so; daemons until the end of the context."""
    started = []
    try:
        for line in COMMANDS:
            if not line.startswith(beginnings):
                continue
            if not line.startswith("vhost-user-rpmb"):
                subprocess.run(["bash", "-c", line], cwd=folder, check=True, timeout=PATIENCE)
                continue
            words = shlex.split(line)
            words[:1] = [*installed_program(words[0], "vhost_rpmb"), *SANDBOX]
            started.append(subprocess.Popen(words, cwd=folder))
            socket = words[len(words) - len(shlex.split(line)) + 1].partition("=")[2]
            until(lambda path=folder / socket: listens(path))  # type: ignore[misc]
        yield
    finally:
        for daemon in started:
            daemon.terminate()
            assert daemon.wait(PATIENCE) == 0


def machine(folder: Path, name: str, blob: bytes | None = None) -> RpmbClient:
    frontend = MovingFrontend.connect(folder / name, timeout=PATIENCE)
    frontend.blob = blob
    return RpmbClient(frontend, None if blob is None else KEY, timeout=PATIENCE, setup=SETUP)


@pytest.mark.needs_sources
@pytest.mark.parametrize("mode", ["copy", "shared"])
def test_device_moves_as_in_the_guide(tmp_path: Path, mode: str) -> None:
    daemons = [line for line in COMMANDS if f"--migration={mode}" in line]
    assert len(daemons) == 2
    with run(tmp_path, "mkdir", "(umask", "truncate", *daemons):
        with machine(tmp_path, "rpmb.sock") as here:
            here.program_key(KEY)
            assert here.write(0, b"a" * 256) == 1
            blob = leave(here)
        with machine(tmp_path, "arriving.sock", blob) as there:
            assert there.read(0, 1) == b"a" * 256
    if mode == "copy":
        (verify,) = [line for line in COMMANDS if line.startswith("vhost-rpmb-client verify")]
        assert "possession: handed to" in client(tmp_path, *shlex.split(verify)[1:]).stdout
        release = [line for line in COMMANDS if line.startswith("vhost-rpmb-client release")]
        assert client(tmp_path, *shlex.split(release[0])[1:]).returncode == 3


def client(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [*installed_program("vhost-rpmb-client", "vhost_rpmb.client"), *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=PATIENCE, check=False
    )


def test_device_is_taken_back(hosts: Hosts, tmp_path: Path) -> None:
    """Without a fence folder: by the operator's word."""
    source = hosts("source", *copy_options(None))
    with source.machine() as here:
        here.program_key(KEY)
        leave(here)
        resume(here)
        is_fenced(here)
    files = ["release", f"--flash-path={source.flash_path}"]
    assert "is in use by another process" in client(tmp_path, *files).stderr
    source.stop()
    for _ in range(2):
        done = client(tmp_path, *files)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("is active in its files, generation 1\n")
    source.start()
    with source.machine(KEY) as here:
        assert here.read_counter() == 0


def test_device_is_not_taken_from_another_host(
    source: Host, destination: Host, fence: Path, tmp_path: Path
) -> None:
    with source.machine(KEY) as here:
        blob = leave(here)
    with destination.machine(KEY, blob) as there:
        assert there.read_counter() == 2
    source.stop()
    done = client(tmp_path, "release", f"--flash-path={source.flash_path}", f"--fence-path={fence}")
    assert done.returncode == 3
    assert "is superseded: another host is active in generation 1" in done.stderr


def test_claimed_device_is_refused_at_the_destination(
    source: Host, destination: Host, fence: Path, tmp_path: Path
) -> None:
    with source.machine(KEY) as here:
        blob = leave(here)
    source.stop()
    files = (f"--flash-path={source.flash_path}", f"--fence-path={fence}")
    assert client(tmp_path, "release", *files).returncode == 0
    with destination.machine(KEY, blob) as there:
        is_fenced(there)
    source.start()
    with source.machine(KEY) as here:
        assert here.read_counter() == 2


def test_files_that_wait_are_refused(destination: Host, tmp_path: Path) -> None:
    destination.stop()
    done = client(tmp_path, "release", f"--flash-path={destination.flash_path}")
    assert done.returncode == 1
    assert "it waits for one to arrive" in done.stderr
