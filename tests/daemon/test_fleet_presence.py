# SPDX-License-Identifier: Apache-2.0
"""A killed daemon is replaced at once on its own host, and on no other one before its lease ends.

The lease is longer than each test may take.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, Daemon, until
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host, create_device, daemons, describe
from tests.support.oracle import KEY
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine

pytestmark = pytest.mark.etcd
LEASE = 3600  # seconds
WAITS = "waiting for the end of its lease"
A, B = b"a" * 256, b"b" * 256

# Runs a daemon as on another boot of a host with another name.
_ELSEWHERE = """
hostname elsewhere
mount --bind "$0" /proc/sys/kernel/random/boot_id
exec "$@"
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster(members=1) as cluster:
        yield cluster


@pytest.fixture
def host(cluster: EtcdCluster, tmp_path: Path, engine: Engine) -> Host:
    """A host with a device "vm-1" that no daemon owns."""
    made = Host(tmp_path / "host", cluster, f"/{tmp_path.name}/", lease=LEASE)
    create_device(made)
    return made


@pytest.fixture
def serve(engine: Engine) -> Iterator[Callable[..., Daemon]]:
    with daemons(engine.name) as make:
        yield make


@pytest.fixture
def first(host: Host, serve: Callable[..., Daemon]) -> Iterator[Daemon]:
    """A daemon that owns the device, with one write, and has a front-end."""
    daemon = serve(host)
    daemon.start()
    with daemon.client() as guest:
        guest.program_key(KEY)
    with daemon.client(KEY) as guest:
        guest.write(0, A)
        yield daemon


@contextmanager
def reading(daemon: Daemon) -> Iterator[Future[bytes]]:
    """Let a guest of a started daemon read, whenever the daemon owns the device."""

    def read() -> bytes:
        with RpmbClient.connect(daemon.socket_path, KEY, timeout=PATIENCE) as guest:
            data = guest.read(0, 1)
            guest.write(0, B)
            return data

    with ThreadPoolExecutor(1) as threads:
        yield threads.submit(read)


def neighbour(host: Host, cluster: EtcdCluster, witness: Path) -> Host:
    """Another configuration for the same device."""
    name = host.config.read_text().split('prefix = "')[1].split('"')[0]
    folder = host.folder.with_name("neighbour")
    return Host(folder, cluster, name, lease=LEASE, witness=witness)


def still_owned_by(host: Host, daemon: Daemon) -> bool:
    found = describe(host)
    return bool(found["pid"] == daemon.pid and found["alive"])


def test_killed_daemon_is_replaced_at_once(
    host: Host, first: Daemon, serve: Callable[..., Daemon]
) -> None:
    first.kill()
    with serve(host) as second, second.client(KEY) as guest:
        assert guest.read(0, 1) == A
        guest.write(0, B)
        assert len(list(host.witness.glob("*.owner"))) == 1
    assert not list(host.witness.glob("*.owner"))
    assert WAITS not in second.log


def test_daemon_that_does_not_run_now_is_waited_for_until_it_is_killed(
    host: Host, first: Daemon, serve: Callable[..., Daemon], cluster: EtcdCluster
) -> None:
    second = serve(neighbour(host, cluster, host.witness))
    second.start()
    first.send(signal.SIGSTOP)
    with reading(second) as found:
        until(lambda: WAITS in second.log)
        assert still_owned_by(host, first)
        assert not found.done()
        first.kill()
        assert found.result(PATIENCE) == A


@pytest.mark.parametrize("how", ["copied", "elsewhere"])
def test_death_on_another_host_is_not_believed(
    host: Host, first: Daemon, serve: Callable[..., Daemon], cluster: EtcdCluster, how: str
) -> None:
    """Neither with a copy of the folder, nor with the folder itself, which hosts could share."""
    first.kill()
    copied = host.folder.with_name("copied")
    shutil.copytree(host.witness, copied)
    second = serve(neighbour(host, cluster, copied if how == "copied" else host.witness))
    if how == "elsewhere":
        boot = host.folder / "boot"
        boot.write_text("a0a0a0a0-0000-4000-8000-000000000000\n")
        unshare = ["unshare", "--user", "--map-root-user", "--mount", "--uts"]
        second.command_line[:0] = [*unshare, "sh", "-ec", _ELSEWHERE, str(boot)]
    second.start()
    with reading(second) as found:
        until(lambda: WAITS in second.log)
        assert describe(host)["alive"]
        with serve(host) as third, third.client(KEY) as guest:
            assert guest.read(0, 1) == A  # its own host knows
        assert found.result(PATIENCE) == A
