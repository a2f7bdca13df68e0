# SPDX-License-Identifier: Apache-2.0
"""Guest memory and a ring of the driver, without a back-end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.driver import open_fds
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.driver.ring import Ring
from vhost_rpmb.driver.rpmb import FEATURES


@pytest.fixture
def no_leaks() -> Iterator[None]:
    before = open_fds()
    yield
    assert open_fds() == before


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    with GuestMemory() as memory:
        yield memory


@pytest.fixture
def ring(memory: GuestMemory) -> Iterator[Ring]:
    with Ring(memory, 8, features=FEATURES) as ring:
        yield ring
