# SPDX-License-Identifier: Apache-2.0
"""Daemons whose device has each home in turn."""

from __future__ import annotations

import pytest

from tests.support.homes import Home


@pytest.fixture
def daemon_home(home: Home) -> list[str]:
    """The home of a daemon's device: each in turn."""
    return home.options
