# SPDX-License-Identifier: Apache-2.0
"""Many daemons on one host, without work and all busy at once."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import host
from bench.host import Memory
from bench.measure import Bench
from bench.recording import CLOCK, Goal, Measured, record
from vhost_rpmb.testing import RunningDevice

pytestmark = pytest.mark.benchmark(timer=CLOCK, group="many daemons")

DAEMONS = 50
IDLE = 200  # daemons
READS = 5000  # of each daemon
SECONDS = 10
FEW, DATA = 2**20, 2 * 2**20  # bytes of an image that are not zeros


class Host(NamedTuple):
    """Running daemons; what each takes without a front-end, beside bare interpreters."""

    python: Path
    running: list[RunningDevice]
    idle: Memory
    bare: Memory
    with_sqlite: Memory

    @property
    def pids(self) -> list[int]:
        return [device.pid for device in self.running]


@pytest.fixture(scope="module")
def many(bench: Bench) -> Iterator[Host]:
    folder = bench.folder / "host"
    folder.mkdir()
    with host.environment(folder) as python:
        floors = []
        for program in (host.BARE, host.WITH_SQLITE):
            with host.interpreters(python, program, DAEMONS) as pids:
                floors.append(host.medians(pids))
        with host.daemons(folder, python, DAEMONS) as running:
            idle = host.medians([device.pid for device in running])
            for device in running:
                with device.client() as client:
                    client.program_key(bytes(32))
            yield Host(python, running, idle, *floors)


@pytest.mark.gate
@pytest.mark.quiet  # so many daemons take a minute to start on a shared machine
@pytest.mark.parametrize(
    ("kind", "limit"), [("private", 5.5), ("proportional", 6.5), ("resident", 16)]
)
def test_memory(goal: Goal, many: Host, kind: str, limit: float) -> None:
    """Of each without a front-end."""

    def measure() -> Measured:
        used, bare, with_sqlite = (
            getattr(each, kind) / 1024 for each in (many.idle, many.bare, many.with_sqlite)
        )
        how = f"bare Python {bare:.2f} MiB, with sqlite3 {with_sqlite:.2f} MiB"
        return Measured(used, f"{used:.2f} MiB; {how}")

    goal(f"{kind} memory of each of {DAEMONS} daemons, MiB", measure, limit)


@pytest.mark.gate
@pytest.mark.quiet
def test_sparse_image(goal: Goal, many: Host, tmp_path: Path) -> None:
    """A large image costs its data once: between two whose data differ.

    The first block of data makes libcrypto initialize itself, which takes 0.1 MiB.
    """

    def measure() -> Measured:
        less, more = (
            host.sparse(Path(tempfile.mkdtemp(dir=tmp_path)), many.python, size)
            for size in (FEW, FEW + DATA)
        )
        used = more - less
        return Measured(used * 1024 / DATA, f"{used} KiB for {DATA >> 20} MiB of data")

    goal("private memory of an image of 16 MiB / its data", measure, 1.1)


@pytest.mark.gate
@pytest.mark.quiet
def test_idle(goal: Goal, many: Host, tmp_path: Path) -> None:
    with host.daemons(tmp_path, many.python, IDLE - DAEMONS) as more:
        pids = [*many.pids, *(device.pid for device in more)]

        def measure() -> Measured:
            took, woken = host.idle(pids, SECONDS)
            return Measured(woken, f"{woken} wake-ups, {took * 1e3:.1f} ms in {SECONDS} s")

        goal(f"wake-ups of {IDLE} idle daemons together in {SECONDS} s", measure, 0)


def test_busy(bench: Bench, benchmark: BenchmarkFixture, many: Host) -> None:
    """The rounds are the daemons: the p99 of each."""
    p99 = host.busy(bench.tools, many.running, READS)
    what = f"the slowest of 100 reads, {DAEMONS} daemons busy at once on all processors"
    record(benchmark, p99, what=what, fairness=max(p99) / median(p99))
