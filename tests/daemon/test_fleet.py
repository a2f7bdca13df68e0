# SPDX-License-Identifier: Apache-2.0
"""Daemons of several hosts on a store in a real etcd, in the sandbox."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.authority import Authority
from tests.support.daemon import Daemon, environment, until
from tests.support.etcd import EtcdCluster
from tests.support.fleet import LEASE, Host, ask, create_device, daemons, two_hosts
from tests.support.oracle import KEY
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine

pytestmark = pytest.mark.etcd
PREFIX = "/test/"
A, B = b"a" * 256, b"b" * 256


@pytest.fixture
def cluster() -> Iterator[EtcdCluster]:
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def hosts(cluster: EtcdCluster, tmp_path: Path) -> list[Host]:
    """Two hosts with a device "vm-1" that no daemon owns."""
    return two_hosts(tmp_path, cluster, PREFIX)


@pytest.fixture
def serve(engine: Engine) -> Iterator[Callable[..., Daemon]]:
    """Make daemons on each engine, killed at the end."""
    with daemons(engine.name) as make:
        yield make


def test_device_moves_from_host_to_host(hosts: list[Host], serve: Callable[..., Daemon]) -> None:
    with serve(hosts[0]) as first, first.client() as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        guest.write(511, B)
    with serve(hosts[1], "--take-over=never") as second, second.client(KEY) as guest:
        assert guest.read_counter() == 2
        assert guest.read(0, 1) == A
        assert guest.read(511, 1) == B
        guest.write(0, B)
    with serve(hosts[0]) as third, third.client(KEY) as guest:
        assert guest.read(0, 1) == B


def test_device_of_a_dead_host_is_taken_over_after_its_lease(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    first = serve(hosts[0])
    first.start()
    with first.client() as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        with pytest.raises(RuntimeError, match=r"vm-1 is in use by process \d+ on host .*: stop"):
            serve(hosts[1], "--take-over=never").start()
    first.kill()
    with serve(hosts[1]) as second, second.client(KEY) as guest:
        assert guest.read(0, 1) == A


def test_witness_is_kept_although_a_killed_daemon_left_half_of_it(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    with serve(hosts[0]) as first, first.client() as guest:
        guest.program_key(KEY)
    (witness,) = hosts[0].witness.iterdir()
    half = witness.with_name(witness.name + ".new")
    half.write_text("half")
    before = witness.read_text()
    with serve(hosts[0]) as second, second.client(KEY) as guest:
        guest.write(0, A)
    assert "could not be written" not in second.log
    assert witness.read_text() != before
    assert not half.exists()


@pytest.mark.parametrize("request_", ["none", "write", "read"])
def test_replaced_daemon_answers_nothing_and_ends(
    hosts: list[Host], serve: Callable[..., Daemon], request_: str
) -> None:
    """Its status is 3, so that a service manager does not start it again."""
    first = serve(hosts[0])
    first.start()
    with first.client() as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        second = serve(hosts[1], "--take-over=now")
        second.start()
        with second.client(KEY) as other:
            other.read_counter()
        if request_ == "write":
            with pytest.raises(BackendError):
                guest.write(0, B)
        assert first.wait() == 3, first.log
        if request_ == "read":
            with pytest.raises(BackendError):
                guest.read(0, 1)
    assert first.log.splitlines()[-1] == (
        "vhost-user-rpmb: error: device vm-1: expected this daemon as its owner, found process"
        f" {second.pid} on host {socket.gethostname()}: leave"
        " the device there, or take it over by a new start"
    )
    assert "Traceback" not in first.log
    with second.client(KEY) as guest:
        assert guest.read(0, 1) == A


def test_sandboxed_daemon_connects_again_when_members_die(
    cluster: EtcdCluster, hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    with serve(hosts[0]) as daemon, daemon.client() as guest:
        guest._timeout = 60
        guest.program_key(KEY)
        for number, member in enumerate((cluster.members[0], cluster.leader(), *cluster.members)):
            member.kill()
            guest.write(number, A)
            cluster.start(member)
            cluster.wait_healthy()
        assert guest.read(0, 1) == A
        assert "sandbox" not in daemon.log


def read_on(guest: RpmbClient) -> None:
    while True:
        assert guest.read(0, 1) == A


def test_reads_wait_while_ownership_is_uncertain(
    cluster: EtcdCluster, hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    with serve(hosts[0]) as daemon, daemon.client() as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        for member in cluster.members:
            member.signal(signal.SIGSTOP)
        guest._timeout = 2 * LEASE
        with pytest.raises(BackendError):
            read_on(guest)
        for member in cluster.members:
            member.signal(signal.SIGCONT)
        daemon.kill()
    with serve(hosts[1]) as second, second.client(KEY) as guest:
        assert guest.read(0, 1) == A


def test_write_waits_for_an_outage_and_a_stop_ends_the_wait(
    cluster: EtcdCluster, hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    daemon = serve(hosts[0])
    daemon.start()
    with daemon.client() as guest:
        guest._timeout = 60
        guest.program_key(KEY)
        for member in cluster.members:
            member.kill()
        writer = threading.Thread(target=lambda: guest.write(0, A))
        writer.start()
        until(lambda: "the store gives no definite answer, requests wait" in daemon.log)
        for member in cluster.members:
            cluster.start(member)
        writer.join()
        assert "the store answers again" in daemon.log
        for member in cluster.members:
            member.kill()
        guest.submit(guest.write_request(1, B, 1), 512)
        guest.flush()
        until(lambda: daemon.log.count("requests wait") == 2)
        daemon.stop()
        with pytest.raises(BackendError):
            guest.answers()
    for member in cluster.members:
        cluster.start(member)
    with serve(hosts[1]) as second, second.client(KEY) as guest:
        assert guest.read(0, 1) == A
        assert guest.read_counter() in (1, 2)


def test_served_device_is_listed_and_described(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    config = str(hosts[0].config)
    ask("create", config, "vm-0", "--size=256K")
    with serve(hosts[0]) as daemon, daemon.client() as guest:
        guest.program_key(KEY)
        guest.write(0, A)
        listed = ask("list", config)["devices"]
        assert [(each["device"], each["size"], each["counter"]) for each in listed] == [
            ("vm-0", 256 * 1024, 0),
            ("vm-1", 128 * 1024, 1),
        ]
        assert (
            ask("info", config, "vm-1")
            == listed[1]
            == {
                "device": "vm-1",
                "size": 128 * 1024,
                "counter": 1,
                "programmed": True,
                "quarantined": False,
                "alive": True,
                "state": "active",
                "epoch": 1,
                "host": socket.gethostname(),
                "pid": daemon.pid,
            }
        )
    assert ask("info", config, "vm-1")["alive"] is False


def test_quarantined_device_is_served_again_when_accepted(
    hosts: list[Host], serve: Callable[..., Daemon]
) -> None:
    """The refusal's status is 3: no service manager starts the daemon again and again."""
    config = str(hosts[0].config)
    ask("quarantine", config)
    assert ask("info", config, "vm-1")["quarantined"] is True
    refused = serve(hosts[0])
    end = subprocess.run(
        refused.command_line, env=refused.environment, capture_output=True, text=True, check=False
    )
    assert end.returncode == 3
    assert "vm-1 is quarantined" in end.stderr
    ask("accept", config, "vm-1")
    with serve(hosts[0]) as daemon, daemon.client() as guest:
        guest.program_key(KEY)
        assert ask("info", config, "vm-1")["pid"] == daemon.pid


