# SPDX-License-Identifier: Apache-2.0
"""RunningDevice where the guide to it (tests/package/test_docs.py) does not go."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX
from vhost_rpmb.driver.errors import BackendError
from vhost_rpmb.testing import RunningDevice


def test_capacity_and_options(tmp_path: Path) -> None:
    device = RunningDevice(tmp_path, "-v", "--max-read-blocks=9", *SANDBOX, capacity=256 * 1024)
    assert device.log == ""
    with device, device.client() as client:
        assert client.config == (2, 32, 9)
    assert "front-end connected" in device.log
    device.stop()  # it is stopped already


def test_device_runs_once(tmp_path: Path) -> None:
    with RunningDevice(tmp_path, *SANDBOX) as device:
        with pytest.raises(RuntimeError, match="running already"):
            device.start()
        os.kill(device.pid, 0)
        with device.client() as client:
            assert client.config.capacity == 1
    with pytest.raises(RuntimeError, match="not running"):
        os.kill(device.pid, 0)


def test_stop_of_a_daemon_that_was_killed_fails(tmp_path: Path) -> None:
    device = RunningDevice(tmp_path, *SANDBOX)
    device.start()
    os.kill(device.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with status -9"):
        device.stop()
    with device:  # it can be started again
        pass


@pytest.mark.parametrize("name", ["vhost_rpmb/__init__.py", "logging.py", "ctypes.py"])
def test_nothing_is_imported_from_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module = tmp_path / "here" / name
    module.parent.mkdir(parents=True)
    module.write_text("raise SystemExit('imported from the current folder')")
    monkeypatch.chdir(tmp_path / "here")
    with RunningDevice(tmp_path, *SANDBOX) as device, device.client() as client:
        assert client.config.capacity == 1


def test_device_that_does_not_start(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="expected a number 1 to 255, found '0'"):
        RunningDevice(tmp_path, "--max-write-blocks=0").start()


def test_device_that_ended_by_itself(tmp_path: Path) -> None:
    device = RunningDevice(tmp_path, "--once", *SANDBOX)
    device.start()
    with device.client() as client:
        client.program_key(bytes(32))
    device.stop()  # it ended well
    device.flash_path.unlink()
    with pytest.raises(RuntimeError, match="does not exist"):
        device.start()


def test_failure_within_the_test_leaves_no_process(tmp_path: Path) -> None:
    device = RunningDevice(tmp_path, *SANDBOX)
    with pytest.raises(ZeroDivisionError), device:
        1 / 0  # noqa: B018
    device.start()
    device.kill()
    with pytest.raises(BackendError, match="refused"):
        device.client()
