# SPDX-License-Identifier: Apache-2.0
"""A shared store against etcd's own transaction and against local files.

Three members of etcd, with their data in memory, and all daemons are on this machine.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.daemon import Daemon, chains, counter_of, percentile, run, writes
from bench.measure import Bench
from bench.recording import CLOCK, Goal, Measured, against, record
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host, create_device
from tests.support.rig import make_image
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet.administration import create, describe, list_devices
from vhost_rpmb.storage.fleet.config import load
from vhost_rpmb.storage.fleet.engine import Compare, Put
from vhost_rpmb.storage.fleet.etcd import Etcd
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.requests import Requests

pytestmark = [pytest.mark.benchmark(timer=CLOCK), pytest.mark.etcd]

ROUNDS = 1000
TURN = 50  # writes, then as many transactions
STARTS = 7
DEVICES = 10_000
HEAD, ENTRY = 102, 340  # bytes of the records that a commit of one block puts
STORES = ("shared", "local files")


class Fleet:
    """A cluster, a host with a device, and local files to compare with."""

    def __init__(self, folder: Path, cluster: EtcdCluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.host = Host(folder / "host", cluster, "/bench/")
        create_device(self.host)
        flash = make_image(folder / "flash")
        self._options = {
            "shared": (self.host.store, "--device=vm-1"),
            "local files": (f"--flash-path={flash}",),
        }
        for store in STORES:
            with self.served(store) as running:
                counter_of(running.socket)  # programs the key

    @contextmanager
    def served(self, store: str) -> Iterator[Daemon]:
        with run(self.folder / "socket", *self._options[store]) as running:
            yield running

    def write(self, bench: Bench, store: str, depth: int = 1) -> list[float]:
        """Microseconds of rounds of durable writes."""
        number = ROUNDS * (8 if depth > 1 else 1)
        with self.served(store) as running:
            source = writes(1, counter_of(running.socket))
            with chains(self.folder, source, number) as file:
                options = {"count": number, "frames": 2, "depth": depth}
                return bench.tools.load(running.socket, file, **options).times


@pytest.fixture(scope="module")
def fleet(bench: Bench) -> Iterator[Fleet]:
    folder = bench.folder / "fleet"
    folder.mkdir()
    with EtcdCluster() as cluster:
        yield Fleet(folder, cluster)


def timed(action: Callable[[], object]) -> float:
    """Microseconds."""
    begin = time.perf_counter()
    action()
    return (time.perf_counter() - begin) * 1e6


_numbers = count()


def transactions(engine: Etcd, rounds: int = ROUNDS) -> list[float]:
    """Microseconds of transactions that compare and put as much as a commit of one block does."""
    owner, head, log = b"/plain/o", b"/plain/h", b"/plain/l/%016x"
    engine.txn([], [Put(owner, b"owner"), Put(head, bytes(HEAD))])
    before, took = bytes(HEAD), []
    for _ in range(rounds):
        value = secrets.token_bytes(HEAD)
        compare = [Compare(owner, b"owner"), Compare(head, before)]
        puts = [Put(head, value), Put(log % next(_numbers), bytes(ENTRY))]
        begin = time.perf_counter()
        engine.txn(compare, puts)
        took.append((time.perf_counter() - begin) * 1e6)
        before = value
    return took


@pytest.mark.gate
@pytest.mark.quiet
def test_write_against_a_transaction(
    bench: Bench, benchmark: BenchmarkFixture, goal: Goal, fleet: Fleet
) -> None:
    benchmark.group = "fleet: durable write, 1 in flight"

    def measure() -> Measured:
        """In turns, so that what else the machine does slows both down."""
        engine = fleet.cluster.connect()
        plain: list[float] = []
        times: list[float] = []
        with fleet.served("shared") as running:
            counter = counter_of(running.socket)
            for first in range(counter, counter + ROUNDS, TURN):
                plain += transactions(engine, TURN)
                with chains(fleet.folder, writes(1, first), TURN) as file:
                    loaded = bench.tools.load(running.socket, file, count=TURN, frames=2, depth=1)
                times += loaded.times
        return against(times, percentile(plain, 50))

    goal("durable write in a shared store / etcd's transaction of the same size", measure, 1.3)


def test_write_in_local_files(bench: Bench, benchmark: BenchmarkFixture, fleet: Fleet) -> None:
    benchmark.group = "fleet: durable write, 1 in flight"
    record(benchmark, fleet.write(bench, "local files"), bench.sync())


@pytest.mark.parametrize("store", STORES)
def test_round_of_32(bench: Bench, benchmark: BenchmarkFixture, fleet: Fleet, store: str) -> None:
    benchmark.group = "fleet: a round of 32 durable writes"
    record(benchmark, fleet.write(bench, store, 32))


@pytest.mark.parametrize("store", STORES)
def test_start(benchmark: BenchmarkFixture, fleet: Fleet, store: str) -> None:
    """From exec to the first answer; the memory that is resident then."""
    benchmark.group = "fleet: exec to first answer"
    times = []
    for _ in range(STARTS):
        begin = time.perf_counter()
        with fleet.served(store) as running:
            counter_of(running.socket)
            times.append((time.perf_counter() - begin) * 1e6)
            memory = running.memory()
    record(benchmark, times, memory_mib=memory / 2**20)


def test_devices(benchmark: BenchmarkFixture, fleet: Fleet) -> None:
    """To create one of many devices; the others of its figures are in ``extra_info``."""
    benchmark.group = "fleet: create a device"
    config = load(str(fleet.host.config))
    kek = config.key_encryption_key()
    requests = Requests(config.connect())

    def keys(number: int) -> Keys:
        return Keys(config.prefix, f"device-{number:06}")

    def make(number: int) -> None:
        create(requests, keys(number), kek, spec.CAPACITY_UNIT, "bench")

    times = [timed(lambda number=number: make(number)) for number in range(DEVICES)]  # type: ignore[misc]
    listing = timed(lambda: list(list_devices(requests, config.prefix)))
    chosen = [keys(random.randrange(DEVICES)) for _ in range(200)]
    inspected = [timed(lambda each=each: describe(requests, each, kek)) for each in chosen]  # type: ignore[misc]
    status = fleet.cluster.leader().ask("/v3/maintenance/status", {})
    record(
        benchmark,
        times,
        devices=DEVICES,
        list_s=listing / 1e6,
        inspect_p50_us=percentile(inspected, 50),
        inspect_p99_us=percentile(inspected, 99),
        database_mib=int(status["dbSize"]) / 2**20,
    )
