# SPDX-License-Identifier: Apache-2.0
"""Daemons that are started and not waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Launch, Process


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start daemons on one image, with the reference engine unless told otherwise."""
    started: list[Process] = []

    def launch(*arguments: str, engine: str = "pure", pass_fds: tuple[int, ...] = ()) -> Process:
        started.append(Process(tmp_path, *arguments, engine=engine, pass_fds=pass_fds))
        return started[-1]

    yield launch
    for process in started:
        process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"
