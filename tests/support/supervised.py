# SPDX-License-Identifier: Apache-2.0
"""A daemon under a service manager that keeps descriptors, and its front-ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.daemon import PATIENCE, SANDBOX
from tests.support.rig import make_image
from tests.support.supervisor import Supervisor, daemon_command
from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.rpmb import RpmbClient


class Supervised(Closing):
    """A running daemon; ``manager`` restarts it, ``path`` is its socket."""

    def __init__(
        self,
        folder: Path,
        *options: str,
        engine: str = "pure",
        command: Sequence[str] = (),
        home: Sequence[str] = (),
        **manager: Any,
    ) -> None:
        self.path = folder / "socket"
        self.flash = folder / "flash.img"
        if not self.flash.exists():
            make_image(self.flash)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self.manager = Supervisor(
            folder,
            command
            or daemon_command(home or [f"--flash-path={self.flash}"], "-v", *SANDBOX, *options),
            environment=os.environ | {"VHOST_RPMB_ENGINE": engine},
            listener=self._listener,
            **manager,
        )
        self.manager.start()

    def client(self, key: bytes | None = None) -> RpmbClient:
        """Connect as a virtual machine would."""
        return RpmbClient.connect(self.path, key, timeout=PATIENCE)

    def frontend(self) -> Frontend:
        """Connect, without any message."""
        return Frontend.connect(self.path, timeout=PATIENCE)

    def becomes_empty(self) -> None:
        """Wait until the service manager has nothing but the record."""
        self.manager.wait(lambda: self.manager.names == ["rpmb-session"])

    @property
    def warnings(self) -> list[str]:
        """The log without information."""
        return [line for line in self.manager.log.splitlines() if ": info: " not in line]

    def close(self) -> None:
        self.manager.close()
        self._listener.close()
