# SPDX-License-Identifier: Apache-2.0
"""The operators' guide to a shared store: each command runs as it is printed."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.nemesis.test_nemesis import NAMESPACES
from tests.support.documents import ROOT
from tests.support.etcd import make_etcd, make_etcdctl


@pytest.mark.etcd
@pytest.mark.needs_root
@pytest.mark.needs_sandbox
def test_operators_guide() -> None:
    make_etcd()  # there is no network to download it in there
    make_etcdctl()
    environment = {n: v for n, v in os.environ.items() if not n.startswith("COVERAGE")}
    result = subprocess.run(
        [*NAMESPACES, sys.executable, "-m", "tests.e2e.fleet_guide"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (result.returncode, result.stdout) == (0, "told\n"), result.stderr
