# SPDX-License-Identifier: Apache-2.0
"""The story without a guest: it needs no kit, and it can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.story import KEY, ClientStage, StoryError, tell
from tests.support.daemon import Daemon
from vhost_rpmb.driver.rpmb import RpmbClient


def test_story_through_the_client(daemon: Daemon, tmp_path: Path) -> None:
    tell(ClientStage(tmp_path, daemon), print)


def test_story_fails_on_a_device_with_a_key(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    with RpmbClient.connect(str(daemon.socket_path)) as client:
        client.program_key(KEY)
    daemon.stop()
    with pytest.raises(StoryError, match="read-counter: expected a failure"):
        tell(ClientStage(tmp_path, daemon), print)


def test_demo_without_a_kit_uses_the_client(tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("cmp", "cut"):
        path = shutil.which(name)
        assert path is not None
        (programs / name).symlink_to(path)
    environment = dict(os.environ, PATH=str(programs), XDG_CACHE_HOME=str(tmp_path / "cache"))
    result = subprocess.run(
        [sys.executable, "-m", "tests.e2e.demo"],
        cwd=Path(__file__).parents[2],
        env=environment | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    assert "NO GUEST: " in result.stdout
    assert "All steps had their expected results" in result.stdout
    assert "--flash-path=" in result.stdout
