# SPDX-License-Identifier: Apache-2.0
"""Restarts under a service manager: how long a request waits, and the cost of the bookkeeping."""

from __future__ import annotations

import signal
import subprocess

import pytest

from bench import restart
from bench.daemon import percentile
from bench.measure import Bench, per_unit
from bench.recording import CLOCK, Goal, Measured

pytestmark = [pytest.mark.benchmark(timer=CLOCK, group="restart"), pytest.mark.gate]


@pytest.mark.quiet
@pytest.mark.parametrize(
    ("name", "number"),
    [("an orderly restart", signal.SIGTERM), ("a crash", signal.SIGKILL)],
    ids=["orderly", "crash"],
)
def test_gap(bench: Bench, goal: Goal, name: str, number: int) -> None:
    def measure() -> Measured:
        found = restart.gaps(bench.folder, number)
        p50, p90 = percentile(found, 50), percentile(found, 90)
        how = f"{p50:.0f} ms, p90 {p90:.0f} ms, longest {max(found):.0f} ms"
        return Measured(p50, how, [each * 1e3 for each in found], what=f"a request during {name}")

    goal(f"longest request at {name}, ms", measure, 100)


@pytest.mark.quiet
def test_rebuild(bench: Bench, goal: Goal) -> None:
    def measure() -> Measured:
        found = restart.rebuilds(bench.folder)
        p50 = percentile(found, 50)
        return Measured(p50, f"{p50:.2f} ms", [each * 1e3 for each in found])

    goal("rebuilding the session after a crash, ms", measure, 2)


def test_instructions(bench: Bench, goal: Goal) -> None:
    """A read whose batch and chain are recorded for the next process, and another one."""

    def measure() -> Measured:
        plain = bench.read_instructions
        kept = bench.counted_read("callgrind", mode=["kept"])
        return Measured(kept / plain, f"{kept:.0f} instructions / {plain:.0f}")

    name = "reads at 64 in flight: instructions with the bookkeeping for restarts / without"
    goal(name, measure, 1.02)


def test_system_calls(bench: Bench, goal: Goal) -> None:
    def calls(batches: int) -> int:
        log = bench.folder / "strace"
        tracer = ["strace", "-qq", "-o", str(log)]
        subprocess.run([*tracer, *bench.work(batches, "kept")], check=True)
        return len(log.read_text().splitlines())

    def measure() -> Measured:
        subprocess.run(bench.work(1), check=True)  # makes the device
        found = per_unit(calls, 10, 110, 100)
        return Measured(found, f"{found * 100:.0f} system calls / 100 batches")

    name = "reads at 64 in flight: system calls a batch for that bookkeeping, in one process"
    goal(name, measure, 0)
