# SPDX-License-Identifier: Apache-2.0
"""Durable writes: against the disk, in batches, in syncs and bytes."""

from __future__ import annotations

import pytest

from bench.daemon import SAME_CPU, percentile, writes
from bench.measure import Bench, per_unit
from bench.recording import CLOCK, Goal, Measured, against

pytestmark = [pytest.mark.benchmark(timer=CLOCK, group="durable writes"), pytest.mark.gate]

RUNS = 5


@pytest.mark.quiet
def test_one(bench: Bench, goal: Goal) -> None:
    """The floor is from before and after."""

    def measure() -> Measured:
        before = bench.sync()
        times = bench.writes(2000, spin=1).times
        return against(times, (before + bench.sync()) / 2)

    name = "1 durable write in flight, driver awake / pwrite + fdatasync, same CPU as the daemon"
    goal(name, measure, 1.25)


@pytest.mark.quiet
def test_one_asleep(bench: Bench, goal: Goal) -> None:
    """Runs and floors take turns; the median of the runs counts."""

    def measure() -> Measured:
        before, runs = bench.sync(), []
        for _ in range(RUNS):
            times = bench.writes(400, cpus=SAME_CPU).times
            after = bench.sync()
            runs.append(against(times, (before + after) / 2))
            before = after
        return sorted(runs, key=lambda run: run.value)[RUNS // 2]

    name = "1 durable write in flight, driver asleep / pwrite + fdatasync, all on one CPU"
    goal(name, measure, 1.3)


@pytest.mark.quiet
def test_group_commit(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        one, many = bench.writes(1000), bench.writes(16_000, depth=32)
        rates = one.requests / one.seconds, many.requests / many.seconds
        how = f"{rates[1]:.0f}/s / {rates[0]:.0f}/s"
        return Measured(rates[1] / rates[0], how, [each / 32 for each in many.times])

    goal("durable writes, two CPUs: rate at 32 / 1 in flight", measure, 20, at_least=True)


def test_multi_block(bench: Bench, goal: Goal) -> None:
    goal(
        "32-block write / 1-block write",
        lambda: against(
            bench.writes(1000, blocks=32).times, percentile(bench.writes(1000).times, 50)
        ),
        3,
    )


def test_syncs(bench: Bench, goal: Goal) -> None:
    def syncs(batches: int) -> int:
        return len(bench.traced("fdatasync,fsync", writes(), batches * 32, frames=2, depth=32))

    def measure() -> Measured:
        found = per_unit(syncs, 50, 150, 100)
        return Measured(found, f"{found * 100:.0f} syncs / 100 batches")

    goal("durable writes at 32 in flight: syncs a batch, checkpoints included", measure, 1.2)


def test_bytes(bench: Bench, goal: Goal) -> None:
    def written(count: int) -> int:
        lines = bench.traced("pwrite64", writes(), count, frames=2)
        results = [line.rpartition("= ")[2] for line in lines]
        return sum(int(result) for result in results if result.isdigit())

    def measure() -> Measured:
        found = per_unit(written, 500, 1500, 1000)
        return Measured(found, f"{found * 1000:.0f} bytes / 1000 writes")

    goal("durable write of 1 block: bytes written, checkpoints included", measure, 6000)
