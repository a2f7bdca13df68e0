# SPDX-License-Identifier: Apache-2.0
"""Storage that fails: each call in turn, a full file system, a read-only one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.needs_host
CASES = int(os.environ.get("VHOST_RPMB_FAULT_CASES", "150"))  # 0: every call with every fault


@pytest.mark.timeout(CASES + 120 if CASES else 0)
def test_failing_call_loses_nothing() -> None:
    command = ["fiu-run", "-x", sys.executable, "-m", "tests.crash.faults", str(CASES), "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 went wrong" in done.stdout


def test_full_and_read_only_file_system(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "tests.crash.volume", str(tmp_path)]
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", *program],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    assert "is full" in said["a new device"]
    assert "is full" in said["a killed device"]
    assert "Read-only file system" in said["read-only"]
