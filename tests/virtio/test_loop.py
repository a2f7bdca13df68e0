# SPDX-License-Identifier: Apache-2.0
"""Serving a queue: kicks, calls, watching the ring, and giving way to everything else."""

from __future__ import annotations

import functools
import itertools
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tests.support.daemon import PATIENCE, until
from tests.support.oracle import read_counter
from tests.support.rig import ALL_FEATURES, Rig, RigFactory
from vhost_rpmb.driver.ring import Used
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio import spec as virtio
from vhost_rpmb.virtio.flags import BROKEN, FAULTS, IDLE, UNSIGNALLED

EVENT_INDEX = 1 << virtio.VIRTIO_F_EVENT_IDX


class Server:
    """A loop that serves a rig's queue in a thread until it is told to come back."""

    def __init__(self, engine: Engine, rig: Rig, poll_us: int) -> None:
        self.rig = rig
        self.epoll = select.epoll()
        self.other = os.eventfd(0)
        self.epoll.register(self.other, select.EPOLLIN)
        self.epoll.register(rig.ring.kick_fd, select.EPOLLIN | select.EPOLLET)
        self.idle = IDLE
        self.loop = engine.Loop(rig.device, self.epoll, poll_us)
        self.flags = -1
        self.thread = threading.Thread(target=self._serve)

    def _serve(self) -> None:
        self.flags = 0
        while not self.flags and not select.select([self.other], [], [], 0)[0]:
            flags = self.loop.serve(self.rig.queue, self.rig.ring.kick_fd, self.rig.ring.call_fd)
            self.flags = flags & ~self.idle  # a second without requests: the test was held up

    def stop(self) -> float:
        """Make the other descriptor ready; return the seconds until the loop gave way."""
        start = time.monotonic()
        os.eventfd_write(self.other, 1)
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()
        return time.monotonic() - start

    def close(self) -> None:
        if self.thread.is_alive():
            self.stop()
        self.epoll.close()
        os.close(self.other)


StartServer = Callable[..., Server]


@pytest.fixture
def start(engine: Engine) -> Iterator[StartServer]:
    servers = []

    def start(rig: Rig, poll_us: int) -> Server:
        servers.append(Server(engine, rig, poll_us))
        servers[-1].thread.start()
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def exchange(rig: Rig, look: bool = False) -> list[Used]:
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.flush()
    return look_for_answer(rig) if look else rig.ring.wait(PATIENCE)


def look_for_answer(rig: Rig) -> list[Used]:
    """Wait without a call. Sleeps between looks: the loop's thread needs the interpreter too."""
    rig.ring.suppress_calls()
    ends = time.monotonic() + PATIENCE
    while not (used := rig.ring.collect()):
        assert time.monotonic() < ends
        time.sleep(0.00005)
    return used


@pytest.mark.parametrize("poll_us", [0, 64, 5000])
@pytest.mark.parametrize("features", [0, ALL_FEATURES])
def test_requests_are_answered_and_called(
    make_rig: RigFactory, start: StartServer, poll_us: int, features: int
) -> None:
    """Asleep or watching, no kick and no call is ever lost."""
    rig = make_rig(features=features)
    server = start(rig, poll_us)
    for number in range(300):
        assert exchange(rig, look=bool(number % 2))[0].length == 512
    server.stop()
    assert server.flags == 0


def shortest(stops: Iterator[float]) -> float:
    """The shortest of some times: other processes may hold up one of them, but hardly all."""
    return min(itertools.islice(stops, 10))


@pytest.mark.parametrize("poll_us", [0, 5000])
def test_serve_returns_at_once_at_an_event(
    make_rig: RigFactory, start: StartServer, poll_us: int
) -> None:
    """Not only when a second without requests is over."""
    rig = make_rig()

    def stops() -> Iterator[float]:
        while True:
            server = start(rig, poll_us)
            time.sleep(0.05)
            yield server.stop()

    assert shortest(stops()) < 0.5


def test_serve_returns_under_load_at_an_event(make_rig: RigFactory, start: StartServer) -> None:
    rig = make_rig()

    def stops() -> Iterator[float]:
        while True:
            server = start(rig, 5000)
            for _ in range(50):
                exchange(rig, look=True)
            yield server.stop()

    assert shortest(stops()) < 0.5


@pytest.mark.parametrize("poll_us", [0, 5000])
def test_serve_returns_after_an_idle_second(
    make_rig: RigFactory, engine: Engine, poll_us: int
) -> None:
    rig = make_rig()
    server = Server(engine, rig, poll_us)
    start = time.monotonic()
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, -1) == IDLE
    assert time.monotonic() - start > 0.9
    assert server.loop.take_events() == []
    server.close()


