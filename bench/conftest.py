# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.measure import Bench
from bench.peer import Peer
from bench.recording import Goal
from tests.support.documents import ROOT
from vhost_rpmb.errors import ClientError

JUDGED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stable", action="store_true", help="leave out the goals that need a quiet machine"
    )
    parser.addoption("--peer", metavar="SOCKET", type=Path, help="measure another daemon too")
    parser.addoption("--peer-key", metavar="FILE", type=Path, help="the key of its device")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[JUDGED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("stable"):
        quiet = [item for item in items if item.get_closest_marker("quiet")]
        items[:] = [item for item in items if item not in quiet]
        config.hook.pytest_deselected(items=quiet)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["goals"] = config.stash[JUDGED]
    output_json["load_average"] = os.getloadavg()[1]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if not config.stash[JUDGED]:
        return
    terminalreporter.section("goals")
    for goal in config.stash[JUDGED]:
        mark = "  " if goal["good"] else "! "
        limit = f"{'≥' if goal['at_least'] else '≤'} {goal['limit']:g}"
        terminalreporter.write_line(
            f"{mark}{goal['reached']:>8.2f} {limit:<7} {goal['name']}: {goal['how']}"
        )


@pytest.fixture(scope="session")
def bench() -> Iterator[Bench]:
    """The compiled tools, and a folder on a disk."""
    (ROOT / "build").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=ROOT / "build") as name:
        yield Bench(Path(name))


@pytest.fixture(scope="session")
def peer(pytestconfig: pytest.Config) -> Peer:
    try:
        return Peer.find(pytestconfig.getoption("peer"), pytestconfig.getoption("peer_key"))
    except (ClientError, OSError, ValueError) as error:
        pytest.exit(str(error), pytest.ExitCode.USAGE_ERROR)


@pytest.fixture
def goal(request: pytest.FixtureRequest) -> Goal:
    return Goal(request, request.config.stash[JUDGED])
