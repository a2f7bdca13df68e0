# SPDX-License-Identifier: Apache-2.0
"""Daemons that own a device only while a ring runs: moves between hosts, on a real etcd."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, Daemon, until
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host, create_device, daemons, describe, two_hosts
from tests.support.hosts import (
    SETUP,
    MovingFrontend,
    StateRefusedError,
    leave,
    resume,
)
from tests.support.oracle import KEY, read_data
from vhost_rpmb.driver.errors import BackendError, QueueError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine

pytestmark = pytest.mark.etcd
READS = 400
A, B, C = b"a" * 256, b"b" * 256, b"c" * 256


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def hosts(cluster: EtcdCluster, tmp_path: Path) -> list[Host]:
    """Two hosts with a device "vm-1"."""
    return two_hosts(tmp_path, cluster, f"/{tmp_path.name}-{time.monotonic_ns()}/")


@pytest.fixture
def serve(engine: Engine) -> Iterator[Callable[..., Daemon]]:
    """Start daemons on each engine, killed at the end."""
    with daemons(engine.name, "--verbose") as make:

        def start(host: Host, *options: str) -> Daemon:
            daemon = make(host, *options)
            daemon.start()
            return daemon

        yield start


def client(daemon: Daemon, key: bytes | None = None) -> RpmbClient:
    return RpmbClient.connect(daemon.socket_path, key, timeout=60)


def test_machine_moves_and_a_failed_move_takes_it_back(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    source = serve(hosts[0])
    assert describe(hosts[0])["alive"] is False
    with client(source) as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        destination = serve(hosts[1])  # before the source stops
        base = guest.frontend.stop_ring()
        assert base == guest.ring.used_index
        assert describe(hosts[0])["alive"] is False
        guest.frontend.start_ring(guest.ring)  # the move fails before the destination runs
        guest.write(1, A)
        guest.frontend.stop_ring()
        with client(destination, KEY) as moved:
            assert moved.read(0, 2) == A + A
            moved.write(0, B)
            assert describe(hosts[0])["pid"] == destination.pid
            moved.frontend.stop_ring()
            guest.frontend.start_ring(guest.ring)  # it fails later
            assert guest.read(0, 2) == B + A
            guest.write(1, C)
            assert describe(hosts[0])["pid"] == source.pid
            guest.frontend.stop_ring()
            moved.frontend.start_ring(moved.ring)
            assert moved.read(0, 2) == B + C
    for daemon in (source, destination):
        daemon.stop()
        assert "waiting for the end of its lease" not in daemon.log


def test_ring_waits_while_another_daemon_owns_the_device(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    """Its front-end is served meanwhile, and may give up; a disconnect frees the device."""
    source, destination = serve(hosts[0]), serve(hosts[1])
    with client(source) as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        with client(destination, KEY) as early:
            until(lambda: "vm-1 is owned by process" in destination.log)
            early.frontend.stop_ring()
            early.frontend.start_ring(early.ring)
            token = early.submit(early.write_request(0, B, 1), 512)
            early.flush()
            assert early.frontend.get_status()
            assert guest.read(0, 1) == A
            guest.close()
            assert [answer.token for answer in early.answers()] == [token]
            assert early.read(0, 1) == B
    assert describe(hosts[0])["alive"] is False


def test_restarted_guest_takes_the_device_again(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    with client(serve(hosts[0])) as guest:
        guest.program_key(KEY)
        for number in range(3):
            guest.write(number, A)
            guest.frontend.stop_ring()
            guest.frontend.reset_device()
            assert describe(hosts[0])["epoch"] == number + 1
            guest.frontend.start_device(guest.setup.features)
            guest.frontend.start_ring(guest.ring)
        assert guest.read(0, 3) == 3 * A


def test_owner_asleep_beyond_its_lease_answers_nothing(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    first = serve(hosts[0])
    with client(first) as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        first.send(signal.SIGSTOP)
        guest.submit(read_data(0), 512)
        guest.flush()
        second = serve(hosts[1])
        with client(second, KEY) as other:
            other.write(0, B)
            first.send(signal.SIGCONT)
            assert first.wait() == 3, first.log
            with pytest.raises(BackendError):
                guest.answers()
    assert f"found process {second.pid} on host" in first.log.splitlines()[-1]


def test_confirmed_read_is_not_answered_by_a_replaced_owner(
    cluster: EtcdCluster, tmp_path: Path, serve: Callable[..., Daemon]
) -> None:
    prefix = f"/confirmed-{tmp_path.name}-{time.monotonic_ns()}/"
    hosts = [Host(tmp_path / name, cluster, prefix, 'reads = "confirmed"') for name in ("a", "b")]
    create_device(hosts[0])
    first, second = serve(hosts[0]), serve(hosts[1], "--take-over=now")
    with client(first) as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        assert guest.read(0, 1) == A
        with client(second, KEY) as other:
            other.write(0, B)
            with pytest.raises(BackendError):
                guest.read(0, 1)
            assert other.read(0, 1) == B
    assert first.wait() == 3, first.log


@pytest.mark.needs_ptrace
def test_read_makes_no_system_call_for_its_guard(
    hosts: list[Host], serve: Callable[..., Daemon], tmp_path: Path
) -> None:
    daemon = serve(hosts[0])
    calls = tmp_path / "calls"
    with client(daemon) as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        trace = ["strace", "-f", "-o", str(calls), "-p", str(daemon.pid)]
        with subprocess.Popen(trace, stderr=subprocess.DEVNULL) as tracer:
            until(lambda: calls.exists() and "TracerPid:\t0" not in status_of(daemon.pid))
            for _ in range(READS):
                assert guest.read(0, 1) == A
            tracer.terminate()
            tracer.wait()
    names = Counter(re.findall(r"^\d+ +(\w+)\(", calls.read_text(), re.MULTILINE))
    assert "clock_gettime" not in names
    expected = {"epoll_wait", "poll", "write", "epoll_pwait", "sched_yield", "restart_syscall"}
    # Renewals of the lease have calls too: on a busy machine many, but not one for each read.
    others = {name: count for name, count in names.items() if name not in expected}
    assert max(others.values(), default=0) < READS / 2, names


def status_of(pid: int) -> str:
    return Path(f"/proc/{pid}/status").read_text()


def test_ticket_hands_the_device_over(hosts: list[Host], serve: Callable[..., Daemon]) -> None:
    """Nothing is served before it arrives, and it is used once."""
    source = serve(hosts[0], "--migration=shared")
    destination = serve(hosts[1], "--migration=shared", "--incoming")
    with machine(source) as here:
        here.program_key(KEY)
        assert here.write(0, A) == 1
        with machine(destination, KEY) as early, pytest.raises(QueueError):
            early.read_counter()
        ticket = leave(here)
        with machine(destination, KEY, ticket) as there:
            assert there.read(0, 1) == A
            assert there.write(0, B) == 2
            resume(here)
            with pytest.raises(QueueError):
                here.read_counter()
    with pytest.raises(StateRefusedError):
        machine(source, KEY, ticket)
    assert "a snapshot cannot be restored" in source.log


def machine(daemon: Daemon, key: bytes | None = None, blob: bytes | None = None) -> RpmbClient:
    frontend = MovingFrontend.connect(daemon.socket_path, timeout=PATIENCE)
    frontend.blob = blob
    return RpmbClient(frontend, key, timeout=PATIENCE, setup=SETUP)
