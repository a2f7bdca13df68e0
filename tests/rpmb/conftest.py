# SPDX-License-Identifier: Apache-2.0
"""Devices in files and in a shared store, and drivers whose device lives several lives."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.homes import Home, Memory
from tests.support.lives import Guest, GuestFactory, Life, LifeFactory, keyed
from tests.support.rig import Rig, RigFactory
from vhost_rpmb.engine import Engine


@pytest.fixture(params=["files", "shared"])
def rig_home(request: pytest.FixtureRequest) -> str:
    """Where the devices of rigs are."""
    assert isinstance(request.param, str)
    return request.param


@pytest.fixture
def make_rig(engine: Engine, flash: Path, tmp_path: Path, rig_home: str) -> Iterator[RigFactory]:
    """Make rigs as the fixture of this name elsewhere does, on each store."""
    shared = Memory(tmp_path)
    rigs: list[Rig] = []

    def make(path: Path = flash, **options: object) -> Rig:
        if rig_home == "shared":
            options["opened"] = shared.open
        rigs.append(Rig(engine, path, **options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        if rig.guest.regions:
            rig.close()


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
