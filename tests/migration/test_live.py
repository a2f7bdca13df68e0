# SPDX-License-Identifier: Apache-2.0
"""A live migration: memory and device move while the guest goes on with its requests.

Memory is copied as a monitor does it: all of it once, then in rounds the pages that the guest or
the device has marked, the last of them when both are stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.migration.conftest import Hosts
from tests.support.conversation import Conversation
from tests.support.daemon import PATIENCE
from tests.support.dirty import DirtyMap, log_size, pages_of, snapshot
from tests.support.hosts import SETUP, MovingFrontend
from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.driver.rpmb import FEATURES, RpmbClient, Setup
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import ProtocolFeature, Request
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.spec import VHOST_LOG_PAGE as PAGE

ROUNDS = 6
IN_FLIGHT = 16
PACKED = 1 << virtio.VIRTIO_F_RING_PACKED
SPLIT = FEATURES & ~PACKED
OFFER = "--virtio-features=+packed"

pytestmark = pytest.mark.timeout(600)


class Migration:
    """A guest whose memory is copied to another one; ``log`` is its monitor's dirty log."""

    def __init__(self, talk: Conversation, other: GuestMemory, log: DirtyMap) -> None:
        self.talk = talk
        self.copied: list[int] = []  # pages, of each round
        self._memory = talk.client.memory
        self._other = other
        self._log = log
        self._written: set[int] = set()  # pages, by the guest
        for name in ("write", "store16", "store32"):
            setattr(self._memory, name, partial(self._write, getattr(self._memory, name)))

    def _write(self, store: Any, address: int, value: Any) -> None:
        """Store as the guest's processor does, with a mark for the monitor."""
        store(address, value)
        length = len(value) if isinstance(value, bytes) else 4
        self._written |= pages_of([(address, length)])

    def begin(self) -> None:
        """Start the log, in QEMU's order, while the ring runs; then copy everything."""
        client = self.talk.client
        frontend, ring = client.frontend, client.ring
        description = self._log.description.pack()
        reply = frontend.ask(Request.SET_LOG_BASE, description, [self._log.fd])
        assert reply == description
        accepted = frontend.features | wire.F_PROTOCOL_FEATURES | wire.F_LOG_ALL
        frontend.tell(Request.SET_FEATURES, wire.pack_u64(accepted))
        user = ring.memory.user_address
        parts = map(user, (ring.descriptor_table, ring.used_ring, ring.available_ring))
        place = wire.VringAddress(0, wire.VRING_ADDRESS_LOG, *parts)
        frontend.tell(Request.SET_VRING_ADDR, place._replace(log=ring.used_ring).pack())
        self._written.clear()
        self._log.take()
        for one, other in zip(self._memory.regions, self._other.regions, strict=True):
            other.view[:] = one.view

    def round(self) -> None:
        """Copy the marked pages, and no others."""
        pages = self._log.take() | self._written
        self._written = set()
        for page in pages:
            self._other.write(page * PAGE, self._memory.read(page * PAGE, PAGE))
        self.copied.append(len(pages))

    def stop(self) -> bytes:
        """Stop guest and device, copy the rest; return the state of the device."""
        frontend = self.talk.client.frontend
        assert isinstance(frontend, MovingFrontend)
        frontend.stop_ring()
        self.talk.finish_used()
        self.talk.submit(4)  # the device did not see them any more
        self.round()
        assert snapshot(self._memory) == snapshot(self._other)
        return frontend.save()

    def arrive(self, frontend: MovingFrontend, blob: bytes) -> None:
        """Let the guest continue in the other memory, with another device."""
        client = self.talk.client
        self._memory.regions, self._other.regions = self._other.regions, self._memory.regions
        frontend.handshake(client.setup.protocol_features)
        frontend.blob = blob
        frontend.start_device(client.setup.features)
        frontend.share_memory(self._memory)
        frontend.start_ring(client.ring)
        client.frontend = frontend


@contextmanager
def running(path: Path, features: int) -> Iterator[Conversation]:
    """A guest that has programmed the key of its device."""
    setup = Setup(
        features=features,
        protocol_features=SETUP.protocol_features | ProtocolFeature.LOG_SHMFD,
    )
    frontend = MovingFrontend.connect(path, timeout=PATIENCE)
    with RpmbClient(frontend, KEY, timeout=PATIENCE, setup=setup) as client:
        talk = Conversation(client)
        talk.begin()
        yield talk


def migrate(talk: Conversation, target: MovingFrontend, stack: ExitStack, each: Any) -> None:
    """Move a guest under load; ``each`` is called in every round."""
    memory = talk.client.memory
    stack.enter_context(target)
    other = stack.enter_context(GuestMemory(talk.client.setup.regions))
    log = stack.enter_context(DirtyMap(log_size(memory)))
    migration = Migration(talk, other, log)
    talk.submit(IN_FLIGHT)
    migration.begin()
    for _ in range(ROUNDS):
        each()
        migration.round()  # while the device works
        talk.finish()
        talk.submit(IN_FLIGHT)
    blob = migration.stop()
    total = sum(region.end - region.start for region in memory.regions) // PAGE
    assert 0 < max(migration.copied) < total // 2
    talk.client.frontend.close()
    migration.arrive(target, blob)
    talk.finish()
    talk.check()
    talk.submit(IN_FLIGHT)
    talk.finish()
    talk.check()


@pytest.mark.parametrize("features", [SPLIT, SPLIT | PACKED], ids=["split", "packed"])
def test_guest_moves_under_load(hosts: Hosts, copying: list[str], features: int) -> None:
    """Memory and device of the destination are those of the source."""
    source = hosts("source", *copying, OFFER)
    destination = hosts("destination", *copying, OFFER, incoming=True)
    with ExitStack() as stack, running(source.socket_path, features) as talk:
        assert (type(talk.client.ring) is Ring) == (features == SPLIT)
        migrate(talk, destination.connect(), stack, lambda: None)
    destination.stop()
    source.stop()
    assert "not complete" not in source.log


@pytest.mark.parametrize("features", [SPLIT, SPLIT | PACKED], ids=["split", "packed"])
def test_guest_moves_although_the_daemon_is_killed(
    hosts: Hosts, copying: list[str], engine: Engine, tmp_path: Path, features: int
) -> None:
    """In each round; the next process goes on with the log of the same connection."""
    folder = tmp_path / "supervised"
    folder.mkdir()
    destination = hosts("destination", *copying, OFFER, incoming=True)
    with ExitStack() as stack:
        source = stack.enter_context(Supervised(folder, *copying, OFFER, engine=engine.name))
        talk = stack.enter_context(running(source.path, features))

        def kill() -> None:
            source.manager.kill()
            talk.submit(4)

        migrate(talk, destination.connect(), stack, kill)
        assert source.manager.starts > ROUNDS
    destination.stop()
