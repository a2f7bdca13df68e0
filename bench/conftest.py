# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.measure import Bench
from bench.recording import Goal
from tests.support.documents import ROOT

JUDGED = pytest.StashKey[list[dict[str, Any]]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stable", action="store_true", help="leave out the goals that need a quiet machine"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[JUDGED] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("stable"):
        quiet = [item for item in items if item.get_closest_marker("quiet")]
        items[:] = [item for item in items if item not in quiet]
        config.hook.pytest_deselected(items=quiet)


def pytest_benchmark_update_json(config: pytest.Config, output_json: dict[str, Any]) -> None:
    output_json["goals"] = config.stash[JUDGED]


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


@pytest.fixture
def goal(request: pytest.FixtureRequest) -> Goal:
    return Goal(request, request.config.stash[JUDGED])
