# SPDX-License-Identifier: Apache-2.0
"""Three members of etcd on hosts of their own, with everything that they have stored."""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from tests.nemesis.network import Place
from tests.support.etcd import ask, make_etcd
from vhost_rpmb.storage.fleet.engine import Put
from vhost_rpmb.storage.fleet.etcd import Endpoint, Etcd

CLIENT, PEER = 2379, 2380
START_TIMEOUT = 60.0  # seconds


class Change(NamedTuple):
    revision: int
    key: bytes
    value: bytes | None  # None: deleted


class Member:
    """A server; it keeps its data while it is dead."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place = place
        self.folder = folder / place.name
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, members: list[Member], *before: str) -> None:
        """Start it; ``before`` is what its command line begins with."""
        client = f"http://{self.place.address}:{CLIENT}"
        peers = ",".join(f"{m.place.name}=http://{m.place.address}:{PEER}" for m in members)
        with self.folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                [
                    *self.place.enter,
                    *before,
                    make_etcd(),
                    f"--name={self.place.name}",
                    f"--data-dir={self.folder}",
                    f"--listen-client-urls={client}",
                    f"--advertise-client-urls={client}",
                    f"--listen-peer-urls=http://{self.place.address}:{PEER}",
                    f"--initial-advertise-peer-urls=http://{self.place.address}:{PEER}",
                    f"--initial-cluster={peers}",
                    "--log-level=error",
                ],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={"PATH": os.environ["PATH"], "GOMAXPROCS": "2"},
            )

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        if self.process is not None:
            with suppress(ProcessLookupError):
                self.process.kill()
            self.process.wait()

    def ask(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        return ask(self.place.address, CLIENT, path, body)

    def leads(self) -> bool:
        with suppress(OSError, http.client.HTTPException, ValueError, KeyError):
            status = self.ask("/v3/maintenance/status", {})
            return bool(status["leader"] == status["header"]["member_id"])
        return False


class Store:
    """The cluster as tests see it."""

    def __init__(self, places: list[Place], folder: Path) -> None:
        self.members = [Member(place, folder) for place in places]
        for member in self.members:
            member.start(self.members)
        self.leader()

    @property
    def urls(self) -> list[str]:
        return [f"http://{member.place.address}:{CLIENT}" for member in self.members]

    def connect(self) -> Etcd:
        addresses = [member.place.address for member in self.members]
        return Etcd([Endpoint(each, CLIENT, each) for each in addresses])

    def leader(self) -> Member:
        """The present leader, as soon as there is one."""
        end = time.monotonic() + START_TIMEOUT
        while time.monotonic() < end:
            for member in self.members:
                if member.leads():
                    return member
            time.sleep(0.2)
        raise AssertionError("the members have no leader")

    def mend(self, member: Member) -> None:
        """Start a member again, if it is dead."""
        if not member.alive:
            member.start(self.members)

    def changes(self, prefix: bytes, end: bytes) -> Iterator[Change]:
        """All changes of keys from the beginning, in order, up to now."""
        # A last change in the range, which is answered only when all earlier ones are known.
        marker = end[:-1] + bytes([end[-1] - 1]) + b"~"
        last = self.connect().txn([], [Put(marker, b"end")]).revision
        member = self.leader()
        connection = http.client.HTTPConnection(member.place.address, CLIENT, timeout=60)
        first, until = (base64.b64encode(each).decode() for each in (prefix, end))
        create = {"key": first, "range_end": until, "start_revision": "1", "progress_notify": True}
        connection.request("POST", "/v3/watch", json.dumps({"create_request": create}))
        response = connection.getresponse()
        while True:
            events = json.loads(response.readline())["result"].get("events", ())
            for event in events:
                pair = event["kv"]
                key, revision = base64.b64decode(pair["key"]), int(pair["mod_revision"])
                if revision >= last:
                    connection.close()
                    return
                deleted = event.get("type") == "DELETE"
                value = None if deleted else base64.b64decode(pair.get("value", ""))
                yield Change(revision, key, value)

    def close(self) -> None:
        for member in self.members:
            with suppress(ProcessLookupError, AssertionError):
                member.signal(signal.SIGCONT)
            member.kill()
