# SPDX-License-Identifier: Apache-2.0
"""How a measurement becomes a benchmark of pytest-benchmark, and how a goal is judged.

The programs in C and the clocks of processes measure; pytest-benchmark gets the times as rounds, by
the timer ``CLOCK``, which every module of benchmarks names in its ``pytestmark``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.daemon import percentile

MAX_ROUNDS = 1000  # of a benchmark: every n-th time of a longer measurement
TRIES = 3


class Clock:
    """A timer that shows the time it was moved to."""

    def __init__(self) -> None:
        self._now = 0.0

    def __call__(self) -> float:
        return self._now

    def move(self, seconds: float) -> None:
        self._now += seconds


CLOCK = Clock()


class Measured(NamedTuple):
    """One measurement: what a goal limits, how it came about, and the times, if there are any."""

    value: float
    how: str
    times: Sequence[float] = ()  # microseconds
    floor: float | None = None  # microseconds
    what: str | None = None  # what a user waits for, if the times say that


def against(times: Sequence[float], floor: float, what: str | None = None) -> Measured:
    """The median of times as a ratio to a floor, all in microseconds."""
    took = percentile(times, 50)
    return Measured(took / floor, f"{took:.2f} µs / {floor:.2f} µs", times, floor, what)


def record(
    benchmark: BenchmarkFixture,
    times: Sequence[float],
    floor: float | None = None,
    what: str | None = None,
    **info: object,
) -> None:
    """Make times (microseconds) the rounds of a benchmark; percentiles are of all of them.

    ``what``: they are what a user waits for.
    """
    for percent in (50, 90, 99):
        benchmark.extra_info[f"p{percent}_us"] = percentile(times, percent)
    if floor is not None:
        benchmark.extra_info |= {"floor_us": floor, "ratio": percentile(times, 50) / floor}
    if what is not None:
        benchmark.extra_info["what"] = what
    benchmark.extra_info |= info
    rounds = times[:: -(-len(times) // MAX_ROUNDS)]
    shown = iter(rounds)

    def turn() -> None:
        CLOCK.move(next(shown) / 1e6)

    benchmark.pedantic(turn, rounds=len(rounds))  # type: ignore[no-untyped-call]


class Goal:
    """Judges the best of three tries; the fixture ``goal`` of tests with the marker ``gate``."""

    def __init__(self, request: pytest.FixtureRequest, judged: list[dict[str, Any]]) -> None:
        self._request = request
        self._judged = judged

    def __call__(
        self, name: str, measure: Callable[[], Measured], limit: float, *, at_least: bool = False
    ) -> None:
        def good(found: Measured) -> bool:
            return found.value >= limit if at_least else found.value <= limit

        best = measure()
        for _ in range(TRIES - 1):
            if good(best):
                break
            best = (max if at_least else min)(best, measure(), key=lambda found: found.value)
        if best.times:
            record(self._request.getfixturevalue("benchmark"), best.times, best.floor, best.what)
        node = self._request.node
        self._judged.append(
            {
                "test": node.nodeid,
                "name": name,
                "limit": limit,
                "at_least": at_least,
                "quiet": node.get_closest_marker("quiet") is not None,
                "reached": best.value,
                "how": best.how,
                "good": good(best),
            }
        )
        if not good(best):
            sign = "at least" if at_least else "at most"
            found = f"found {best.value:.2f}: {best.how}"
            pytest.fail(f"{name}: expected {sign} {limit}, {found}", pytrace=False)
