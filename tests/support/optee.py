# SPDX-License-Identifier: Apache-2.0
"""What OP-TEE sends, and what a device answers.

``tests/data/optee-workload.tsv`` is what OP-TEE 4.10 sent in one run of many puts, gets, in-place
writes and deletes of objects. Frames and answers are made here from the numbers in it, by an
independent model of the device.
"""

from __future__ import annotations

import csv
import random
import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from tests.support import oracle
from tests.support.documents import ROOT
from tests.support.oracle import BLOCK_SIZE, Frame

WORKLOAD = ROOT / "tests/data/optee-workload.tsv"
PUT = slice(23, 38)  # its rows that put one object of 16 to 60 bytes
COUNTS = struct.Struct("=II")  # frames of a request and of its answer
RESPONSE = 8  # the bits by which the type of an answer is that of the request


class Exchange(NamedTuple):
    """Frames as OP-TEE sends and expects them: it leaves RESULT_READ to the kernel."""

    request: bytes
    answer: bytes

    @property
    def durable(self) -> bool:
        """Whether the answer promises that something is durable."""
        return oracle.split(self.request)[0].req_resp in (oracle.PROGRAM_KEY, oracle.DATA_WRITE)

    @property
    def chain(self) -> bytes:
        """The request as the kernel sends it: what has to be durable with RESULT_READ."""
        return self.request + (oracle.read_result() if self.durable else b"")

    def pack(self) -> bytes:
        sizes = (len(self.request) // oracle.FRAME_SIZE, len(self.answer) // oracle.FRAME_SIZE)
        return COUNTS.pack(*sizes) + self.request + self.answer


class Model:
    """A device: what it answers to the next request."""

    def __init__(self, key: bytes = oracle.KEY, blocks: int = 512) -> None:
        self.content = bytearray(blocks * BLOCK_SIZE)
        self.counter = 0
        self._key = key
        self._random = random.Random(blocks)

    def program_key(self) -> Exchange:
        answer = self._answer(oracle.PROGRAM_KEY)
        return Exchange(oracle.program_key(self._key, block_count=0), answer)

    def read_counter(self) -> Exchange:
        nonce = self._nonce()
        answer = self._answer(oracle.GET_WRITE_COUNTER, nonce=nonce, write_counter=self.counter)
        return Exchange(oracle.read_counter(nonce, block_count=0), answer)

    def write(self, address: int, count: int) -> Exchange:
        blocks = [self._random.randbytes(BLOCK_SIZE) for _ in range(count)]
        request = oracle.write_data(self.counter, address, *blocks, key=self._key)
        self.counter += 1
        start = address * BLOCK_SIZE
        self.content[start : start + count * BLOCK_SIZE] = b"".join(blocks)
        answer = self._answer(oracle.DATA_WRITE, address=address, write_counter=self.counter)
        return Exchange(request, answer)

    def read(self, address: int, count: int) -> Exchange:
        nonce = self._nonce()
        frames = [
            Frame(
                data=bytes(self.content[number * BLOCK_SIZE :][:BLOCK_SIZE]),
                nonce=nonce,
                address=address,
                block_count=count,
                req_resp=oracle.DATA_READ << RESPONSE,
            )
            for number in range(address, address + count)
        ]
        answer = oracle.pack(oracle.sign(frames, self._key))
        return Exchange(oracle.read_data(address, 0, nonce), answer)

    def _answer(self, kind: int, **fields: int | bytes) -> bytes:
        return oracle.sealed(self._key, **fields, req_resp=kind << RESPONSE).pack()

    def _nonce(self) -> bytes:
        return self._random.randbytes(16)


class Row(NamedTuple):
    """One recorded request."""

    request: str
    address: int
    blocks: int


def recorded() -> list[Row]:
    """Read the file."""
    with WORKLOAD.open() as rows:
        return [
            Row(row["request"], int(row["address"]), int(row["blocks"]))
            for row in csv.DictReader(rows, delimiter="\t")
        ]


def workload(model: Model) -> Iterator[Exchange]:
    """The recorded requests, the key before them."""
    yield model.program_key()
    yield from played(model, recorded())


def played(model: Model, rows: Iterable[Row]) -> Iterator[Exchange]:
    """Requests as recorded in these rows."""
    for request, address, blocks in rows:
        if request == "GET_WRITE_COUNTER":
            yield model.read_counter()
        elif request == "DATA_WRITE":
            yield model.write(address, blocks)
        else:
            yield model.read(address, blocks)
