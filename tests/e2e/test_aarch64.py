# SPDX-License-Identifier: Apache-2.0
"""What `make test-aarch64` says where it cannot work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_kernel_that_is_too_old(tmp_path: Path) -> None:
    done = subprocess.run(
        ["setarch", "--uname-2.6", sys.executable, "-m", "tests.e2e.aarch64", tmp_path],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("aarch64.py: programs for aarch64 need Linux 6.7 or later")
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
