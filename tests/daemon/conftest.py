# SPDX-License-Identifier: Apache-2.0
"""Daemons that are started and not waited for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import Launch, Process
from tests.support.supervised import Supervised
from vhost_rpmb.engine import Engine


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


@pytest.fixture
def supervised(tmp_path: Path, engine: Engine) -> Iterator[Supervised]:
    """A daemon on each engine under a service manager that keeps descriptors."""
    with Supervised(tmp_path, engine=engine.name) as supervised:
        yield supervised
