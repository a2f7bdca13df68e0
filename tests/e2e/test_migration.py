# SPDX-License-Identifier: Apache-2.0
"""The device's state as QEMU moves it: `migrate` into a file, and a second QEMU that reads it.

Without a guest, whose device would have to be a file system; the messages are the same.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.e2e.cache import Say
from tests.e2e.kit import AMD64, Kit, make_kit
from tests.e2e.monitor import Monitor
from tests.support.daemon import listens, until
from tests.support.hosts import Host, copy_options
from tests.support.oracle import KEY
from tests.support.rig import write_key
from vhost_rpmb.driver.errors import QueueError
from vhost_rpmb.engine import Engine

# The test may have to make the kit.
pytestmark = [pytest.mark.qemu, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def kit(say: Say) -> Kit:
    return make_kit(AMD64, say)


@contextmanager
def machine(kit: Kit, folder: Path, name: str, host: Host, *options: str) -> Iterator[Monitor]:
    """A QEMU without a guest, which is stopped, and its monitor."""
    path = folder / f"{name}.qmp"
    command = [
        *kit.qemu,
        *("-nodefaults", "-no-user-config", "-display", "none", "-S"),
        *kit.architecture.machine,
        *("-object", "memory-backend-memfd,id=mem,size=64M,share=on", "-m", "64"),
        *("-chardev", f"socket,id=c,path={host.socket_path}"),
        *("-device", "vhost-user-fs-pci,chardev=c,tag=x"),
        *("-qmp", f"unix:{path},server=on,wait=off"),
        *options,
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as qemu:
        try:
            until(lambda: listens(path) or qemu.poll() is not None)
            if qemu.poll() is not None:
                assert qemu.stderr is not None
                raise AssertionError(qemu.stderr.read())
            with Monitor(path) as monitor:
                yield monitor
        finally:
            qemu.kill()


def completed(monitor: Monitor) -> bool:
    """Whether a migration has ended, which succeeded."""
    found = monitor.execute("query-migrate")
    assert found.get("status") not in ("failed", "cancelled"), found
    return bool(found.get("status") == "completed")


def two_queues(host: Host) -> None:
    """Start a host's daemon with a device that QEMU takes for a file system."""
    before = list(host.command_line)
    place = host.command_line.index("vhost_rpmb")
    host.command_line[1 : place + 1] = ["-m", "tests.support.twoqueues"]
    host.start()
    host.command_line = before


def test_state_moves_in_a_file(kit: Kit, engine: Engine, tmp_path: Path) -> None:
    write_key(tmp_path / "migration.key", bytes(32))
    options = [
        *copy_options(tmp_path / "fence"),
        f"--migration-key={tmp_path / 'migration.key'}",
        "-vv",
    ]
    source = Host(tmp_path / "source", *options, engine=engine.name)
    destination = Host(tmp_path / "destination", *options, engine=engine.name, incoming=True)
    stream = tmp_path / "stream"
    try:
        source.start()
        with source.machine() as here:
            here.program_key(KEY)
            assert here.write(3, b"a" * 256) == 1
        source.stop()
        two_queues(source)
        with machine(kit, tmp_path, "source", source) as monitor:
            monitor.execute("migrate", uri=f"file:{stream}")
            until(lambda: completed(monitor))
        assert "SET_DEVICE_STATE_FD" in source.log
        assert "CHECK_DEVICE_STATE" in source.log
        assert "is handed over, generation 1" in source.log
        two_queues(destination)
        incoming = ("-incoming", f"file:{stream}")
        with machine(kit, tmp_path, "destination", destination, *incoming) as monitor:
            until(lambda: completed(monitor))
        assert "has arrived, generation 1" in destination.log
        for host in (source, destination):
            host.stop()
            host.start()
        with destination.machine(KEY) as there:
            assert there.read_counter() == 1
            assert there.read(3, 1) == b"a" * 256
        with source.machine(KEY) as here, pytest.raises(QueueError):
            here.read_counter()
        assert b"a" * 256 in stream.read_bytes()
        assert KEY not in stream.read_bytes()
    finally:
        source.kill()
        destination.kill()