def test_daemon_works_over_tls(tmp_path: Path, serve: Callable[..., Daemon]) -> None:
    authority = Authority(tmp_path)
    for name in ("server", "host"):
        authority.issue(name)
    options = (
        f"--cert-file={authority.path('server')}",
        f"--key-file={authority.path('server', 'key')}",
        f"--trusted-ca-file={authority.path('ca')}",
        "--client-cert-auth",
    )
    with EtcdCluster(*options, scheme="https", members=1) as cluster:
        host = Host(
            tmp_path / "a",
            cluster,
            PREFIX,
            f'ca = "{authority.path("ca")}"',
            f'certificate = "{authority.path("host")}"',
            f'certificate-key = "{authority.path("host", "key")}"',
        )
        create_device(host)
        with serve(host) as daemon, daemon.client() as guest:
            guest._timeout = 60
            guest.program_key(KEY)
            for number in range(2):
                guest.write(number, A)
                cluster.members[0].kill()
                cluster.start(cluster.members[0])
            assert guest.read(0, 1) == A


@pytest.mark.needs_sandbox
def test_sandbox_leaves_tcp_to_the_ports_of_the_store_only() -> None:
    program = """
import errno, socket
from vhost_rpmb.daemon import sandbox
servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
ports = [each.getsockname()[1] for each in servers]
sandbox.enter({}, ports[:1])
def error(action):
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno]
def connect(port):
    with socket.socket() as sock:
        sock.connect(("127.0.0.1", port))
def bind():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
print(error(lambda: connect(ports[0])), error(lambda: connect(ports[1])), error(bind))
print(error(lambda: socket.socket(type=socket.SOCK_DGRAM)))
print(error(lambda: socket.socket(socket.AF_UNIX)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment()
    )
    assert (result.stdout, result.stderr) == ("None EACCES EPERM\nEPERM\nEPERM\n", "")


def test_nothing_is_imported_for_a_device_in_files() -> None:
    program = (
        "import sys, vhost_rpmb.daemon.server as s; s.engine.load('fast');"
        "print([name for name in sys.modules if 'fleet' in name or name in ('ssl', 'http')])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[]\n", "")
