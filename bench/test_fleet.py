# SPDX-License-Identifier: Apache-2.0
"""A shared store against etcd's own transaction and against local files.

Three members of etcd, with their data in memory, and all daemons are on this machine.
"""

from __future__ import annotations

import random
import secrets
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import count
from pathlib import Path
from typing import NamedTuple

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.daemon import KEY, Daemon, chains, counter_of, percentile, run, writes
from bench.measure import Bench
from bench.recording import CLOCK, Goal, Measured, against, record
from tests.support.etcd import EtcdCluster
from tests.support.fleet import Host, create_device
from tests.support.rig import make_image
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet.administration import create, describe, list_devices
from vhost_rpmb.storage.fleet.config import load
from vhost_rpmb.storage.fleet.engine import Compare, Put
from vhost_rpmb.storage.fleet.etcd import Etcd
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey

pytestmark = [pytest.mark.benchmark(timer=CLOCK), pytest.mark.etcd]

ROUNDS = 1000
TURN = 50  # writes, then as many transactions
STARTS = 7
HAND_OVERS = 40
DEVICES = 10_000
HEAD, ENTRY = 102, 340  # bytes of the records that a commit of one block puts
STORES = ("shared store", "local files")


class Fleet:
    """A cluster, a host with a device, and local files to compare with."""

    def __init__(self, folder: Path, cluster: EtcdCluster) -> None:
        self.folder = folder
        self.cluster = cluster
        self.host = Host(folder / "host", cluster, "/bench/")
        create_device(self.host)
        flash = make_image(folder / "flash")
        self.options = {
            "shared store": (self.host.store, "--device=vm-1"),
            "local files": (f"--flash-path={flash}",),
        }
        for store in STORES:
            with self.served(store) as running:
                counter_of(running.socket)  # programs the key

    @contextmanager
    def served(self, store: str) -> Iterator[Daemon]:
        with run(self.folder / "socket", *self.options[store]) as running:
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
        with fleet.served("shared store") as running:
            counter = counter_of(running.socket)
            for first in range(counter, counter + ROUNDS, TURN):
                plain += transactions(engine, TURN)
                with chains(fleet.folder, writes(1, first), TURN) as file:
                    loaded = bench.tools.load(running.socket, file, count=TURN, frames=2, depth=1)
                times += loaded.times
        return against(times, percentile(plain, 50), "shared store: durable write")

    goal("durable write in a shared store / etcd's transaction of the same size", measure, 1.3)


def test_write_in_local_files(bench: Bench, benchmark: BenchmarkFixture, fleet: Fleet) -> None:
    benchmark.group = "fleet: durable write, 1 in flight"
    what = "local files, beside it: durable write"
    record(benchmark, fleet.write(bench, "local files"), bench.sync(), what)


@pytest.mark.parametrize("store", STORES)
def test_round_of_32(bench: Bench, benchmark: BenchmarkFixture, fleet: Fleet, store: str) -> None:
    benchmark.group = "fleet: a round of 32 durable writes"
    record(benchmark, fleet.write(bench, store, 32), what=f"{store}: 32 durable writes in flight")


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
    what = f"{store}: exec to first answer"
    record(benchmark, times, what=what, memory_mib=memory / 2**20)


@pytest.mark.gate
@pytest.mark.quiet
def test_hand_over(benchmark: BenchmarkFixture, goal: Goal, fleet: Fleet) -> None:
    """From the stop of the ring at one daemon to the first answer of another one."""
    benchmark.group = "fleet: hand-over"

    def measure() -> Measured:
        times: list[float] = []
        plain: list[float] = []
        with (
            fleet.served("shared store") as one,
            RpmbClient.connect(str(one.socket), KEY) as first,
            run(fleet.folder / "other", *fleet.options["shared store"], cpu=1) as other,
        ):
            engine = fleet.cluster.connect()
            counter = first.read_counter()
            first.frontend.stop_ring()
            with RpmbClient.connect(str(other.socket), KEY) as second:
                second.read_counter()
                leaving, coming = second, first
                for _ in range(HAND_OVERS):
                    plain += transactions(engine, 1)
                    leaving.write(0, bytes(spec.BLOCK_SIZE))
                    counter += 1
                    begin = time.perf_counter()
                    leaving.frontend.stop_ring()
                    coming.frontend.start_ring(coming.ring)
                    assert coming.read_counter() == counter
                    times.append((time.perf_counter() - begin) * 1e6)
                    leaving, coming = coming, leaving
        what = "shared store: hand-over between two running daemons"
        found = against(times, percentile(plain, 50), what)
        return found._replace(value=percentile(times, 50) / 1000)

    goal("hand-over in a shared store, ms", measure, 10)


class Devices(NamedTuple):
    """Very many devices, and microseconds that it took to create each."""

    requests: Requests
    prefix: bytes
    kek: KeyEncryptionKey
    times: list[float]

    def keys(self, number: int) -> Keys:
        return Keys(self.prefix, f"device-{number:06}")


@pytest.fixture(scope="module")
def devices(fleet: Fleet) -> Iterator[Devices]:
    config = load(str(fleet.host.config))
    with closing(config.connect()) as engine:
        found = Devices(Requests(engine), config.prefix, config.key_encryption_key(), [])
        for number in range(DEVICES):
            begin = time.perf_counter()
            create(found.requests, found.keys(number), found.kek, spec.CAPACITY_UNIT, "bench")
            found.times.append((time.perf_counter() - begin) * 1e6)
        yield found


def test_create(benchmark: BenchmarkFixture, fleet: Fleet, devices: Devices) -> None:
    benchmark.group = "fleet: administration"
    status = fleet.cluster.leader().ask("/v3/maintenance/status", {})
    size = int(status["dbSize"]) / 2**20
    what = f"shared store: create one of {DEVICES:,} devices"
    record(benchmark, devices.times, what=what, database_mib=size)


def test_list(benchmark: BenchmarkFixture, devices: Devices) -> None:
    benchmark.group = "fleet: administration"
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        assert len(list(list_devices(devices.requests, devices.prefix))) >= DEVICES
        times.append((time.perf_counter() - begin) * 1e6)
    record(benchmark, times, what=f"shared store: list {DEVICES:,} devices")


def test_inspect(benchmark: BenchmarkFixture, devices: Devices) -> None:
    benchmark.group = "fleet: administration"
    times = []
    for number in random.sample(range(DEVICES), 200):
        begin = time.perf_counter()
        describe(devices.requests, devices.keys(number), devices.kek)
        times.append((time.perf_counter() - begin) * 1e6)
    record(benchmark, times, what=f"shared store: inspect one of {DEVICES:,} devices")
