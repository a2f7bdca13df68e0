# SPDX-License-Identifier: Apache-2.0
"""Processor time of a daemon: what polling costs, by the driver's pause between reads."""

from __future__ import annotations

import time

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.daemon import TWO_CPUS, chains, daemon, reads
from bench.measure import Bench
from bench.recording import CLOCK, record

pytestmark = pytest.mark.benchmark(timer=CLOCK, group="processor time a second")

SECONDS = 2


@pytest.mark.parametrize("poll", [0, 64, 200, 1000])
@pytest.mark.parametrize("pause", [0, 10_000, 1000, 100], ids=["idle", "10ms", "1ms", "100us"])
def test_processor_time(bench: Bench, benchmark: BenchmarkFixture, pause: int, poll: int) -> None:
    with (
        daemon(bench.folder, f"--poll-us={poll}") as running,
        chains(bench.folder, reads(), 512) as file,
    ):
        load = {"cpu": TWO_CPUS[1], "pause": pause}
        bench.tools.load(running.socket, file, **load | {"count": 100, "pause": 0})
        before, start = running.cpu_time(), time.monotonic()
        if pause:
            count = SECONDS * 1_000_000 // pause
            bench.tools.load(running.socket, file, **load, count=count)
        else:
            time.sleep(SECONDS)
        share = (running.cpu_time() - before) / (time.monotonic() - start)
    record(benchmark, [share * 1e6])
