# SPDX-License-Identifier: Apache-2.0
"""Real daemons, members and networks that fail, and a check of each answer that clients got."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kit import AMD64, make_kit
from tests.nemesis.run import MUTANTS
from tests.support.etcd import make_etcd

pytestmark = [pytest.mark.etcd, pytest.mark.needs_root, pytest.mark.needs_ptrace]
ROOT = Path(__file__).parents[2]
SECONDS = 45
LONG_RUNS, LONG_SECONDS = 10, 180
NAMESPACES = ("unshare", "--net", "--mount", "--pid", "--fork", "--mount-proc", "--kill-child")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder in memory: the disk that tests share would decide what is slow."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="nemesis-") as name:
        yield Path(name)


def run(folder: Path, seconds: float, seed: int, *mutant: str) -> subprocess.CompletedProcess[str]:
    return isolated("run", str(folder), str(seconds), str(seed), *mutant)


def isolated(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a module of this folder in namespaces of its own."""
    make_etcd()  # there is no network to download it in there
    words = ("-m", f"tests.nemesis.{module}", *arguments)
    environment = {n: v for n, v in os.environ.items() if not n.startswith("COVERAGE")}
    return subprocess.run(
        [*NAMESPACES, sys.executable, *words],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def survive(folder: Path, seconds: float, seed: int) -> None:
    result = run(folder, seconds, seed)
    assert result.returncode == 0, f"seed {seed}: {result.stderr}"
    report = json.loads(result.stdout)
    print(f"seed {seed}: {report}")
    assert all(report["faults"])


@pytest.mark.timeout(600)
def test_no_answer_contradicts_the_history_of_the_store(folder: Path) -> None:
    survive(folder, SECONDS, int(time.time()))


@pytest.mark.long
@pytest.mark.parametrize("round_", range(LONG_RUNS))
def test_no_answer_contradicts_the_history_of_the_store_for_long(folder: Path, round_: int) -> None:
    survive(folder, LONG_SECONDS, int(time.time()) + round_)


@pytest.mark.long
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mutant", MUTANTS)
def test_daemon_that_breaks_a_rule_is_found(mutant: str, folder: Path) -> None:
    for attempt in range(6):
        with tempfile.TemporaryDirectory(dir=folder) as name:
            result = run(Path(name), SECONDS, attempt, mutant)
            if result.returncode:
                assert re.search(f"AssertionError: .*({MUTANTS[mutant][2]})", result.stderr)
                return
    raise AssertionError("the mutant was not found")


@pytest.mark.qemu
@pytest.mark.long
@pytest.mark.timeout(1800)
def test_virtual_machine_is_started_on_another_host_when_its_host_is_lost(folder: Path) -> None:
    """Everything acknowledged is there; the old host, back again, is fenced."""
    make_kit(AMD64)
    result = isolated("host_loss", str(folder))
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "survived"
