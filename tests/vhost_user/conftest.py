# SPDX-License-Identifier: Apache-2.0
"""A connection over a real socket, with real eventfds and guest memory."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator

import pytest

from tests.support.manager import Manager
from tests.support.peer import PAGE, EchoDevice, Peer, open_fds
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.interfaces import Keeper


@pytest.fixture(autouse=True)
def _no_descriptor_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    if open_fds() != before:
        gc.collect()  # a traceback may keep objects; takes longer than most tests
    # What may wait is closed by threads.
    deadline = time.monotonic() + 10
    while open_fds() != before and time.monotonic() < deadline:
        time.sleep(0.001)
    assert open_fds() == before


@pytest.fixture
def device() -> EchoDevice:
    return EchoDevice()


@pytest.fixture(params=["plain", pytest.param("kept", marks=pytest.mark.kept)])
def keeper(request: pytest.FixtureRequest, _no_descriptor_leaks: None) -> Iterator[Keeper | None]:
    """None, and a keeper that stores each connection for another process."""
    if request.param == "plain":
        yield None
        return
    with Manager() as manager:
        yield manager.handover
        assert manager.handover.active


@pytest.fixture
def region(_no_descriptor_leaks: None) -> Iterator[int]:
    """The file of an in-flight region."""
    fd = os.memfd_create("region")
    os.ftruncate(fd, PAGE)
    yield fd
    os.close(fd)


@pytest.fixture
def fresh(engine: Engine, device: EchoDevice, keeper: Keeper | None) -> Iterator[Peer]:
    """A connection on which nothing was said yet."""
    peer = Peer(engine, device, keeper)
    yield peer
    peer.close()


@pytest.fixture
def peer(fresh: Peer) -> Peer:
    """A connection with everything negotiated."""
    fresh.negotiate()
    return fresh


@pytest.fixture
def memory(_no_descriptor_leaks: None) -> Iterator[GuestMemory]:
    with GuestMemory() as memory:
        yield memory


@pytest.fixture
def ring(memory: GuestMemory) -> Iterator[Ring]:
    with Ring(memory, 8) as ring:
        yield ring


@pytest.fixture
def eventfds(_no_descriptor_leaks: None) -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(2)]
    yield fds
    wire.close_fds(fds)


@pytest.fixture
def memfd(_no_descriptor_leaks: None) -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 16 * PAGE)
    yield fd
    os.close(fd)
