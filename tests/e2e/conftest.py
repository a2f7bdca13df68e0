# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the tests that boot a guest."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.cache import Say, say_it
from tests.e2e.kit import AMD64, ARM64, Kit, make_kit
from tests.e2e.optee import make_routing_kit
from tests.support.daemon import Daemon, installed_daemon


@pytest.fixture(scope="session")
def say(pytestconfig: pytest.Config) -> Say:
    """Say what takes long; one of several workers has no terminal, its output is captured."""
    reporter = pytestconfig.pluginmanager.getplugin("terminalreporter")
    return say_it if reporter is None else reporter.write_line


@pytest.fixture(scope="session", params=[AMD64, ARM64], ids=lambda found: found.name)
def kit(request: pytest.FixtureRequest, say: Say) -> Kit:
    """The guest kit of each architecture; where it cannot be made, tests fail with the reason."""
    return make_kit(request.param, say)


@pytest.fixture(scope="session")
def routing_kit(kit: Kit, say: Say) -> Kit:
    """The kit with a kernel that has the RPMB subsystem."""
    return make_routing_kit(kit, say)


@pytest.fixture(params=["fast", "pure"])
def daemon(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A daemon, not yet started, on a new image; on either engine."""
    process = installed_daemon(tmp_path, request.param)
    yield process
    process.kill()
