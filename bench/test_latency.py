# SPDX-License-Identifier: Apache-2.0
"""The latency of each kind of request, of both engines beside each other in one group."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.daemon import CPUS, chains, counter_reads, daemon, reads, writes
from bench.measure import Bench
from bench.recording import CLOCK, record
from vhost_rpmb.engine import ENGINES

pytestmark = pytest.mark.benchmark(timer=CLOCK)

Source = Callable[[], Iterator[bytes]]
WORK: dict[str, tuple[Source, int, int]] = {  # chains, frames of each, how many
    "counter": (counter_reads, 1, 20_000),
    "read": (reads, 1, 20_000),
    "durable write": (writes, 2, 1000),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("depth", "placement"), [(1, "same CPU"), (1, "two CPUs"), (32, "same CPU")]
)
@pytest.mark.parametrize("work", WORK)
def test_latency(
    bench: Bench, benchmark: BenchmarkFixture, work: str, depth: int, placement: str, engine: str
) -> None:
    """Microseconds a request; the floor of a write is the disk's, the others' a ping-pong."""
    benchmark.group = f"{work}, {depth} in flight, {placement}"
    source, frames, count = WORK[work]
    if work != "durable write" and engine == "pure":
        count //= 10
    count *= 8 if depth > 1 else 1
    daemons, drivers = CPUS[placement]
    with (
        daemon(bench.folder, engine=engine, cpu=daemons) as running,
        chains(bench.folder, source(), count) as file,
    ):
        load = bench.tools.load(
            running.socket, file, count=count, frames=frames, depth=depth, cpu=drivers
        )
    floor = bench.two_cpus if placement == "two CPUs" else bench.same_cpu
    if work == "durable write":
        floor = bench.sync()
    record(benchmark, [each / depth for each in load.times], floor, generator_us=load.own)
