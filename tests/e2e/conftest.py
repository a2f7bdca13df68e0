# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that boot a guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.kit import AMD64, ARM64, Kit, make_kit
from tests.e2e.optee import make_routing_kit
from tests.support.daemon import Daemon, installed_daemon


@pytest.fixture(scope="session", params=[AMD64, ARM64], ids=lambda found: found.name)
def kit(request: pytest.FixtureRequest, pytestconfig: pytest.Config) -> Kit:
    """The guest kit of each architecture; where it cannot be made, tests fail with the reason."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    return make_kit(request.param, reporter.write_line)


@pytest.fixture(scope="session")
def routing_kit(kit: Kit, pytestconfig: pytest.Config) -> Kit:
    """The kit with a kernel that has the RPMB subsystem."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    return make_routing_kit(kit, reporter.write_line)


@pytest.fixture(params=["fast", "pure"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon, not yet started, on a new image; on either engine."""
    process = installed_daemon(tmp_path, request.param)
    yield process
    process.kill()
