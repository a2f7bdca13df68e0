# SPDX-License-Identifier: Apache-2.0
"""The modules that a daemon holds in memory, times the number of virtual machines of a host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import vhost_rpmb
from tests.support.daemon import SANDBOX
from vhost_rpmb.testing import RunningDevice

PARENT = str(Path(vhost_rpmb.__file__).parents[1])
# The environment of the tests imports some of these by itself: -S -I.
PROGRAM = f"""
import sys
sys.path.insert(0, {PARENT!r})
from vhost_rpmb.cli import main
status = main()
print("modules:", *sys.modules)
sys.exit(status)
"""
PROGRAMS = {"by hand": PROGRAM, "in pip's wrapper": f"import re\n{PROGRAM}"}
# Each with those that it brings; with their sizes in private memory.
AVOIDED = {
    "argparse",  # 0.3 MiB
    "cryptography",  # 7 MiB
    "array",
    "ctypes",  # 0.2 MiB
    "dataclasses",  # 1 MiB
    "enum",  # 0.2 MiB
    "hashlib",  # 0.1 MiB, with hmac
    "hmac",
    "importlib",  # 0.1 MiB
    "json",
    "logging",  # 0.5 MiB
    "pathlib",
    "random",
    "re",  # 0.3 MiB
    "selectors",
    "signal",
    "socket",  # with the three above 0.6 MiB
    "subprocess",
    "tempfile",
    "threading",  # 0.1 MiB
    "tomllib",
    "typing",  # 0.5 MiB
    "urllib",
    "vhost_rpmb.storage.local.snapshot",  # for a start after a crash, and for checks
    "vhost_rpmb.storage.local.verification",
    "vhost_rpmb.storage.local.wal",
    "vhost_rpmb.daemon.handover",  # with zlib 0.1 MiB: for what has a descriptor store
    "vhost_rpmb.vhost_user.interfaces",  # 0.1 MiB: for type checkers
    "zlib",
}


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_daemon_does_without_large_modules(tmp_path: Path, program: str) -> None:
    device = RunningDevice(tmp_path, *SANDBOX)
    device.command_line[: device.command_line.index("vhost_rpmb") + 1] = [
        *(sys.executable, "-S", "-I", "-c", program)
    ]
    with device, device.client() as client:
        client.program_key(os.urandom(32))
    _, found, modules = device.log.rpartition("modules: ")
    assert found, device.log
    assert "vhost_rpmb.vhost_user.session" in modules.split()
    assert AVOIDED.isdisjoint(modules.split())


def test_files_that_are_opened_in_the_sandbox_need_no_import() -> None:
    """Shared files may come with the log of a host that died."""
    script = "import sys; import vhost_rpmb.storage.local.shared; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    assert "vhost_rpmb.storage.local.snapshot" in done.stdout.split()
