# SPDX-License-Identifier: Apache-2.0
"""Over restarts, a driver needs nothing but its call eventfd, and kicks only if it is asked to.

It looks at the used ring after a signal and at no other time, as a guest does after an interrupt.
"""

from __future__ import annotations

import os
import random
import select
import signal
import time
from collections import deque
from collections.abc import Iterator

import pytest

from tests.support.campaign import DIVISOR
from tests.support.daemon import PATIENCE, until
from tests.support.oracle import (
    BLOCK_SIZE,
    FRAME_SIZE,
    KEY,
    OK,
    mac_of,
    read_result,
    split,
    write_data,
)
from tests.support.supervised import Supervised
from vhost_rpmb.driver.rpmb import RpmbClient, Setup
from vhost_rpmb.virtio import spec as virtio

ROUNDS = 100 if DIVISOR == 1 else 4
BLOCKS = 512  # of the image
INDIRECT = 1 << virtio.VIRTIO_F_INDIRECT_DESC
FEATURES = {"flags": INDIRECT, "event index": INDIRECT | 1 << virtio.VIRTIO_F_EVENT_IDX}


class Driver:
    """Writes whose answers are known, and an interrupt handler that takes them."""

    def __init__(self, client: RpmbClient) -> None:
        self.client = client
        self.ring = client.ring
        self.counter = 0
        self._expected: deque[tuple[int, int]] = deque()  # the token, and the counter afterwards
        self._calls = select.poll()
        self._calls.register(self.ring.call_fd, select.POLLIN)
        client.program_key(KEY)
        self._take()
        self.forget_signal()

    def submit(self, count: int) -> None:
        """Put writes into the ring; the device does not see them yet."""
        for _ in range(count):
            data = self.counter.to_bytes(4, "big") * (BLOCK_SIZE // 4)
            request = write_data(self.counter, self.counter % BLOCKS, data) + read_result()
            self.counter += 1
            self._expected.append((self.client.submit(request, FRAME_SIZE), self.counter))

    def flush(self, count: int) -> None:
        self.submit(count)
        self.ring.flush()

    def wait(self) -> None:
        """Take all answers; sleeps on the call eventfd."""
        while self._expected:
            assert self._calls.poll(PATIENCE * 1000), f"no signal: {len(self._expected)} in flight"
            self.forget_signal()
            self._take()

    def forget_signal(self) -> None:
        if self._calls.poll(0):
            os.eventfd_read(self.ring.call_fd)

    @property
    def answered(self) -> bool:
        """Whether all answers are in memory; an observer's view, not the driver's."""
        used = self.ring.used_index - self.ring.base & 0xFFFF
        return used == self.ring.in_flight

    def _take(self) -> None:
        """What an interrupt handler does: until nothing arrives after asking for a signal."""
        while True:
            self.ring._ask_for_call()
            found = self.ring.collect()
            for head, length in found:
                token, counter = self._expected.popleft()
                assert head == token
                (frame,) = split(self.client._take_answer(head, length))
                assert (frame.result, frame.write_counter) == (OK, counter)
                assert frame.key_mac == mac_of(frame._replace(key_mac=bytes(32)))
            if not found:
                return

    def check(self) -> None:
        """Every write was executed exactly once."""
        assert self.client.read_counter() == self.counter
        for counter in range(max(0, self.counter - BLOCKS), self.counter):
            data = counter.to_bytes(4, "big") * (BLOCK_SIZE // 4)
            assert self.client.read(counter % BLOCKS, 1) == data


@pytest.fixture(params=FEATURES)
def driver(supervised: Supervised, request: pytest.FixtureRequest) -> Iterator[Driver]:
    setup = Setup(features=FEATURES[request.param])
    with RpmbClient.connect(supervised.path, timeout=PATIENCE, setup=setup) as client:
        yield Driver(client)


def test_call_eventfd_is_enough_over_restarts(supervised: Supervised, driver: Driver) -> None:
    """Requests before and after the signal that ends the process, at random distances."""
    manager = supervised.manager
    chosen = random.Random(3)
    for round_ in range(ROUNDS):
        starts = manager.starts
        driver.flush(chosen.choice((1, 2, 16)))
        time.sleep(chosen.choice((0, 0, 0.0002, 0.001, 0.003)))
        manager.send(signal.SIGTERM if round_ % 3 == 2 else signal.SIGKILL)
        for _ in range(chosen.choice((0, 1, 3))):
            driver.flush(1)
        driver.wait()
        manager.wait_ready(starts + 1)
    driver.check()


def test_signal_that_the_dead_process_owed_is_given(supervised: Supervised, driver: Driver) -> None:
    """It was killed after the store of the used index, before the signal."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        driver.flush(3)
        until(lambda: driver.answered)
        with supervised.manager.down(number):
            driver.forget_signal()
        driver.wait()
    driver.check()


def test_request_without_a_kick_is_served_by_the_next_process(
    supervised: Supervised, driver: Driver
) -> None:
    """The dead one had not asked for a kick; the next one asks for kicks as usual."""
    for number in (signal.SIGKILL, signal.SIGTERM):
        with supervised.manager.down(number):
            driver.submit(2)
            driver.ring.publish()
        driver.wait()
        for _ in range(3):
            driver.flush(1)
            driver.wait()
    driver.check()
