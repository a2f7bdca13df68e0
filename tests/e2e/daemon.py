# SPDX-License-Identifier: Apache-2.0
"""The real daemon as a process of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

START_TIMEOUT = 30.0  # seconds
STOP_TIMEOUT = 30.0  # seconds
BLOCK_SIZE = 256
CAPACITY = 128 * 1024  # bytes, the smallest there is


def installed_program(name: str, module: str) -> list[str]:
    """How one of our console scripts is started: itself, or by its module if not installed."""
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.exists() else [sys.executable, "-m", module]


class DaemonProcess:
    """A daemon on a device whose files are in `folder`; `start` and `stop` as often as wanted."""

    def __init__(self, folder: Path, engine: str | None = None) -> None:
        """Make the image unless it is there; `engine` is "fast", "pure" or the default."""
        self.socket_path = folder / "rpmb.sock"
        self.flash_path = folder / "flash.img"
        if not self.flash_path.exists():
            self.flash_path.write_bytes(bytes(CAPACITY))
        self.command_line = [
            *installed_program("vhost-user-rpmb", "vhost_rpmb"),
            f"--socket-path={self.socket_path}",
            f"--flash-path={self.flash_path}",
            f"--key-path={folder / 'flash.key'}",
        ]
        self._log = folder / "daemon.log"
        self._environment = dict(os.environ)
        if engine is not None:
            self._environment["VHOST_RPMB_ENGINE"] = engine
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def log(self) -> str:
        """What the daemon has logged so far, in all its starts."""
        return self._log.read_text(errors="replace")

    def start(self) -> None:
        """Start it and wait until it accepts connections; RuntimeError when it does not."""
        assert self._process is None
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [*self.command_line, "--verbose"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                start_new_session=True,  # Ctrl-C is for us, not for the daemon
            )
        deadline = time.monotonic() + START_TIMEOUT
        while not self._accepts():
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.kill()
                raise RuntimeError(f"the daemon does not serve; its log:\n{self.log}")
            time.sleep(0.02)

    def stop(self) -> None:
        """End it with SIGTERM; RuntimeError unless it ends well."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            status = self._process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            status = None
        self.kill()
        if status != 0:
            raise RuntimeError(f"the daemon ended with status {status}; its log:\n{self.log}")

    def kill(self) -> None:
        """End it with SIGKILL, if it runs."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def signal(self, number: signal.Signals) -> None:
        """Send the running daemon a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    def _accepts(self) -> bool:
        # A socket file is not enough: one that a killed daemon left refuses.
        with socket.socket(socket.AF_UNIX) as probe:
            try:
                probe.connect(os.fspath(self.socket_path))
            except OSError:
                return False
            return True
