# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import _thread
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX, Daemon, DaemonFactory
from tests.support.etcd import EtcdCluster
from tests.support.history import has_commit
from tests.support.homes import Etcd, Files, Home
from tests.support.rig import Rig, RigFactory, make_image
from vhost_rpmb import engine as engines


def pytest_configure() -> None:
    # What a script starts with & ignores SIGINT, and so would everything that the tests start.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if "libasan" in os.environ.get("LD_PRELOAD", ""):
        os.register_at_fork(before=_wait_for_threads)


def _wait_for_threads() -> None:
    """Wait until no thread begins or ends, outside Python: the process forks.

    The sanitizers' allocator is locked then, now and then. It stays locked in the child.
    """
    while len(os.listdir("/proc/self/task")) > 1 + _thread._count():
        time.sleep(0.0001)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what this user or these sources cannot run: the summary counts it."""
    left_out = [item for item in items if not _can_run(item)]
    if left_out:
        items[:] = [item for item in items if item not in left_out]
        config.hook.pytest_deselected(items=left_out)


def _can_run(item: pytest.Item) -> bool:
    if item.get_closest_marker("needs_root") and os.geteuid() != 0:
        return False
    history = item.get_closest_marker("needs_history")
    return history is None or has_commit(history.args[0])


@pytest.fixture
def untraced() -> Iterator[None]:
    """Do without coverage, which multiplies the time of what repeats the same lines."""
    tracer = sys.gettrace()
    sys.settrace(None)
    yield
    sys.settrace(tracer)


@pytest.fixture(params=engines.ENGINES)
def engine(request: pytest.FixtureRequest) -> engines.Engine:
    """Each engine in turn: a behaviour test runs on both."""
    return engines.load(request.param)


@pytest.fixture
def flash(tmp_path: Path) -> Path:
    """A fresh image of 128 KiB."""
    return make_image(tmp_path / "flash.img")


@pytest.fixture(scope="session")
def members() -> Iterator[EtcdCluster]:
    """Three members of a real etcd that the tests of a worker share; each has its own prefix."""
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture(params=["files", pytest.param("shared", marks=pytest.mark.etcd)])
def home(request: pytest.FixtureRequest, flash: Path, tmp_path: Path) -> Home:
    """Each home of a device's state in turn: a crash test runs on both."""
    if request.param == "files":
        return Files(flash)
    return Etcd(tmp_path, request.getfixturevalue("members"))


@pytest.fixture
def rig_options() -> dict[str, object]:
    """More options of all rigs."""
    return {}


@pytest.fixture
def make_rig(
    engine: engines.Engine, flash: Path, rig_options: dict[str, object]
) -> Iterator[RigFactory]:
    """Make rigs on one engine and, unless told otherwise, one image; closed at the end."""
    rigs: list[Rig] = []

    def make(path: Path = flash, **options: object) -> Rig:
        rigs.append(Rig(engine, path, **rig_options, **options))  # type: ignore[arg-type]
        return rigs[-1]

    yield make
    for rig in rigs:
        if rig.guest.regions:
            rig.close()


@pytest.fixture
def rig(make_rig: RigFactory) -> Rig:
    """A device on a fresh image, without a key."""
    return make_rig()


@pytest.fixture
def keyed(rig: Rig) -> Rig:
    """A device whose key is programmed."""
    rig.program()
    return rig


@pytest.fixture
def daemon_home() -> list[str]:
    """The options that name the home of a daemon's device; none: an image in its folder."""
    return []


@pytest.fixture
def daemon(
    engine: engines.Engine, tmp_path: Path, daemon_home: list[str]
) -> Iterator[DaemonFactory]:
    """Start real daemons on one engine and one device, one at a time; killed at the end."""
    made: list[Daemon] = []

    def start(*options: str) -> Daemon:
        made.append(
            Daemon(tmp_path, *options, engine=engine.name, sandbox=SANDBOX, home=daemon_home)
        )
        made[-1].start()
        return made[-1]

    yield start
    for each in made:
        each.kill()
