# SPDX-License-Identifier: Apache-2.0
"""Reads that trust no clock: each batch asks the engine whether the state is the latest one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.storage.fleet.story import KEK, KEYS, LEASE, block
from tests.support.fake_engine import Cluster, FakeEngine, Fault, Kind
from vhost_rpmb.errors import Fenced
from vhost_rpmb.storage.fleet.administration import create
from vhost_rpmb.storage.fleet.engine import Answer, Compare, Operation
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.interface import TakeOver


class OneMember(FakeEngine):
    """Like etcd: a transaction without any request is answered by one member, which is late."""

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        if not (success or failure):
            return Answer(True, {}, self.cluster.revision)
        return super().txn(compare, success, failure)


@pytest.fixture
def cluster() -> Cluster:
    return Cluster(engine=OneMember)


def start(
    cluster: Cluster, folder: Path, mode: TakeOver = "expired", confirmed: bool = True
) -> FleetStore:
    return open_store(
        Requests(cluster.connect(), sleep=cluster.sleep),
        KEYS,
        KEK,
        witness_folder=str(folder),
        mode=mode,
        lease_seconds=LEASE,
        confirmed_reads=confirmed,
        clock=lambda: cluster.now,
    )


@pytest.fixture
def store(cluster: Cluster, folder: Path) -> FleetStore:
    create(Requests(cluster.connect(), sleep=cluster.sleep), KEYS, KEK, 128 * 1024, "test")
    return start(cluster, folder)


@pytest.mark.parametrize("confirmed", [True, False])
def test_replaced_owner_answers_no_read_within_its_lease(
    cluster: Cluster, store: FleetStore, folder: Path, confirmed: bool
) -> None:
    """The other one is the store that trusts its lease, which a take-over without wait breaks."""
    store.close()
    store = start(cluster, folder, confirmed=confirmed)
    store.confirm()
    start(cluster, folder, "now").commit(1, [(0, block(1))], None)
    assert cluster.now < store.until
    if confirmed:
        with pytest.raises(Fenced, match="expected this daemon as its owner, found process"):
            store.confirm()
    else:
        store.confirm()


def test_confirmed_read_trusts_no_clock(cluster: Cluster, store: FleetStore) -> None:
    """Its lease may have ended: nobody else took the device over."""
    cluster.sleep(2 * LEASE)
    store.confirm()


def test_read_of_a_restored_state_is_fenced(cluster: Cluster, store: FleetStore) -> None:
    backup = dict(cluster.data)
    store.commit(1, [(0, block(1))], None)
    store.confirm()
    cluster.data = backup
    with pytest.raises(Fenced, match="if the store was restored from a backup, quarantine it"):
        store.confirm()


def test_one_request_a_batch_and_none_after_a_commit(cluster: Cluster, store: FleetStore) -> None:
    before = cluster.count
    store.commit(1, [(0, block(1))], None)
    store.confirm()
    assert cluster.count - before == 1
    store.confirm()
    store.confirm()
    assert cluster.count - before == 3


@pytest.mark.parametrize("kind", [Kind.LOSE_REQUEST, Kind.LOSE_ANSWER, Kind.REFUSE])
def test_read_waits_for_a_definite_answer(
    cluster: Cluster, store: FleetStore, caplog: pytest.LogCaptureFixture, kind: Kind
) -> None:
    cluster.plan = {cluster.count + number: Fault(kind) for number in range(3)}
    before = cluster.count
    store.confirm()
    assert cluster.count - before == 4
    assert caplog.text.count("wait") == 1


def test_refused_commit_confirms_nothing(cluster: Cluster, store: FleetStore, folder: Path) -> None:
    cluster.full = True
    assert not store.commit(1, [(0, block(1))], None)
    cluster.full = False
    start(cluster, folder, "now")
    with pytest.raises(Fenced):
        store.confirm()
