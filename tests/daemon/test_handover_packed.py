# SPDX-License-Identifier: Apache-2.0
"""A connection with a packed ring continues when the daemon is restarted or killed."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.conversation import Conversation
from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.packed import PackedRing
from vhost_rpmb.engine import Engine

SIGNALS = [signal.SIGTERM, signal.SIGKILL]
OPTION = "--virtio-features=+packed"


@pytest.fixture
def supervised(tmp_path: Path, engine: Engine) -> Iterator[Supervised]:
    with Supervised(tmp_path, OPTION, engine=engine.name) as supervised:
        yield supervised


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_requests_continue_over_restarts(supervised: Supervised, number: int) -> None:
    """More of them than two laps of the ring, and the register of results with them."""
    with supervised.client() as client:
        assert isinstance(client.ring, PackedRing)
        conversation = Conversation(client)
        conversation.begin()
        for _ in range(4):
            supervised.manager.restart(number)
            conversation.check()
            write = conversation.write_alone()
            supervised.manager.restart(number)
            conversation.check_result(write)
        assert not supervised.warnings
    supervised.becomes_empty()


def test_requests_in_flight_are_answered_once_over_kills(supervised: Supervised) -> None:
    chance = random.Random(3)
    with supervised.client() as client:
        conversation = Conversation(client)
        conversation.begin()
        for _ in range(12):
            conversation.submit(chance.randint(1, 24))
            supervised.manager.kill()
            conversation.finish()
        conversation.check()
        assert not supervised.warnings


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_ring_that_is_stopped_continues_at_its_base(supervised: Supervised, number: int) -> None:
    with supervised.client() as client:
        frontend = client.frontend
        client.program_key(KEY)
        for _ in range(5):
            assert client.read_counter() == 0
            assert frontend.stop_ring() == client.ring.base
            supervised.manager.restart(number)
            assert frontend.stop_ring() == client.ring.base
            frontend.start_ring(client.ring)
        # A driver that begins anew, at another base than the one where the ring stopped.
        frontend.stop_ring()
        supervised.manager.restart(number)
        client.ring.reset()
        frontend.start_ring(client.ring)
        supervised.manager.restart(number)
        assert client.read_counter() == 0
        assert not supervised.warnings


def test_daemon_that_no_longer_offers_the_ring_ends_the_connection(
    tmp_path: Path, engine: Engine
) -> None:
    with (
        Supervised(tmp_path, OPTION, engine=engine.name) as supervised,
        supervised.client() as client,
    ):
        with supervised.manager.down():
            supervised.manager.command.remove(OPTION)
        with pytest.raises(BackendError, match="closed the connection"):
            client.frontend.receive()
        (line,) = supervised.warnings
        assert "expected all features that were offered, found some missing" in line
