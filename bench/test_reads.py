# SPDX-License-Identifier: Apache-2.0
"""Reads: against the machine's floors, in counted work, and under unusual circumstances."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest

from bench.daemon import KEY, TWO_CPUS, chains, connected, daemon, percentile, reads
from bench.measure import Bench, counted, per_unit
from bench.recording import CLOCK, Goal, Measured, against
from vhost_rpmb.rpmb import spec

pytestmark = [pytest.mark.benchmark(timer=CLOCK, group="reads"), pytest.mark.gate]

# Beside a checkpoint:
IDLE = 1.0  # seconds without a request, after which it begins
ROUNDS, BLOCKS, AT_ONCE = 20, 4096, 32  # so many checkpoints, of so many blocks, written by so many
DURATION = 0.06  # seconds in which reads count: less than it takes with a read between two slices
MAC_BYTES = spec.FRAME_SIZE - spec.FRAME_DATA  # of a frame


def at_64(bench: Bench, count: int = 320_000, **options: Any) -> list[float]:
    """Microseconds a read with 64 in flight."""
    return [each / 64 for each in bench.reads(count, depth=64, **options).times]


def test_one_same_cpu(bench: Bench, goal: Goal) -> None:
    goal(
        "1 read in flight, same CPU, no polling / eventfd ping-pong with one HMAC",
        lambda: against(bench.reads(30_000, "--poll-us=0").times, bench.same_cpu),
        1.9,
    )


@pytest.mark.quiet
def test_one_two_cpus(bench: Bench, goal: Goal) -> None:
    goal(
        "1 read in flight, two CPUs, driver awake / the same asleep",
        lambda: against(bench.reads(50_000, cpus=TWO_CPUS, spin=1).times, bench.two_cpus),
        0.1,
    )


def test_64_same_cpu(bench: Bench, goal: Goal) -> None:
    goal(
        "a read at 64 in flight, same CPU / one HMAC",
        lambda: against(at_64(bench), bench.hmac),
        2,
    )


@pytest.mark.quiet
def test_multi_block(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        times = [each / 2 for each in bench.reads(5000, blocks=255, depth=2).times]
        took, floor = percentile(times, 50), 255 * bench.tools.floor("bulk", 2000)
        return Measured(floor / took, f"{took:.1f} µs / {floor:.1f} µs of HMAC", times, floor)

    goal("255-block read: byte rate / the HMAC's", measure, 0.8, at_least=True)


@pytest.mark.quiet
def test_engines(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        slow = bench.reads(6400, depth=64, engine="pure").times
        return against([each / 64 for each in slow], percentile(at_64(bench), 50))

    goal("64 reads in flight: pure engine / compiled engine", measure, 25, at_least=True)


@pytest.mark.quiet
@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("image of 16 MiB / 128 KiB", {"units": 128}),
        ("509 memory regions / 1", {"regions": 509}),
        ("queue size 1024 / 128", {"queue": 1024}),
    ],
    ids=["image", "regions", "queue"],
)
def test_flat(bench: Bench, goal: Goal, name: str, other: dict[str, int]) -> None:
    """64 reads in flight take as long under other circumstances as usually."""

    def quicker(**options: int) -> list[float]:
        runs = [at_64(bench, 200_000, **options) for _ in range(2)]
        return min(runs, key=lambda times: percentile(times, 50))

    goal(f"read, {name}", lambda: against(quicker(**other), percentile(quicker(), 50)), 1.15)


@pytest.mark.quiet
def test_after_many(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        with daemon(bench.folder) as running, chains(bench.folder, reads(), 512) as file:

            def load(count: int) -> list[float]:
                load = bench.tools.load(running.socket, file, count=count, depth=64, cpu=0)
                return [each / 64 for each in load.times]

            before = percentile(load(200_000), 50)
            memory = running.memory()
            load(10_000_000)
            for _ in range(1000):
                bench.tools.load(running.socket, file, count=1)
            times = load(200_000)
            grown = running.memory() - memory
        found = against(times, before)
        how = f"{found.how}, {grown / 1024:.0f} KiB grown"
        return found._replace(value=max(found.value, 1 + grown / memory), how=how)

    name = "read and memory after 10 million requests and 1,000 reconnects / before"
    goal(name, measure, 1.15)


@pytest.mark.quiet
def test_beside_checkpoints(bench: Bench, goal: Goal) -> None:
    """One read in flight from the begin of each checkpoint on: the time within which 99.9 % end.

    Those that end the second of idleness are few, and wake both processors: they are judged by
    their median, beside that after a pause without a checkpoint.
    """

    def measure() -> Measured:
        times: list[float] = []
        first: list[float] = []
        woken: list[float] = []  # by a read after a pause that is too short for a checkpoint
        units = BLOCKS * spec.BLOCK_SIZE // spec.CAPACITY_UNIT + 1
        with (
            daemon(bench.folder, units=units, cpu=TWO_CPUS[0]) as running,
            connected(running.socket, KEY) as client,
        ):

            def read() -> float:
                before = time.monotonic()
                client.read(0, 1)
                return (time.monotonic() - before) * 1e6

            usual = os.sched_getaffinity(0)
            # On one processor the daemon would wait for its thread that syncs the image.
            os.sched_setaffinity(running.pid, {*TWO_CPUS})
            os.sched_setaffinity(0, {TWO_CPUS[1]})
            try:
                for number in range(ROUNDS):
                    # Less than the number of blocks at which a checkpoint is part of the write.
                    for address in range(0, BLOCKS - AT_ONCE, AT_ONCE):
                        client.write(address, bytes([number]) * (AT_ONCE * spec.BLOCK_SIZE))
                    time.sleep(IDLE / 2)
                    woken.append(read())
                    time.sleep(IDLE)
                    first.append(read())
                    end = time.monotonic() + DURATION
                    while time.monotonic() < end:
                        times.append(read())
            finally:
                os.sched_setaffinity(0, usual)
        slowest = max(sorted(times)[len(times) * 999 // 1000], percentile(first, 50))
        how = (
            f"{len(times)} reads, median {percentile(times, 50):.0f} µs; after the pause"
            f" {percentile(first, 50):.0f} µs, without a checkpoint {percentile(woken, 50):.0f} µs"
        )
        return Measured(slowest / 1e3, how, times, what="a read beside a checkpoint")

    goal("reads beside checkpoints: 99.9 % end within, ms", measure, 1)


def test_system_calls(bench: Bench, goal: Goal) -> None:
    """The driver is asleep between the batches."""

    def measure() -> Measured:
        calls = per_unit(
            lambda batches: len(bench.traced("all", reads(), batches * 64, depth=64)), 50, 150, 100
        )
        return Measured(calls, f"{calls * 100:.0f} system calls / 100 batches")

    goal("reads at 64 in flight: system calls a batch", measure, 4)


def test_instructions(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        floor = str(bench.folder / "floor")
        mac = per_unit(
            lambda count: counted([floor, "hmac", str(count)], "callgrind"), 1000, 11_000, 10_000
        )
        read = bench.read_instructions
        return Measured(read - mac, f"{read:.0f} instructions - {mac:.0f} of one HMAC")

    goal("reads at 64 in flight: instructions on top of one HMAC", measure, 900)


def test_packed(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        split = bench.read_instructions
        packed = bench.counted_read("callgrind", mode=["packed"])
        return Measured(packed / split, f"{packed:.0f} instructions / {split:.0f}")

    goal("reads at 64 in flight: instructions in a packed ring / a split ring", measure, 1)


def test_copies(bench: Bench, goal: Goal) -> None:
    """Bytes that a read has copied by the C library; those of request and block are inlined."""

    def measure() -> Measured:
        copied = bench.counted_read("dhat", "--mode=copy")
        return Measured(copied, f"{copied:.0f} bytes")

    goal("reads at 64 in flight: bytes copied a request", measure, 600)
