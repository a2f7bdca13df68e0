# SPDX-License-Identifier: Apache-2.0
"""The event loop."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from vhost_rpmb.daemon.eventloop import EventLoop
from vhost_rpmb.vhost_user import wire


@pytest.fixture
def loop() -> Iterator[EventLoop]:
    loop = EventLoop()
    yield loop
    loop.close()


@pytest.fixture
def eventfds() -> Iterator[list[int]]:
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
    yield fds
    wire.close_fds(fds)


def test_wait_times_out(loop: EventLoop) -> None:
    started = time.monotonic()
    assert not loop.wait(0.05)
    assert time.monotonic() - started >= 0.04


def test_handler_is_called_as_long_as_its_file_is_readable(
    loop: EventLoop, eventfds: list[int]
) -> None:
    calls = []
    loop.add(eventfds[0], lambda: calls.append(1))
    os.eventfd_write(eventfds[0], 1)
    assert loop.wait(None)
    assert loop.wait(0)
    assert calls == [1, 1]


def test_edge_triggered_handler_is_called_once_for_each_event(
    loop: EventLoop, eventfds: list[int]
) -> None:
    calls = []
    loop.add(eventfds[0], lambda: calls.append(1), edge=True)
    for count in range(1, 5):
        os.eventfd_write(eventfds[0], 1)
        assert loop.wait(0)
        assert not loop.wait(0)
        assert len(calls) == count


def test_removed_handler_is_not_called(loop: EventLoop, eventfds: list[int]) -> None:
    calls = []

    def remove(mine: int, other: int) -> None:
        calls.append(mine)
        loop.remove(other)

    first, second = eventfds
    loop.add(first, lambda: remove(first, second))
    loop.add(second, lambda: remove(second, first))
    for fd in eventfds:
        os.eventfd_write(fd, 1)
    assert loop.wait(0)
    assert len(calls) == 1


def test_regular_file_cannot_be_watched(loop: EventLoop, tmp_path: Path) -> None:
    with (tmp_path / "file").open("w") as file:
        with pytest.raises(PermissionError):
            loop.add(file.fileno(), lambda: None)
        with pytest.raises(KeyError):
            loop._handlers[file.fileno()]