def test_signals_do_not_shorten_the_second(make_rig: RigFactory, engine: Engine) -> None:
    """A handler runs at once, and the rest of the second passes as if there had been none."""
    rig = make_rig()
    server = Server(engine, rig, 0)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda number, _frame: seen.append(number))
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    try:
        start = time.monotonic()
        assert server.loop.serve(rig.queue, rig.ring.kick_fd, -1) == IDLE
        assert time.monotonic() - start > 0.9
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert seen
    server.close()


def test_edge_of_another_descriptor_is_handed_over(make_rig: RigFactory, engine: Engine) -> None:
    """Epoll reports it once, and the sleeping loop is told instead of its caller."""
    rig = make_rig()
    server = Server(engine, rig, 0)
    edges = [os.eventfd(0) for _ in range(2)]
    for fd in edges:
        server.epoll.register(fd, select.EPOLLIN | select.EPOLLET)

    def kick() -> None:
        for fd in edges:
            os.eventfd_write(fd, 1)

    kicks = threading.Timer(0.1, kick)
    kicks.start()
    taken: list[int] = []
    while len(taken) < 2:
        assert server.loop.serve(rig.queue, rig.ring.kick_fd, -1) in (0, IDLE)
        taken += server.loop.take_events()
    assert sorted(taken) == edges
    assert server.loop.take_events() == []
    assert server.epoll.poll(0) == []
    kicks.join()
    server.close()
    for fd in edges:
        os.close(fd)


def test_single_batch_on_request(make_rig: RigFactory, engine: Engine) -> None:
    """It neither sleeps nor goes on: another queue waits."""
    rig = make_rig()
    server = Server(engine, rig, 5000)
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, -1, once=True) == 0
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.publish()
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, -1, once=True) == 0
    assert rig.ring.collect()[0].length == 512
    server.close()


def test_idle_queue_costs_no_processor_time(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig()
    server = Server(engine, rig, 5000)
    start = time.thread_time()
    server.loop.serve(rig.queue, rig.ring.kick_fd, -1)
    assert time.thread_time() - start < 0.1
    server.close()


@pytest.mark.timing
@pytest.mark.parametrize("engine", ["fast"], indirect=True)  # the reference does not poll
@pytest.mark.parametrize("features", [0, EVENT_INDEX])
def test_no_kicks_are_asked_for_while_the_ring_is_watched(
    make_rig: RigFactory, start: StartServer, features: int
) -> None:
    rig = make_rig(features=features)
    # Longer than any pause between two requests here, the scheduler's and the interpreter's lock's
    # included: then every sleep lengthens the next watch.
    server = start(rig, 1_000_000)
    kicks = 0
    for _ in range(200):
        rig.ring.add(rig.put(read_counter()), rig.room(512))
        if rig.ring.publish():
            kicks += 1
            rig.ring.kick()
        look_for_answer(rig)
    assert kicks < 100
    server.stop()
    # Nobody looks at the ring any more: the next request is kicked for.
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    assert rig.ring.publish()


def asks_for_kick(rig: Rig, index: int) -> bool:
    return rig.ring.available_event == index


def test_without_watching_every_request_is_kicked_for(
    make_rig: RigFactory, start: StartServer
) -> None:
    rig = make_rig(features=EVENT_INDEX)
    start(rig, 0)
    exchange(rig)
    for number in range(1, 51):
        until(functools.partial(asks_for_kick, rig, number))  # it is about to sleep
        rig.ring.add(rig.put(read_counter()), rig.room(512))
        assert rig.ring.publish()
        rig.ring.kick()
        rig.ring.wait(PATIENCE)


def test_serve_returns_at_a_broken_ring(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig()
    rig.ring.offer(1000)
    rig.ring.publish()
    server = Server(engine, rig, 64)
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, -1) == BROKEN
    server.close()


def test_broken_chain_is_reported(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig()
    rig.ring.offer(0)  # a descriptor of length 0
    rig.ring.publish()
    server = Server(engine, rig, 64)
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, rig.ring.call_fd) == FAULTS
    server.close()


def test_call_descriptor_that_cannot_be_signalled_is_reported(
    make_rig: RigFactory, engine: Engine
) -> None:
    rig = make_rig(features=0)
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.publish()
    reading, writing = os.pipe()
    os.close(reading)
    server = Server(engine, rig, 0)
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, writing) == UNSIGNALLED
    os.close(writing)
    server.close()


def test_full_call_descriptor_counts_as_signalled(make_rig: RigFactory, engine: Engine) -> None:
    rig = make_rig(features=0)
    os.eventfd_write(rig.ring.call_fd, 2**64 - 2)
    rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.publish()
    server = Server(engine, rig, 0)
    os.eventfd_write(server.other, 1)
    assert server.loop.serve(rig.queue, rig.ring.kick_fd, rig.ring.call_fd) == 0
    assert len(rig.ring.collect()) == 1
    server.close()
