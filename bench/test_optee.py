# SPDX-License-Identifier: Apache-2.0
"""What OP-TEE waits for, one request at a time: to put an object, and its recorded workload."""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import optee
from bench.daemon import CPUS, Load, chains, daemon, percentile
from bench.measure import Bench
from bench.recording import CLOCK, Goal, Measured, record
from tests.support.optee import PUT, recorded
from vhost_rpmb.engine import ENGINES

pytestmark = pytest.mark.benchmark(timer=CLOCK, group="OP-TEE")

PUTS = 40
ROUNDS = 5


def send(bench: Bench, records: list[bytes], engine: str, placement: str, group: int = 1) -> Load:
    """Send requests to a new device, each when the one before is answered."""
    daemons, drivers = CPUS[placement]
    with (
        daemon(bench.folder, "--max-read-blocks=0", engine=engine, cpu=daemons) as running,
        chains(bench.folder, iter(records), len(records)) as file,
    ):
        return bench.tools.load(
            running.socket, file, count=len(records), records=1, cpu=drivers, group=group
        )


@pytest.mark.parametrize("placement", CPUS)
@pytest.mark.parametrize("engine", ENGINES)
def test_put(bench: Bench, benchmark: BenchmarkFixture, engine: str, placement: str) -> None:
    """One after the other; of the round with the lowest ratio to the floor before and after it."""
    benchmark.group = "OP-TEE: put an object"
    rows = recorded()[PUT]
    rounds = []
    for _ in range(ROUNDS):
        before = optee.floor(bench, rows)
        times = send(bench, optee.puts(PUTS)[0], engine, placement, group=len(rows)).times
        rounds.append((percentile(times, 50), (before + optee.floor(bench, rows)) / 2, times))
    _, floor, times = min(rounds)
    record(benchmark, times, floor, f"OP-TEE puts an object, {engine} engine, {placement}")


@pytest.mark.parametrize("placement", CPUS)
@pytest.mark.parametrize("engine", ENGINES)
def test_workload(bench: Bench, benchmark: BenchmarkFixture, engine: str, placement: str) -> None:
    """A request of the whole workload; of the quickest round."""
    benchmark.group = "OP-TEE: a request of its workload"
    rounds = [send(bench, optee.whole()[0], engine, placement).times for _ in range(ROUNDS)]
    times = min(rounds, key=lambda each: percentile(each, 50))
    what = f"a request of OP-TEE's workload, {engine} engine, {placement}"
    record(benchmark, times, what=what, whole_ms=sum(times) / 1e3)


@pytest.mark.gate
def test_syncs(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        counts = []
        for objects in (20, 120):
            records, durable = optee.puts(objects)
            lines = bench.traced("fdatasync,fsync", iter(records), len(records), records=1)
            counts.append((len(lines), durable))
        (few, few_writes), (many, many_writes) = counts
        syncs, writes = many - few, many_writes - few_writes
        return Measured(syncs / writes, f"{syncs} syncs / {writes} writes of 100 puts")

    goal("OP-TEE put: syncs / durable writes", measure, 1.2)
