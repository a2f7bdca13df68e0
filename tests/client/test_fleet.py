# SPDX-License-Identifier: Apache-2.0
"""The verb ``fleet`` as a program, on a real etcd: moves, verification, take-over, progress."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import Daemon
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host
from tests.support.oracle import KEY
from vhost_rpmb.driver.errors import BackendError

pytestmark = pytest.mark.etcd
A = b"a" * 256
COMMAND = [sys.executable, "-m", "vhost_rpmb.client"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster(members=1) as cluster:
        yield cluster


@pytest.fixture
def host(cluster: EtcdCluster, tmp_path: Path) -> Host:
    return Host(tmp_path / "host", cluster, f"/{tmp_path.name}/")


def attempt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True)


def client(action: str, host: Host, *arguments: str) -> dict[str, Any]:
    """Run the client program; return its report."""
    result = attempt("--json", "fleet", action, str(host.config), *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    fields = json.loads(result.stdout)
    assert isinstance(fields, dict)
    return fields


def test_device_moves_from_files_into_the_store_and_back(host: Host, tmp_path: Path) -> None:
    with Daemon(tmp_path) as daemon, daemon.client() as guest:
        guest.program_key(KEY)
        guest.write(3, A)
    files = f"--flash-path={daemon.flash_path}"
    assert client("import", host, "vm-1", files) == {"device": "vm-1", "size": 128 * 1024}
    with pytest.raises(RuntimeError, match="found one that moved to or from a store"):
        daemon.start()
    with host.daemon("vm-1") as served, served.client(KEY) as guest:
        assert guest.read(3, 1) == A
        guest.write(3, A)
        refused = attempt(
            *("fleet", "export", str(host.config), "vm-1", "--take-over=never"),
            f"--flash-path={tmp_path / 'out'}",
        )
        assert refused.returncode == 1
        assert "vm-1 is in use by process" in refused.stderr
    image = tmp_path / "back" / "rpmb.img"
    image.parent.mkdir()
    assert client("export", host, "vm-1", f"--flash-path={image}") == {
        "device": "vm-1",
        "image": str(image),
        "size": 128 * 1024,
    }
    assert client("info", host, "vm-1")["state"] == "exported"
    with pytest.raises(RuntimeError, match="vm-1 is exported: use it where it is now"):
        host.daemon("vm-1").start()
    with Daemon(image.parent) as back, back.client(KEY) as guest:
        assert guest.read_counter() == 2
        assert guest.read(3, 1) == A


def test_take_over_fences_a_daemon_and_frees_the_device(host: Host) -> None:
    client("create", host, "vm-1")
    fenced = host.daemon("vm-1")
    fenced.start()
    with fenced.client() as guest:
        guest.program_key(KEY)
        result = attempt("fleet", "take-over", str(host.config), "vm-1", "--take-over=never")
        assert result.returncode == 1
        assert "vm-1 is in use by process" in result.stderr
        client("take-over", host, "vm-1", "--take-over=now")
        with pytest.raises(BackendError):
            guest.write(0, A)
        assert fenced.wait() == 3
    assert client("info", host, "vm-1")["alive"] is False
    with host.daemon("vm-1", "--take-over=never") as daemon, daemon.client(KEY) as guest:
        assert guest.read_counter() == 0


def test_take_over_waits_for_the_lease_of_a_daemon_that_died_elsewhere(
    host: Host, cluster: EtcdCluster, tmp_path: Path
) -> None:
    client("create", host, "vm-1")
    daemon = host.daemon("vm-1")
    daemon.start()
    with daemon.client() as guest:
        guest.program_key(KEY)
        daemon.kill()
    here = attempt("fleet", "take-over", str(host.config), "vm-1", "--take-over=never")
    assert (here.returncode, here.stderr) == (0, "")

    with daemon, daemon.client(KEY) as guest:
        guest.write(0, A)
        daemon.kill()
    other = Host(tmp_path / "other", cluster, f"/{tmp_path.name}/")
    result = attempt("fleet", "take-over", str(other.config), "vm-1")
    assert result.returncode == 0
    assert re.search(
        r"warning: device vm-1 is owned by process \d+ on host \S+: waiting up to 5 s",
        result.stderr,
    )


def test_verification_names_each_device(host: Host, cluster: EtcdCluster) -> None:
    for name in ("vm-1", "vm-2"):
        client("create", host, name)
    with host.daemon("vm-2") as daemon, daemon.client() as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        served = client("verify", host, "vm-2")["devices"]
        assert [(each["counter"], each["chunks"], each["problem"]) for each in served] == [
            (1, 1, None)
        ]
    other = attempt("fleet", "verify", str(host.config), "vm-3")
    assert other.returncode == 1
    assert "expected its description and head, found no description" in other.stderr
    host.folder.joinpath("kek").write_bytes(bytes(32))
    result = attempt("--json", "fleet", "verify", str(host.config))
    assert result.returncode == 1
    assert "2 of 2 devices cannot be verified" in result.stderr
    problems = [each["problem"] for each in json.loads(result.stdout)["devices"]]
    assert all("configure that key" in problem for problem in problems)


def test_progress_is_shown_on_a_terminal_only(host: Host, tmp_path: Path) -> None:
    image = tmp_path / "flash"
    image.write_bytes(bytes(256 * 1024))
    parent, child = os.openpty()
    termios.tcsetwinsize(child, (24, 80))
    os.set_blocking(parent, False)
    try:
        subprocess.run(
            [*COMMAND, "fleet", "import", str(host.config), "vm-1", f"--flash-path={image}"],
            stderr=child,
            check=True,
        )
        assert "/1024" in os.read(parent, 65536).decode()
    finally:
        os.close(parent)
        os.close(child)
