# SPDX-License-Identifier: Apache-2.0
"""Homes of a device's state, for tests that run on each: files of a host, and a shared store."""

from __future__ import annotations

import secrets
from contextlib import closing
from pathlib import Path
from typing import Protocol

from tests.storage.fleet.story import KEK
from tests.support.etcd import EtcdCluster
from tests.support.fake_engine import Cluster
from tests.support.fleet import Host
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet.administration import create, describe
from vhost_rpmb.storage.fleet.config import load
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import open_store as open_shared
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.interface import Store
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths

LEASE = 3600  # seconds: a test that waits for its end fails
DEVICE = "vm-1"


class Home(Protocol):
    """One device, which processes open one after the other."""

    def open(self, initial_counter: int | None, key_path: str | None) -> Store: ...

    def counter(self) -> int:
        """The write counter, while no process has the device."""

    @property
    def options(self) -> list[str]:
        """What a daemon is started with."""


class Files:
    """Files of this host."""

    def __init__(self, flash: Path) -> None:
        self.flash = flash

    @property
    def options(self) -> list[str]:
        return [f"--flash-path={self.flash}"]

    def open(self, initial_counter: int | None, key_path: str | None) -> Store:
        return open_store(
            Paths.resolve(str(self.flash), key_path=key_path),
            initial_counter=initial_counter,
            warn=lambda _: None,
        )

    def counter(self) -> int:
        return verify(Paths.resolve(str(self.flash))).counter


class Etcd:
    """A real etcd; all processes are on one host."""

    def __init__(self, folder: Path, cluster: EtcdCluster) -> None:
        prefix = f"/{secrets.token_hex(8)}/"
        self._host = Host(folder / "host", cluster, prefix, lease=LEASE)
        self._config = load(str(self._host.config))
        self._keys = Keys(self._config.prefix, DEVICE)
        with closing(self._config.connect()) as engine:
            create(Requests(engine), self._keys, KEK, spec.CAPACITY_UNIT, "test")

    @property
    def options(self) -> list[str]:
        return [self._host.store, f"--device={DEVICE}"]

    def open(self, initial_counter: int | None, key_path: str | None) -> Store:
        assert key_path is None
        config = self._config
        store = open_shared(
            Requests(config.connect()),
            self._keys,
            KEK,
            witness_folder=config.witness,
            lease_seconds=config.lease_seconds,
        )
        return with_counter(store, initial_counter)

    def counter(self) -> int:
        with closing(self._config.connect()) as engine:
            return describe(Requests(engine), self._keys, KEK).counter


class Memory:
    """An engine in memory, with a device for each image."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._cluster = Cluster()
        self._created: set[Path] = set()

    def open(self, flash: Path, options: dict[str, object]) -> Store:
        keys = Keys(b"/test/", flash.name)
        requests = Requests(self._cluster.connect(), sleep=self._cluster.sleep)
        if flash not in self._created:
            self._created.add(flash)
            create(requests, keys, KEK, flash.stat().st_size, "test")
        initial_counter = options.pop("initial_counter", None)
        assert not options
        assert initial_counter is None or isinstance(initial_counter, int)
        store = open_shared(
            requests,
            keys,
            KEK,
            witness_folder=str(self._folder),
            lease_seconds=LEASE,
            clock=lambda: self._cluster.now,
        )
        return with_counter(store, initial_counter)


def with_counter(store: FleetStore, initial_counter: int | None) -> FleetStore:
    """Let a new device have a write counter, which an imported one may have."""
    if initial_counter is not None:
        assert 0 <= initial_counter <= spec.MAX_WRITE_COUNTER
        assert store.commit(initial_counter, [], None)
    return store
