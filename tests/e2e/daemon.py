# SPDX-License-Identifier: Apache-2.0
"""The real daemon as a process of its own, as an operator would start it."""

from __future__ import annotations

import sys
from pathlib import Path

from vhost_rpmb.testing import RunningDevice

BLOCK_SIZE = 256


def installed_program(name: str, module: str) -> list[str]:
    """How one of our console scripts is started: itself, or by its module if not installed."""
    script = Path(sys.executable).with_name(name)
    return [str(script)] if script.exists() else [sys.executable, "-m", module]


class DaemonProcess(RunningDevice):
    """A daemon that keeps the key in a file, not yet started."""

    def __init__(self, folder: Path, engine: str | None = None) -> None:
        """Make the image unless it is there; `engine` is "fast", "pure" or the default."""
        super().__init__(folder, f"--key-path={folder / 'rpmb.key'}", "--verbose")
        options = self.command_line.index("vhost_rpmb") + 1
        self.command_line[:options] = installed_program("vhost-user-rpmb", "vhost_rpmb")
        if engine is not None:
            self.environment["VHOST_RPMB_ENGINE"] = engine
