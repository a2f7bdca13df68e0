# SPDX-License-Identifier: Apache-2.0
"""Daemons whose device has each home in turn."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX, Daemon, DaemonFactory
from tests.support.homes import Home
from vhost_rpmb.engine import Engine


@pytest.fixture
def daemon(engine: Engine, tmp_path: Path, home: Home) -> Iterator[DaemonFactory]:
    """Start real daemons on one engine and one device, one at a time; killed at the end."""
    made: list[Daemon] = []

    def start(*options: str) -> Daemon:
        each = Daemon(tmp_path, *options, engine=engine.name, sandbox=SANDBOX, home=home.options)
        made.append(each)
        each.start()
        return each

    yield start
    for each in made:
        each.kill()
