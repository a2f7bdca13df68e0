# SPDX-License-Identifier: Apache-2.0
"""A full RPMB conversation, compared with a model; the independent oracle checks its answers."""

from __future__ import annotations

import random
from typing import NamedTuple

from tests.support.oracle import (
    BLOCK_SIZE,
    Frame,
    program_key,
    read_counter,
    read_result,
    sealed,
    write_data,
)
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec

MAX_BLOCKS = 4  # of a write


class _Write(NamedTuple):
    address: int
    counter: int  # after it


class Conversation:
    """The driver of a guest with a fresh device; `client.frontend` may be replaced under it."""

    def __init__(self, client: RpmbClient, seed: int = 1) -> None:
        self.client = client
        self.counter = 0
        self._source = random.Random(seed)
        self._image = bytearray(client.config.blocks * BLOCK_SIZE)
        self._sent: dict[int, _Write] = {}  # by token

    def begin(self) -> None:
        """Program the key."""
        answer = self.client.exchange(program_key() + read_result(), spec.FRAME_SIZE)
        assert Frame.unpack(answer) == sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY)
        self.check()

    def check(self) -> None:
        """Read the counter and the whole device, write once, and read the result separately."""
        client = self.client
        nonce = self._source.randbytes(spec.NONCE_SIZE)
        answer = client.exchange(read_counter(nonce), spec.FRAME_SIZE)
        assert Frame.unpack(answer) == sealed(
            nonce=nonce,
            write_counter=self.counter,
            req_resp=spec.VIRTIO_RPMB_RESP_GET_COUNTER,
        )
        assert client.read(0, client.config.blocks) == self._image
        request, write = self._make()
        assert client.exchange(request, 0) == b""
        self.check_result(write)

    def check_result(self, write: _Write) -> None:
        """Read the result register in a chain of its own."""
        answer = self.client.exchange(read_result(), spec.FRAME_SIZE)
        assert Frame.unpack(answer) == result_of(write)

    def write_alone(self) -> _Write:
        """Write without reading the result."""
        request, write = self._make()
        assert self.client.exchange(request, 0) == b""
        return write

    def submit(self, count: int) -> None:
        """Put writes into the ring, each with its RESULT_READ; do not wait."""
        for _ in range(count):
            request, write = self._make()
            token = self.client.submit(request + read_result(), spec.FRAME_SIZE)
            self._sent[token] = write
        self.client.flush()

    def finish(self) -> None:
        """Wait for all answers: each write was done, once."""
        while self._sent:
            for token, data in self.client.answers():
                assert Frame.unpack(data) == result_of(self._sent.pop(token))

    def finish_used(self) -> None:
        """Take the answers that have arrived, without waiting."""
        client = self.client
        for head, length in client.ring.collect():
            data = client._take_answer(head, length)
            assert Frame.unpack(data) == result_of(self._sent.pop(head))

    def _make(self) -> tuple[bytes, _Write]:
        count = self._source.randrange(1, MAX_BLOCKS + 1)
        address = self._source.randrange(self.client.config.blocks - count + 1)
        blocks = [self._source.randbytes(BLOCK_SIZE) for _ in range(count)]
        request = write_data(self.counter, address, *blocks)
        self._image[address * BLOCK_SIZE : (address + count) * BLOCK_SIZE] = b"".join(blocks)
        self.counter += 1
        return request, _Write(address, self.counter)


def result_of(write: _Write) -> Frame:
    return sealed(
        write_counter=write.counter,
        address=write.address,
        req_resp=spec.VIRTIO_RPMB_RESP_DATA_WRITE,
    )
