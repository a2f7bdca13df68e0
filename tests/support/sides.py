# SPDX-License-Identifier: Apache-2.0
"""Hosts between which a device moves, whose daemons a service manager restarts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.support.daemon import PATIENCE, SANDBOX
from tests.support.faulty import Faults
from tests.support.hosts import SETUP, PatientFrontend
from tests.support.supervised import Supervised
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine


class Side(Supervised):
    """A host in a new folder, with points at which its daemon dies."""

    def __init__(self, folder: Path, engine: Engine, *options: str) -> None:
        """``options`` name the home of the device's state as well."""
        folder.mkdir()
        self.faults = Faults(folder)
        command = self.faults.command("--fd=3", "-v", *SANDBOX, *options)
        super().__init__(folder, engine=engine.name, command=command)

    def machine(
        self,
        key: bytes | None = None,
        blob: bytes | None = None,
        arming: Callable[[], None] = lambda: None,
    ) -> RpmbClient:
        """A virtual machine; ``arming`` is called before the first transfer."""
        frontend = PatientFrontend.connect(self.path, timeout=PATIENCE)
        frontend.blob, frontend.beginning = blob, arming
        return RpmbClient(frontend, key, timeout=PATIENCE, setup=SETUP)
