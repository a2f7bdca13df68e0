# SPDX-License-Identifier: Apache-2.0
"""What OP-TEE sends, as records for the load generator: a first use, puts, a whole workload."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice

from bench.daemon import KEY
from bench.measure import Bench
from tests.support import oracle
from tests.support.optee import COUNTS, PUT, Exchange, Model, Row, played, recorded, workload

FIRST_USE = 8  # requests of a new device, after the key


def first_use() -> tuple[list[bytes], int]:
    """Records that program the key and use the device first, and how many have to be durable."""
    return _records(islice(workload(Model(KEY)), 1 + FIRST_USE))


def puts(count: int) -> tuple[list[bytes], int]:
    """Records of so many puts, and how many of them have to be durable."""
    return _records(played(Model(KEY), recorded()[PUT] * count))


def whole() -> tuple[list[bytes], int]:
    """Records of the whole workload, the pauses left out."""
    return _records(played(Model(KEY), recorded()))


def floor(bench: Bench, rows: Sequence[Row]) -> float:
    """Syncs and MACs that the machine takes at least: a write checks one MAC and makes another."""
    writes = sum(row.request == "DATA_WRITE" for row in rows)
    further = sum(row.blocks - 1 for row in rows if row.request == "DATA_READ")
    return (
        writes * bench.sync(count=100)
        + (len(rows) + writes) * bench.hmac
        + further * bench.tools.floor("bulk", 100)
    )


def _records(exchanges: Iterable[Exchange]) -> tuple[list[bytes], int]:
    records, durable = [], 0
    for exchange in exchanges:
        durable += exchange.durable
        chain = exchange.chain
        sizes = (len(chain) // oracle.FRAME_SIZE, len(exchange.answer) // oracle.FRAME_SIZE)
        records.append(COUNTS.pack(*sizes) + chain)
    return records, durable
