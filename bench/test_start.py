# SPDX-License-Identifier: Apache-2.0
"""The start of a daemon, its size, and the first use of its device."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench import optee
from bench.daemon import chains, daemon, reads
from bench.measure import Bench, bare_python, counted_start
from bench.recording import CLOCK, Goal, Measured, record

pytestmark = pytest.mark.benchmark(timer=CLOCK, group="start")

STARTS = 7


def started(bench: Bench) -> list[float]:
    """Microseconds from exec to listening, of new devices."""
    times = []
    for _ in range(STARTS):
        with daemon(bench.folder) as running:
            times.append(running.started * 1e6)
    return times


def bare() -> float:
    """Microseconds that a bare Python takes at least."""
    return min(bare_python()[0] for _ in range(STARTS)) * 1e6


@pytest.mark.gate
@pytest.mark.quiet
def test_start_ratio(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        floor, times = bare(), started(bench)
        how = f"{min(times) / 1e3:.0f} ms / {floor / 1e3:.0f} ms"
        return Measured(min(times) / floor, how, times, floor, "a new device: exec to listening")

    goal("exec to listening / bare Python with cryptography", measure, 2.5)


@pytest.mark.gate
@pytest.mark.quiet
def test_start(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        took = min(started(bench)) / 1e3
        return Measured(took, f"{took:.0f} ms")

    goal("exec to listening, ms", measure, 120)


@pytest.mark.gate
def test_start_instructions(goal: Goal, tmp_path: Path) -> None:
    def measure() -> Measured:
        started, floor = counted_start(Path(tempfile.mkdtemp(dir=tmp_path)))
        how = f"{started / 1e6:.1f} million instructions / {floor / 1e6:.1f} million"
        return Measured(started / floor, how)

    goal("a start: instructions / bare Python with sqlite3", measure, 2.6)


@pytest.mark.gate
def test_memory(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        floor = bare_python()[1]
        with daemon(bench.folder) as running, chains(bench.folder, reads(), 512) as file:
            bench.tools.load(running.socket, file, count=10_000, depth=64)
            used = running.memory()
        return Measured(used / floor, f"{used / 2**20:.1f} MiB / {floor / 2**20:.1f} MiB")

    goal("resident memory / bare Python with cryptography", measure, 1.5)


def test_provisioning(bench: Bench, benchmark: BenchmarkFixture) -> None:
    """From exec to the last answer: the key is programmed, then OP-TEE uses the device first.

    The floor is a bare Python and a sync for the key and each write.
    """
    records, commits = optee.first_use()
    times = []
    for _ in range(STARTS):
        with (
            daemon(bench.folder, blank=True) as running,
            chains(bench.folder, iter(records), len(records)) as file,
        ):
            load = bench.tools.load(running.socket, file, count=len(records), records=1)
            times.append((running.started + load.seconds) * 1e6)
    floor = bare() + commits * bench.sync()
    what = "a new device: exec to the last answer of a key and OP-TEE's first use"
    record(benchmark, times, floor, what, requests=len(records), durable=commits)
