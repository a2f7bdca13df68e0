# SPDX-License-Identifier: Apache-2.0
"""The loop while a signal arrives: it sleeps in a system call that the signal interrupts."""

from __future__ import annotations

import select
import signal
import time
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from tests.support.daemon import PATIENCE
from tests.support.oracle import read_counter
from tests.support.rig import RigFactory
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio.flags import IDLE

Handle = Callable[[Callable[[], None]], None]


@pytest.fixture
def handle() -> Iterator[Handle]:
    """Have a function called by a signal, a while from now and then again and again."""

    def handle(function: Callable[[], None]) -> None:
        def handler(_number: int, _frame: FrameType | None) -> None:
            function()

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)

    previous = signal.getsignal(signal.SIGALRM)
    yield handle
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def test_handlers_run_while_the_loop_sleeps(
    make_rig: RigFactory, engine: Engine, handle: Handle
) -> None:
    rig = make_rig()
    calls = []
    with select.epoll() as epoll:
        epoll.register(rig.ring.kick_fd, select.EPOLLIN | select.EPOLLET)
        loop = engine.Loop(rig.device, epoll, 0)
        handle(lambda: calls.append(time.monotonic()))
        ends = time.monotonic() + PATIENCE
        while len(calls) < 3:
            assert time.monotonic() < ends
            assert not loop.serve(rig.queue, rig.ring.kick_fd, -1) & ~IDLE
        signal.setitimer(signal.ITIMER_REAL, 0)
        rig.ring.add(rig.put(read_counter()), rig.room(512))
        rig.ring.flush()
        assert not loop.serve(rig.queue, rig.ring.kick_fd, rig.ring.call_fd) & ~IDLE
        assert len(rig.ring.collect()) == 1


def test_exception_of_a_handler_leaves_the_loop(
    make_rig: RigFactory, engine: Engine, handle: Handle
) -> None:
    class Interruption(Exception):
        pass

    def interrupt() -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        raise Interruption

    rig = make_rig()
    with select.epoll() as epoll:
        epoll.register(rig.ring.kick_fd, select.EPOLLIN | select.EPOLLET)
        loop = engine.Loop(rig.device, epoll, 0)

        def serve() -> None:
            ends = time.monotonic() + PATIENCE
            while time.monotonic() < ends:
                loop.serve(rig.queue, rig.ring.kick_fd, -1)

        handle(interrupt)
        with pytest.raises(Interruption):
            serve()
