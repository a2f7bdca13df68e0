# SPDX-License-Identifier: Apache-2.0
"""The goals of docs/performance.md, in one table."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from bench import measure
from bench.measure import Bench, Measured


class Row(NamedTuple):
    """One goal: what is measured, its value, the limit, and which side of it is good."""

    name: str
    measure: Callable[[Bench], Measured]
    limit: float
    at_least: bool = False
    stable: bool = True  # on a shared machine of two processors

    def good(self, value: float) -> bool:
        return value >= self.limit if self.at_least else value <= self.limit


ROWS = (
    Row(
        "1 read in flight, same CPU, no polling / eventfd ping-pong with one HMAC",
        measure.one_same_cpu,
        1.9,
    ),
    Row(
        "1 read in flight, two CPUs, driver awake / the same asleep",
        measure.one_two_cpus,
        0.1,
        stable=False,
    ),
    Row("a read at 64 in flight, same CPU / one HMAC", measure.sixty_four, 2),
    Row(
        "1 durable write in flight, driver awake / pwrite + fdatasync, same CPU as the daemon",
        measure.durable_write,
        1.25,
        stable=False,
    ),
    Row(
        "durable writes, two CPUs: rate at 32 / 1 in flight",
        measure.group_commit,
        20,
        True,
        stable=False,
    ),
    Row(
        "durable writes at 32 in flight: syncs a batch, checkpoints included",
        measure.syncs_per_batch,
        1.2,
    ),
    Row("OP-TEE put: syncs / durable writes", measure.syncs_of_put, 1.2),
    Row(
        "durable write of 1 block: bytes written, checkpoints included",
        measure.bytes_per_write,
        6000,
    ),
    Row("32-block write / 1-block write", measure.multi_block_write, 3),
    Row(
        "255-block read: byte rate / the HMAC's", measure.multi_block_read, 0.8, True, stable=False
    ),
    Row("reads at 64 in flight: system calls a batch", measure.calls_per_batch, 4),
    Row("reads at 64 in flight: instructions on top of one HMAC", measure.instructions, 1600),
    Row("reads at 64 in flight: bytes copied a request", measure.bytes_copied, 1100),
    Row(
        "reads at 64 in flight: instructions with the bookkeeping for restarts / without",
        measure.bookkeeping,
        1.02,
    ),
    Row(
        "reads at 64 in flight: system calls a batch for that bookkeeping, in one process",
        measure.bookkeeping_calls,
        0,
    ),
    Row("longest request at an orderly restart, ms", measure.orderly_gap, 100, stable=False),
    Row("longest request at a crash, ms", measure.crash_gap, 100, stable=False),
    Row("rebuilding the session after a crash, ms", measure.rebuild, 2, stable=False),
    Row("read, image of 16 MiB / 128 KiB", measure.flat(units=128), 1.15, stable=False),
    Row("read, 509 memory regions / 1", measure.flat(regions=509), 1.15, stable=False),
    Row("read, queue size 1024 / 128", measure.flat(queue=1024), 1.15, stable=False),
    Row(
        "read and memory after 10 million requests and 1,000 reconnects / before",
        measure.after_many,
        1.15,
        stable=False,
    ),
    Row("exec to listening / bare Python with cryptography", measure.start_time, 2.5, stable=False),
    Row("exec to listening, ms", measure.start_milliseconds, 120, stable=False),
    Row("resident memory / bare Python with cryptography", measure.memory, 1.5),
    Row(
        "64 reads in flight: pure engine / compiled engine", measure.engines, 25, True, stable=False
    ),
)
