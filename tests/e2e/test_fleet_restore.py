# SPDX-License-Identifier: Apache-2.0
"""A backup of etcd is restored under daemons that run, and devices are released one by one."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, Daemon
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host
from tests.support.oracle import KEY
from vhost_rpmb.driver.errors import BackendError

pytestmark = pytest.mark.etcd
A, B = b"a" * 256, b"b" * 256
DEVICES = ("vm-1", "vm-2", "vm-3")


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster(members=1) as cluster:
        yield cluster


def attempt(action: str, host: Host, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vhost_rpmb.client", "fleet", action, str(host.config)]
    return subprocess.run([*command, *arguments], capture_output=True, text=True)


def client(action: str, host: Host, *arguments: str) -> None:
    result = attempt(action, host, *arguments)
    assert result.returncode == 0, result.stderr


def refusal(host: Host, device: str) -> str:
    """Why a start is refused, in a session that begins a virtual machine's."""
    daemon = host.daemon(device)
    try:
        daemon.start()
        with daemon.client(KEY) as guest:
            guest.read_counter()
    except (RuntimeError, BackendError):
        return daemon.log
    finally:
        daemon.kill()
    raise AssertionError("the device is served")


def write(daemon: Daemon, data: bytes) -> None:
    with daemon.client(KEY) as guest:
        guest.write(0, data)


def test_restored_backup_fences_daemons_and_is_released_device_by_device(
    cluster: EtcdCluster, tmp_path: Path
) -> None:
    host = Host(tmp_path / "host", cluster, "/test/")
    for device in DEVICES:
        client("create", host, device)
        with host.daemon(device) as daemon, daemon.client() as guest:
            guest.program_key(KEY)
            guest.write(0, A)
    running = Host(tmp_path / "other", cluster, "/test/").daemon("vm-1")
    running.start()
    with running.client(KEY) as guest:
        guest.write(1, A)
        backup = tmp_path / "backup"
        backup.write_bytes(cluster.members[0].backup())
        guest.write(0, B)
        with host.daemon("vm-2") as stopped:
            write(stopped, B)
        cluster.restore(backup)

        # A daemon that wrote since the backup is fenced by the state that it finds.
        guest._timeout = PATIENCE
        with pytest.raises(BackendError):
            guest.write(2, B)
    assert running.wait() == 3
    assert "quarantine" in running.log
    # A start on a host that saw more is refused by its witness.
    assert "the store went back: expected no earlier state" in refusal(host, "vm-2")

    client("quarantine", host)
    for device in DEVICES:
        assert f"{device} is quarantined" in refusal(host, device)
    for position, device in enumerate(DEVICES):
        accept(host, device)
        with host.daemon(device) as daemon, daemon.client(KEY) as guest:
            assert guest.read(0, 1) == A
            guest.write(0, B)
        for other in DEVICES[position + 1 :]:
            assert "is quarantined" in refusal(host, other)


def accept(host: Host, device: str) -> None:
    """Accept a device as soon as the lease of its last owner, which the backup has, is over."""
    end = time.monotonic() + PATIENCE
    while True:
        result = attempt("accept", host, device)
        if result.returncode == 0:
            return
        assert "in use" in result.stderr
        assert time.monotonic() < end
        time.sleep(0.5)
