# SPDX-License-Identifier: Apache-2.0
"""A real cluster of etcd, of Debian 13, on this machine's loopback interface."""

from __future__ import annotations

import base64
import http.client
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from tests.e2e.cache import SUITE, Steps, cached, unpack_packages
from vhost_rpmb.closing import Closing
from vhost_rpmb.storage.fleet.etcd import Endpoint, Etcd

PACKAGES = ("etcd-server",)
START_TIMEOUT = 60.0  # seconds
PORTS = (10000, 32768)


def make_etcd() -> Path:
    """The program, unpacked once."""

    def fill(folder: Path, steps: Steps) -> None:
        unpack_packages(folder, PACKAGES, steps)

    return cached("etcd", (SUITE, PACKAGES), fill) / "usr/bin/etcd"


def make_etcdctl() -> Path:
    """The operators' program, unpacked once."""

    def fill(folder: Path, steps: Steps) -> None:
        unpack_packages(folder, ("etcd-client",), steps)

    return cached("etcdctl", (SUITE,), fill) / "usr/bin/etcdctl"


def free_ports(count: int) -> list[int]:
    """Ports that nothing uses, below those of outgoing connections: a dead member keeps its own."""
    choice = random.SystemRandom()
    with ExitStack() as stack:
        found: list[int] = []
        while len(found) < count:
            port = choice.randrange(*PORTS)
            sock = stack.enter_context(socket.socket())
            with suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(port)
        return found


def ask(address: str, port: int, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to a member without TLS: POST, without a body GET."""
    connection = http.client.HTTPConnection(address, port, timeout=5)
    try:
        connection.request("GET" if body is None else "POST", path, json.dumps(body or {}))
        answer = json.loads(connection.getresponse().read())
        assert isinstance(answer, dict)
        return answer
    finally:
        connection.close()


class Member:
    """One server; it keeps its data while it is dead."""

    def __init__(self, name: str, client: int, peer: int) -> None:
        self.name = name
        self.client = client
        self.peer = peer
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> Endpoint:
        return Endpoint("localhost", self.client, "127.0.0.1")

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One request without credentials, for clusters without TLS."""
        return ask("127.0.0.1", self.client, path, body)

    def backup(self) -> bytes:
        """A snapshot of its data, as ``etcdctl snapshot save`` writes it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.client, timeout=5)
        try:
            connection.request("POST", "/v3/maintenance/snapshot", "{}")
            lines = connection.getresponse().read().splitlines()
            blobs = [json.loads(line)["result"].get("blob", "") for line in lines]
            return b"".join(map(base64.b64decode, blobs))
        finally:
            connection.close()


class EtcdCluster(Closing):
    """Three members in a folder in memory; ``tls`` are options for the clients' side."""

    def __init__(self, *options: str, scheme: str = "http", members: int = 3) -> None:
        self._program = make_etcd()
        self._options = options
        self._scheme = scheme
        self._clients: list[Etcd] = []
        # In memory: fsync of a disk that tests share would decide how long they take.
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm", prefix="etcd-")
        ports = free_ports(2 * members)
        self.members = [
            Member(f"m{number}", ports[2 * number], ports[2 * number + 1])
            for number in range(members)
        ]
        try:
            for member in self.members:
                self.start(member)
            self.wait_healthy()
        except BaseException:
            self.close()
            raise

    def start(self, member: Member) -> None:
        client = f"{self._scheme}://127.0.0.1:{member.client}"
        peers = ",".join(f"{each.name}=http://127.0.0.1:{each.peer}" for each in self.members)
        log = Path(self._folder.name, f"{member.name}.log")
        with log.open("ab") as output:
            member.process = subprocess.Popen(
                [
                    self._program,
                    f"--name={member.name}",
                    f"--data-dir={self._folder.name}/{member.name}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls=http://127.0.0.1:{member.peer}",
                    f"--initial-advertise-peer-urls=http://127.0.0.1:{member.peer}",
                    f"--initial-cluster={peers}",
                    "--initial-cluster-state=new",
                    "--log-level=warn",
                    *self._options,
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={"PATH": os.environ["PATH"], "GOMAXPROCS": "2"},
            )

    def restore(self, backup: Path) -> None:
        """Replace the data of the only member by a backup."""
        (member,) = self.members
        member.kill()
        data = Path(self._folder.name, member.name)
        shutil.rmtree(data)
        peer = f"http://127.0.0.1:{member.peer}"
        subprocess.run(
            [
                *(self._program.with_name("etcdutl"), "snapshot", "restore", backup),
                *("--skip-hash-check", f"--data-dir={data}", f"--name={member.name}"),
                f"--initial-cluster={member.name}={peer}",
                f"--initial-advertise-peer-urls={peer}",
            ],
            check=True,
            capture_output=True,
        )
        self.start(member)
        self.wait_healthy()

    def wait_healthy(self) -> None:
        """Wait until each member that runs answers; with TLS until it accepts connections."""
        end = time.monotonic() + START_TIMEOUT
        for member in self.members:
            while member.process is not None and not self._answers(member):
                assert time.monotonic() < end, self.logs()
                assert member.process.poll() is None, self.logs()
                time.sleep(0.05)

    def _answers(self, member: Member) -> bool:
        with suppress(OSError, http.client.HTTPException, ValueError):
            if self._scheme == "http":
                return member.ask("/health").get("health") == "true"
            socket.create_connection(("127.0.0.1", member.client), 1).close()
            return True
        return False

    def connect(self, **options: Any) -> Etcd:
        """A client, closed by `disconnect`."""
        self._clients.append(Etcd(self.endpoints, **options))
        return self._clients[-1]

    def disconnect(self) -> None:
        for client in self._clients:
            client.close()
        self._clients.clear()

    def logs(self) -> str:
        """The end of all logs."""
        texts = [path.read_text()[-2000:] for path in Path(self._folder.name).glob("*.log")]
        return "\n".join(texts)

    @property
    def endpoints(self) -> list[Endpoint]:
        return [member.endpoint for member in self.members]

    @property
    def urls(self) -> list[str]:
        return [f"{self._scheme}://127.0.0.1:{member.client}" for member in self.members]

    def leader(self) -> Member:
        """The present leader, as soon as there is one."""
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            for member in self.members:
                with suppress(OSError, http.client.HTTPException, ValueError, KeyError):
                    status = member.ask("/v3/maintenance/status", {})
                    if status["leader"] == status["header"]["member_id"]:
                        return member
            time.sleep(0.1)
        raise AssertionError(f"no leader\n{self.logs()}")

    def close(self) -> None:
        self.disconnect()
        for member in self.members:
            with suppress(ProcessLookupError):
                if member.process is not None:
                    member.signal(signal.SIGCONT)
            member.kill()
        self._folder.cleanup()
