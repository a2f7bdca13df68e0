# SPDX-License-Identifier: Apache-2.0
"""The contract of an engine, on the one in memory and on three members of a real etcd."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.fleet.story import KEK, Story, block
from tests.support.daemon import PATIENCE
from tests.support.etcd import EtcdCluster
from tests.support.fake_engine import Cluster
from tests.support.oracle import KEY
from vhost_rpmb.storage.fleet.administration import create
from vhost_rpmb.storage.fleet.engine import (
    Compare,
    Delete,
    Engine,
    Get,
    LeaseEnded,
    Page,
    Put,
    Refused,
)
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.ownership import boot_time
from vhost_rpmb.storage.fleet.requests import Requests

SHORTEST_LEASE = 2  # seconds, of etcd


@pytest.fixture(params=["memory", pytest.param("etcd", marks=pytest.mark.etcd)])
def each_engine(request: pytest.FixtureRequest) -> Engine:
    if request.param == "memory":
        return Cluster().connect()
    cluster: EtcdCluster = request.getfixturevalue("etcd")
    return cluster.connect()


def test_transaction_applies_one_side(each_engine: Engine, prefix: bytes) -> None:
    a, b = prefix + b"a", prefix + b"b"
    absent = [Compare(a, None), Compare(b, None)]
    first = each_engine.txn(absent, [Put(a, b"\x00\xff"), Put(b, b"2")], [Get(a)])
    again = each_engine.txn(absent, [Put(a, b"3")], [Get(a), Get(b), Get(prefix + b"c")])
    assert (first.succeeded, first.found) == (True, {})
    assert (again.succeeded, again.found) == (False, {a: b"\x00\xff", b: b"2"})
    assert again.revision == first.revision
    third = each_engine.txn([Compare(a, b"\x00\xff")], [Delete(a), Get(b)])
    assert (third.succeeded, third.found) == (True, {b: b"2"})
    assert third.revision > first.revision
    assert not each_engine.txn([Compare(a, b"\x00\xff")], [Put(b, b"4")]).succeeded
    assert each_engine.txn([Compare(a, None), Compare(b, b"2")], []).succeeded


def test_range_comes_in_pages_in_order(each_engine: Engine, prefix: bytes) -> None:
    for number in (3, 1, 2):
        each_engine.txn([], [Put(prefix + b"%d" % number, b"v")])
    pairs = [(prefix + b"%d" % number, b"v") for number in (1, 2, 3)]
    end = prefix[:-1] + b"0"
    assert each_engine.range(prefix, end, 2) == Page(pairs[:2], True)
    assert each_engine.range(prefix + b"2\0", end, 2) == Page(pairs[2:], False)
    each_engine.txn([], [Delete(prefix, prefix + b"3")])
    assert each_engine.range(prefix, end, 2) == Page(pairs[2:], False)


def test_lease_removes_its_keys(each_engine: Engine, prefix: bytes) -> None:
    key = prefix + b"alive"
    lease = each_engine.grant(15)
    each_engine.txn([], [Put(key, b"1", lease)])
    assert each_engine.keepalive(lease)
    each_engine.revoke(lease)
    each_engine.revoke(lease)
    assert not each_engine.keepalive(lease)
    assert each_engine.txn([Compare(key, None)], []).succeeded


def test_put_on_an_ended_lease_is_refused(each_engine: Engine, prefix: bytes) -> None:
    lease = each_engine.grant(15)
    each_engine.revoke(lease)
    change = [Put(prefix + b"a", b"1"), Put(prefix + b"b", b"1", lease)]
    with pytest.raises(LeaseEnded):
        each_engine.txn([], change)
    assert each_engine.txn([Compare(prefix + b"a", None)], []).succeeded
    # Only if the compares hold, so that it is known to have been applied never.
    assert not each_engine.txn([Compare(prefix + b"a", b"1")], change).succeeded


def test_key_put_again_leaves_its_lease(each_engine: Engine, prefix: bytes) -> None:
    key = prefix + b"alive"
    first, second = each_engine.grant(15), each_engine.grant(15)
    each_engine.txn([], [Put(key, b"1", first)])
    each_engine.txn([], [Put(key, b"2", second)])
    each_engine.revoke(first)
    assert each_engine.txn([Compare(key, b"2")], []).succeeded


class RealCluster:
    """A real etcd in a story: its time is the host's, and nothing is late on purpose."""

    def __init__(self, etcd: EtcdCluster) -> None:
        self._etcd = etcd

    @property
    def now(self) -> float:
        return boot_time()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def deliver(self) -> None:
        pass

    def connect(self) -> Engine:
        return self._etcd.connect()


@pytest.mark.etcd
def test_life_of_a_device(etcd: EtcdCluster, folder: Path) -> None:
    Story(RealCluster(etcd), folder, SHORTEST_LEASE).run()


@pytest.mark.etcd
def test_request_of_the_largest_batch_is_accepted_and_too_large_ones_refused(
    etcd: EtcdCluster, prefix: bytes
) -> None:
    engine = etcd.connect()
    engine.txn([], [Put(prefix, bytes(1024 * 258))])
    with pytest.raises(Refused, match="too large"):
        engine.txn([], [Put(prefix, bytes(1600 * 1024))])


@pytest.mark.etcd
def test_no_acknowledged_write_is_lost_when_members_die(folder: Path, prefix: bytes) -> None:
    """Each member in turn is killed or stopped while a daemon writes, then comes back."""
    with EtcdCluster() as cluster:
        keys = Keys(prefix, "vm-1")
        requests = Requests(cluster.connect(timeout=1))
        create(requests, keys, KEK, 128 * 1024, "test")
        store = open_store(requests, keys, KEK, witness_folder=str(folder))
        assert store.commit(0, [], KEY)
        acknowledged = 0
        stop = threading.Event()

        def write() -> None:
            nonlocal acknowledged
            while not stop.is_set():
                number = acknowledged + 1
                assert store.commit(number, [(number % 512, block(number % 256))], None)
                acknowledged = number

        writer = threading.Thread(target=write)
        writer.start()
        try:
            for round_, member in enumerate((cluster.leader(), *cluster.members)):
                if round_ % 2:
                    member.signal(signal.SIGSTOP)
                else:
                    member.kill()
                progress(lambda: acknowledged, 5)
                if round_ % 2:
                    member.signal(signal.SIGCONT)
                else:
                    cluster.start(member)
                cluster.wait_healthy()
                progress(lambda: acknowledged, 5)
        finally:
            stop.set()
            writer.join()
        store.close()
        image = bytes(store.image)
        store = open_store(Requests(cluster.connect()), keys, KEK, witness_folder=str(folder))
        assert (store.counter, bytes(store.image)) == (acknowledged, image)


def progress(count: Callable[[], int], steps: int) -> None:
    """Wait until a counter has gone on by some steps."""
    first, end = count(), time.monotonic() + PATIENCE
    while count() < first + steps:
        assert time.monotonic() < end, "no progress"
        time.sleep(0.01)
