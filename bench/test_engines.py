# SPDX-License-Identifier: Apache-2.0
"""The engines side by side, guest and device in one process (pytest-benchmark).

One round is a batch of 64 reads. To compare with an earlier tree: --benchmark-autosave there, then
--benchmark-compare here.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.work import Work
from vhost_rpmb.engine import ENGINES


@pytest.mark.parametrize("blocks", [1, 32])
@pytest.mark.parametrize("engine", ENGINES)
def test_64_reads(benchmark: BenchmarkFixture, tmp_path: Path, engine: str, blocks: int) -> None:
    benchmark.group = f"64 reads of {blocks} blocks"
    work = Work(engine, tmp_path, blocks)
    benchmark(work.batch)
    work.close()
