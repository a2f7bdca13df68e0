# SPDX-License-Identifier: Apache-2.0
"""A connection continues when the daemon is restarted or killed: requests and messages."""

from __future__ import annotations

import signal

import pytest

from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from vhost_rpmb.driver.errors import BackendError

SIGNALS = [signal.SIGTERM, signal.SIGKILL]


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_requests_continue_over_restarts(supervised: Supervised, number: int) -> None:
    with supervised.client() as client:
        client.program_key(KEY)
        for counter in range(5):
            assert client.write(counter, bytes([counter]) * 256) == counter + 1
            supervised.manager.restart(number)
            assert client.read_counter() == counter + 1
            assert client.read(counter, 1) == bytes([counter]) * 256
    supervised.becomes_empty()
    with supervised.client(KEY) as client:
        assert client.read_counter() == 5


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_messages_continue_over_restarts(supervised: Supervised, number: int) -> None:
    with supervised.client() as client:
        frontend = client.frontend
        for status in range(15, 20):
            supervised.manager.restart(number)
            assert frontend.get_status() == status
            frontend.set_status(status + 1)
        assert frontend.stop_ring() == 0


def test_stop_ends_the_connection(supervised: Supervised) -> None:
    with supervised.client() as client:
        supervised.manager.stop()
        with pytest.raises(BackendError, match="the back-end closed the connection"):
            client.frontend.receive()
