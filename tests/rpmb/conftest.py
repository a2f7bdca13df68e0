# SPDX-License-Identifier: Apache-2.0
"""Devices in files and in a shared store, and drivers whose device lives several lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import Home, Memory
from tests.support.lives import Guest, GuestFactory, Life, LifeFactory, keyed
from vhost_rpmb.engine import Engine


@pytest.fixture(params=["files", "shared"])
def rig_home(request: pytest.FixtureRequest) -> str:
    """Where the devices of rigs are."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def rig_options(tmp_path: Path, rig_home: str) -> dict[str, object]:
    """Rigs whose device is on each store."""
    return {"opened": Memory(tmp_path).open} if rig_home == "shared" else {}


@pytest.fixture
def make_guest(engine: Engine, home: Home) -> Iterator[GuestFactory]:
    guests = []

    def make(**options: object) -> Guest:
        guests.append(Guest(engine, home, **options))  # type: ignore[arg-type]
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()


@pytest.fixture
def blank(make_guest: GuestFactory) -> Guest:
    """A device without a key."""
    return make_guest()


@pytest.fixture
def guest(blank: Guest) -> Guest:
    """A device with a key, stopped cleanly."""
    return keyed(blank)


@pytest.fixture
def alive() -> Iterator[LifeFactory]:
    """Serve in the process of the test."""
    lives = []

    def begin(guest: Guest) -> Life:
        lives.append(Life(guest))
        return lives[-1]

    yield begin
    for life in lives:
        life.stop()
