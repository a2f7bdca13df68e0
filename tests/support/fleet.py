# SPDX-License-Identifier: Apache-2.0
"""Hosts that share a store on etcd: a folder with configuration, key and witness each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from tests.support.daemon import SANDBOX, Daemon

LEASE = 5  # seconds


class Cluster(Protocol):
    """What a host needs of a store."""

    @property
    def urls(self) -> list[str]: ...


class Host:
    """A host in a folder. All hosts of a test have the same key-encryption key.

    ``witness``: the folder of another one, as containers of one host have it.
    """

    def __init__(
        self,
        folder: Path,
        cluster: Cluster,
        prefix: str,
        *lines: str,
        lease: int = LEASE,
        witness: Path | None = None,
    ) -> None:
        folder.mkdir()
        self.folder = folder
        self.config = folder / "fleet.toml"
        self.witness = witness or folder / "witness"
        self.witness.mkdir(exist_ok=True)
        key = folder / "kek"
        key.touch(0o600)
        key.write_bytes(bytes(range(32)))
        self.config.write_text(
            "\n".join(
                (
                    f"endpoints = [{', '.join(repr(url) for url in cluster.urls)}]",
                    f'prefix = "{prefix}"',
                    f'key-file = "{key}"',
                    f'witness = "{self.witness}"',
                    f"lease = {lease}",
                    *lines,
                    "",
                )
            )
        )

    @property
    def store(self) -> str:
        return f"--store=etcd:{self.config}"

    def daemon(self, device: str, *options: str, engine: str | None = None) -> Daemon:
        """A daemon of this host, not yet started."""
        sandbox = SANDBOX or ["--sandbox=on"]
        home = [self.store, f"--device={device}"]
        daemon = Daemon(self.folder, *options, engine=engine, sandbox=sandbox, home=home)
        os.unlink(daemon.flash_path)
        return daemon


def ask(*arguments: str) -> dict[str, Any]:
    """Run the client program; return its report."""
    command = [sys.executable, "-m", "vhost_rpmb.client", "--json", "fleet", *arguments]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    fields = json.loads(report)
    assert isinstance(fields, dict)
    return fields


def create_device(host: Host) -> None:
    """Create the device "vm-1"."""
    ask("create", str(host.config), "vm-1")


def two_hosts(folder: Path, cluster: Cluster, prefix: str) -> list[Host]:
    """Two hosts with a device "vm-1" that no daemon owns."""
    hosts = [Host(folder / name, cluster, prefix) for name in ("a", "b")]
    create_device(hosts[0])
    return hosts


@contextmanager
def daemons(engine: str, *more: str) -> Iterator[Callable[..., Daemon]]:
    """A function that makes daemons of "vm-1" on a host; they are killed at the end."""
    made: list[Daemon] = []

    def make(host: Host, *options: str) -> Daemon:
        made.append(host.daemon("vm-1", *more, *options, engine=engine))
        return made[-1]

    try:
        yield make
    finally:
        for daemon in made:
            daemon.kill()


def describe(host: Host) -> dict[str, Any]:
    """The present state of the device "vm-1"."""
    return ask("info", str(host.config), "vm-1")
