# SPDX-License-Identifier: Apache-2.0
"""The life of a device on three hosts, with a model that says what each start has to find."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from tests.support.fake_engine import Cluster, Crash
from tests.support.oracle import KEY
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.storage.fleet.administration import create
from vhost_rpmb.storage.fleet.engine import Engine
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.interface import TakeOver

KEYS = Keys(b"/test/", "vm-1")
KEK = KeyEncryptionKey(bytes(range(32)))
SIZE = 128 * 1024
LEASE = 15
BLANK = bytes(256)

State = tuple[int, bytes | None, dict[int, bytes]]


def block(value: int) -> bytes:
    return bytes([value]) * 256


class AnyCluster(Protocol):
    """What a story needs of a cluster, on an engine in memory or a real one."""

    @property
    def now(self) -> float: ...
    def sleep(self, seconds: float) -> None: ...
    def deliver(self) -> None: ...
    def connect(self) -> Engine: ...


class Story:
    """The device, its model, and the stores that were opened.

    ``state`` is what was acknowledged. ``doubtful``: what a commit without an answer, because its
    client died, would have made of it. ``proof``: the host can prove that a client is dead.
    """

    proof = True

    def __init__(self, cluster: AnyCluster, folder: Path, lease: int = LEASE) -> None:
        self.cluster = cluster
        self.lease = lease  # seconds
        self.folder = folder  # of the witness
        for path in folder.iterdir():
            path.unlink()
        self.state: State = (0, None, {})
        self.doubtful: State | None = None
        self.stores: list[FleetStore] = []
        self.opened: list[FleetStore] = []

    def requests(self) -> Requests:
        return Requests(self.cluster.connect(), sleep=self.cluster.sleep)

    def create(self) -> None:
        for _ in range(10):
            try:
                create(self.requests(), KEYS, KEK, SIZE, "test")
            except StateError as error:
                if "exists" in str(error):
                    raise
            except Crash:
                if self.requests().read([], [KEYS.owner]).found:
                    return
            else:
                return
        raise AssertionError("the device cannot be created")

    def open(self, mode: TakeOver = "expired") -> FleetStore:
        """Open as the next host, again after a refused or dead start; compare with the model."""
        for _ in range(10):
            try:
                store = open_store(
                    self.requests(),
                    KEYS,
                    KEK,
                    witness_folder=str(self.folder),
                    mode=mode,
                    lease_seconds=self.lease,
                    clock=lambda: self.cluster.now,
                )
            except StateError as error:
                if "refused" not in str(error):
                    raise
                continue
            except Crash:
                continue
            break
        else:
            raise AssertionError("the device cannot be opened")
        if mode == "now":
            self.stores.clear()  # for reads, they count as dead
        for other in self.stores:
            assert other.until <= self.cluster.now, "two stores may answer reads"
        self.stores.append(store)
        self.opened.append(store)
        found = self.found(store)
        assert found in (self.state, self.doubtful), "the state is not the acknowledged one"
        self.state, self.doubtful = found, None
        return store

    def bury(self, store: FleetStore) -> None:
        """Let the process of a store be dead: it answers no read, and its lock is free."""
        store._ownership._claim.release(keep=self.proof)
        self.stores = [each for each in self.stores if each is not store]

    def end(self) -> None:
        """Let all processes be dead."""
        for store in self.opened:
            self.bury(store)

    @staticmethod
    def found(store: FleetStore) -> State:
        assert not any(store.damaged)
        image = bytes(store.image)
        blocks = {at // 256: image[at : at + 256] for at in range(0, SIZE, 256)}
        return store.counter, store.key, {a: data for a, data in blocks.items() if data != BLANK}

    def commit(
        self, store: FleetStore, blocks: list[tuple[int, bytes]], key: bytes | None = None
    ) -> FleetStore:
        """Commit; if the client dies, go on with a store that takes the device over."""
        counter = self.state[0] + (1 if blocks else 0)
        after = (counter, key or self.state[1], {**self.state[2], **dict(blocks)})
        try:
            done = store.commit(counter, blocks, key)
        except Crash:
            self.doubtful = after
            self.bury(store)
            return self.open()
        if done:
            self.state = after
        assert self.found(store) == self.state
        return store

    def step(self, store: FleetStore, step: Callable[[FleetStore], object]) -> FleetStore:
        try:
            step(store)
        except Crash:
            self.bury(store)
            return self.open()
        return store

    def run(self) -> None:
        self.create()
        store = self.open()
        store = self.commit(store, [], KEY)
        store = self.commit(store, [(0, block(1)), (511, block(2))])
        store = self.commit(store, [(address, block(3)) for address in range(60, 70)])
        store = self.step(store, FleetStore.checkpoint)
        store = self.commit(store, [(0, block(4)), (65, block(5)), (0, block(6))])
        store = self.step(store, FleetStore.renew)
        store = self.step(store, FleetStore.checkpoint)
        store = self.commit(store, [(1, block(7))])
        self.cluster.sleep(self.lease + 1)  # its host sleeps longer than the lease, nobody comes
        store = self.step(store, FleetStore.renew)
        store = self.step(store, FleetStore.renew)
        store = self.commit(store, [(0, block(8))])
        store = self.step(store, FleetStore.close)
        store = self.open()
        store = self.commit(store, [(65, block(9))])
        store = self.step(store, FleetStore.checkpoint)
        left = self.commit(store, [(0, block(10))])
        store = self.open("now")  # while the other one runs
        store = self.commit(store, [(0, block(11))])
        self.expect_fenced(left, lambda: left.commit(store.counter, [(0, block(12))], None))
        self.expect_fenced(left, left.renew)
        store = self.step(store, FleetStore.close)
        self.cluster.deliver()
        self.open()

    def expect_fenced(self, store: FleetStore, action: Callable[[], object]) -> None:
        """The store of a previous owner: no success, and nothing changes."""
        until = store.until
        with suppress(Crash):
            try:
                done = action()
            except Fenced:
                return
            assert done is False, "a previous owner succeeds"
            assert store.until == until


class MemoryStory(Story):
    """A story on an engine in memory, which tests manipulate."""

    cluster: Cluster
