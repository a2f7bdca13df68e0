# SPDX-License-Identifier: Apache-2.0
"""The cost of the dirty log, while a virtual machine is migrated; without one there is none."""

from __future__ import annotations

import pytest

from bench.measure import Bench
from bench.recording import CLOCK, Goal, Measured

pytestmark = [pytest.mark.benchmark(timer=CLOCK, group="dirty log"), pytest.mark.gate]


def test_instructions(bench: Bench, goal: Goal) -> None:
    """A read whose answer and used element are marked, and one without a log."""

    def measure() -> Measured:
        plain = bench.read_instructions
        logged = bench.counted_read("callgrind", mode=["logged"])
        return Measured(logged / plain, f"{logged:.0f} instructions / {plain:.0f}")

    goal("reads at 64 in flight: instructions with a dirty log / without", measure, 1.03)
