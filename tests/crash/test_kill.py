# SPDX-License-Identifier: Apache-2.0
"""A daemon killed at any moment under a pipelined writer comes back with what it acknowledged."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from tests.support.daemon import Daemon, DaemonFactory
from tests.support.oracle import KEY, Frame
from tests.support.rig import UNIT_BLOCKS
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec

ROUNDS = int(os.environ.get("VHOST_RPMB_KILL_ROUNDS", "10"))  # on each engine
IN_FLIGHT = 16


class Writer:
    """A driver that keeps many writes in flight, and knows what each of them made of the image."""

    def __init__(self, seed: int) -> None:
        self._source = random.Random(seed)
        self.images = {0: bytes(spec.CAPACITY_UNIT)}  # by write counter
        self.acknowledged = 0  # the highest write counter whose OK was seen

    def check(self, client: RpmbClient) -> int:
        """Compare the device with what it may hold; return its write counter."""
        counter = client.read_counter()
        assert counter >= self.acknowledged
        assert client.read(0, UNIT_BLOCKS) == self.images[counter]
        self.images = {counter: self.images[counter]}
        self.acknowledged = counter
        return counter

    def write(self, client: RpmbClient, counter: int, least: int, then: Callable[[], None]) -> None:
        """Write until the daemon is gone; call `then` after `least` acknowledgements."""
        start = self.acknowledged
        if not least:
            then()
        sent: dict[int, int] = {}  # the write counter after each request in flight, by token
        with suppress(BackendError):
            while True:
                while len(sent) < IN_FLIGHT:
                    sent[client.submit(self._request(client, counter), spec.FRAME_SIZE)] = counter
                    counter += 1
                client.flush()
                for token, data in client.answers():
                    self._note(sent.pop(token), data)
                    if self.acknowledged == start + least:
                        then()
        # What the daemon gave back before it died is in the guest's memory.
        for head, length in client.ring.collect():
            self._note(sent.pop(head), client._take_answer(head, length))

    def _request(self, client: RpmbClient, counter: int) -> bytes:
        count = self._source.choice([1, 1, 1, 2, 8])
        address = self._source.randrange(UNIT_BLOCKS - count + 1)
        data = self._source.randbytes(count * spec.BLOCK_SIZE)
        image = bytearray(self.images[counter])
        start = address * spec.BLOCK_SIZE
        image[start : start + len(data)] = data
        self.images[counter + 1] = bytes(image)
        return client.write_request(address, data, counter)

    def _note(self, counter: int, answer: bytes) -> None:
        frame = Frame.unpack(answer)
        assert (frame.result, frame.write_counter) == (spec.VIRTIO_RPMB_RES_OK, counter + 1)
        self.acknowledged = counter + 1


def kill_while_starting(device: Daemon, delay: float) -> None:
    with subprocess.Popen(device.command_line, env=device.environment) as process:
        try:
            time.sleep(delay)
        finally:
            process.kill()


@pytest.mark.timeout(300 + 20 * ROUNDS)
def test_no_acknowledged_write_is_lost(daemon: DaemonFactory) -> None:
    writer, source = Writer(5), random.Random(6)
    written = 0
    for number in range(ROUNDS):
        running = daemon()
        with RpmbClient.connect(running.socket_path, KEY if number else None) as client:
            if not number:
                client.program_key(KEY)
            counter = writer.check(client)
            killer = threading.Timer(source.uniform(0.001, 0.06), running.send, [signal.SIGKILL])
            writer.write(client, counter, source.choice([0, 1, 2, 10]), killer.start)
            killer.join()
            written += writer.acknowledged - counter
        running.kill()
        if number % 4 == 3:  # also while the pending blocks go into the image
            kill_while_starting(running, source.uniform(0.05, 0.25))
    assert written > ROUNDS
