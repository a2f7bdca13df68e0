# SPDX-License-Identifier: Apache-2.0
"""The latency of each kind of request, of both engines, or ours and a peer, in one group."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.daemon import CPUS, KEY, chains, counter_of, counter_reads, daemon, reads, writes
from bench.measure import Bench
from bench.peer import Peer
from bench.recording import CLOCK, record
from vhost_rpmb.engine import ENGINES

pytestmark = pytest.mark.benchmark(timer=CLOCK)

COUNTS = {"counter": 20_000, "read": 20_000, "durable write": 1000}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    peer = metafunc.config.getoption("peer")
    metafunc.parametrize("work", COUNTS)
    metafunc.parametrize(
        ("depth", "placement"), [(1, "same CPU"), (1, "two CPUs"), (32, "same CPU")]
    )
    metafunc.parametrize("who", ["ours", "peer"] if peer else ENGINES)  # one after the other


@contextmanager
def served(bench: Bench, request: pytest.FixtureRequest, who: str, cpu: int) -> Iterator[Peer]:
    """The peer, or a daemon of ours."""
    if who == "peer":
        yield request.getfixturevalue("peer")
    else:
        with daemon(bench.folder, engine="fast" if who == "ours" else who, cpu=cpu) as running:
            yield Peer(running.socket, KEY)


def test_latency(
    bench: Bench,
    benchmark: BenchmarkFixture,
    request: pytest.FixtureRequest,
    work: str,
    depth: int,
    placement: str,
    who: str,
) -> None:
    """Microseconds a request; the floor of a write is the disk's, the others' a ping-pong."""
    benchmark.group = f"{work}, {depth} in flight, {placement}"
    durable = work == "durable write"
    count = COUNTS[work] // (10 if who == "pure" and not durable else 1)
    count *= 8 if depth > 1 else 1
    daemons, drivers = CPUS[placement]
    with served(bench, request, who, daemons) as device:
        if durable:
            source = writes(1, counter_of(*device), device.key)
        else:
            source = reads() if work == "read" else counter_reads()
        with chains(bench.folder, source, count) as file:
            load = bench.tools.load(
                device.socket,
                file,
                count=count,
                frames=2 if durable else 1,
                depth=depth,
                cpu=drivers,
            )
    floor = bench.two_cpus if placement == "two CPUs" else bench.same_cpu
    if durable:
        floor = bench.sync()
    record(benchmark, [each / depth for each in load.times], floor, generator_us=load.own)
