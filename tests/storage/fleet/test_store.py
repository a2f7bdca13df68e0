# SPDX-License-Identifier: Apache-2.0
"""Commit, checkpoint, outage and the end of a store on a replicated engine."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.storage.fleet.story import KEK, LEASE, SIZE, MemoryStory, Story, block
from tests.support.fake_engine import Cluster, FakeEngine, Fault, Kind
from tests.support.oracle import KEY
from vhost_rpmb.errors import StateError, Stopped, UsageError
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.fleet.administration import create, list_devices
from vhost_rpmb.storage.fleet.layout import CHUNK_BLOCKS, Keys
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.interface import Store


def test_new_device_is_blank(story: MemoryStory) -> None:
    store = story.open()
    contract: Store = store
    assert (contract.counter, contract.key) == (0, None)
    assert bytes(contract.image) == bytes(SIZE)
    assert not contract.checkpoint_due


def test_commit_costs_one_request_of_any_size(story: MemoryStory) -> None:
    store = story.open()
    before = story.cluster.count
    story.commit(store, [], KEY)
    story.commit(store, [(address, block(1)) for address in range(50)])
    assert story.cluster.count == before + 2


def test_start_finds_log_and_chunks(story: MemoryStory) -> None:
    store = story.open()
    story.commit(store, [], KEY)
    story.commit(store, [(0, block(1)), (CHUNK_BLOCKS, block(2))])
    store.checkpoint()
    story.commit(store, [(0, block(3))])
    store.close()
    store = story.open()
    assert store.image[0] == 3
    assert store.image[CHUNK_BLOCKS * 256] == 2


def test_replay_record_survives_a_checkpoint_until_it_is_settled(story: MemoryStory) -> None:
    record = Replay(chains=2, writes=bytes(36))
    store = story.open()
    assert store.replay == NO_REPLAY
    assert store.commit(1, [(0, block(1))], None, record)
    story.state = (1, None, {0: block(1)})
    assert store.checkpoint()
    store.close()
    store = story.open()
    assert store.replay == record
    store.settle()
    store.close()
    assert story.open().replay == NO_REPLAY


def test_checkpoint_is_due_when_the_log_is_long(story: MemoryStory) -> None:
    store = story.open()
    story.commit(store, [(address, block(1)) for address in range(100)])
    assert not store.checkpoint_due
    story.commit(store, [(address, block(2)) for address in range(100)])
    due = store.checkpoint_due
    story.commit(store, [(address, block(3)) for address in range(100)])
    assert (due, store.checkpoint_due) == (True, False)  # though the device is never idle
    log = [key for key in story.cluster.data if b"/l/" in key]
    assert len(log) == 1


def test_checkpoint_of_a_large_device_takes_small_requests(folder: Path) -> None:
    cluster = Cluster()
    keys = Keys(b"/test/", "large")
    requests = Requests(FakeEngine(cluster), sleep=cluster.sleep)
    create(requests, keys, KEK, 16 * 1024 * 1024, "test")
    store = open_store(requests, keys, KEK, witness_folder=str(folder))
    store.commit(1, [(address, block(1)) for address in range(0, 65536, CHUNK_BLOCKS)], None)
    before = cluster.count
    assert store.checkpoint()
    assert cluster.count - before == 1024 // 8 + 1
    store.close()
    store = open_store(requests, keys, KEK, witness_folder=str(folder))
    assert all(store.image[at] == 1 for at in range(0, len(store.image), CHUNK_BLOCKS * 256))


def test_full_store_refuses_writes_and_recovers(
    story: MemoryStory, caplog: pytest.LogCaptureFixture
) -> None:
    store = story.open()
    story.commit(store, [(0, block(1))])
    story.cluster.full = True
    before = dict(story.cluster.data)
    for _ in range(2):
        assert not store.commit(2, [(0, block(2))], KEY)
    assert not store.checkpoint()
    assert (store.counter, store.key, store.image[0]) == (1, None, 1)
    assert story.cluster.data == before
    story.cluster.full = False
    story.commit(store, [(0, block(3))], KEY)
    assert store.checkpoint()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "a write could not be made durable: no space",
        "1 chunks could not be written (the log has them): no space",
        "writes are made durable again",
    ]
    store.close()
    story.open()


def test_outage_is_waited_for_and_logged_once(
    story: MemoryStory, caplog: pytest.LogCaptureFixture
) -> None:
    store = story.open()
    first = story.cluster.count
    for number in range(first, first + 50):
        story.cluster.plan[number] = Fault(Kind.LOSE_REQUEST)
    with caplog.at_level(logging.WARNING):
        story.commit(store, [(0, block(1))])
    assert [record.getMessage() for record in caplog.records] == [
        "the store gives no definite answer, requests wait: the request was lost",
        "the store answers again",
    ]


def test_refusal_after_a_try_without_an_answer_decides_nothing(story: MemoryStory) -> None:
    store = story.open()
    first = story.cluster.count
    story.cluster.plan = {
        first: Fault(Kind.DELAY, first + 3),
        first + 1: Fault(Kind.REFUSE),
        first + 2: Fault(Kind.REFUSE),
    }
    assert store.commit(1, [(0, block(1))], None)
    story.state = (1, None, {0: block(1)})
    store.close()
    story.open()


def test_stop_ends_a_commit_without_an_answer(folder: Path) -> None:
    cluster = Cluster()
    keys = Keys(b"/test/", "vm-1")
    requests = Requests(FakeEngine(cluster), stopping=lambda: cluster.full, sleep=cluster.sleep)
    create(requests, keys, KEK, SIZE, "test")
    store = open_store(requests, keys, KEK, witness_folder=str(folder))
    cluster.plan[cluster.count] = Fault(Kind.LOSE_ANSWER)
    cluster.full = True  # here the sign to stop
    with pytest.raises(Stopped):
        store.commit(1, [(0, block(1))], None)
    assert store.counter == 0


def test_close_frees_the_device_at_once(story: MemoryStory) -> None:
    store = story.open()
    before = story.cluster.now
    store.close()
    store.close()
    assert store.until <= story.cluster.now
    story.open("never")
    assert story.cluster.now - before < 1


def test_crashed_owner_is_waited_for(story: MemoryStory, caplog: pytest.LogCaptureFixture) -> None:
    store = story.open()
    story.commit(store, [(0, block(1))])
    before = story.cluster.now
    story.open()
    assert story.cluster.now - before == pytest.approx(LEASE, abs=1)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1
    assert lines[0].startswith("device vm-1 is owned by process ")
    assert lines[0].endswith(": waiting for the end of its lease")


def test_never_refuses_a_device_in_use(story: MemoryStory) -> None:
    story.open()
    with pytest.raises(StateError, match=r"in use by process \d+ on host .+: stop that daemon"):
        story.open("never")


def test_device_that_does_not_exist_is_refused(folder: Path) -> None:
    cluster = Cluster()
    with pytest.raises(StateError, match="expected one below /test/, found none: create it first"):
        Story(cluster, folder).open()


def test_device_is_created_once(story: MemoryStory) -> None:
    with pytest.raises(StateError, match="vm-1 exists already"):
        story.create()


@pytest.mark.parametrize("size", [0, 1, SIZE - 256, SIZE + 1, 129 * SIZE])
def test_size_is_checked(size: int) -> None:
    with pytest.raises(UsageError, match=f"expected 1 to 128 times 128 KiB, found {size} bytes"):
        create(Requests(FakeEngine(Cluster())), Keys(b"/", "vm"), KEK, size, "test")


@pytest.mark.parametrize("name", ["", "a/b", ".", "..", ".a", "-a", "a b", "a\n", "ä", "a" * 129])
def test_device_name_is_checked(name: str) -> None:
    with pytest.raises(StateError, match="the device name: expected 1 to 128 of the characters"):
        Keys(b"/", name)


def test_devices_are_listed_by_few_requests(story: MemoryStory) -> None:
    for number in range(30):
        create(story.requests(), Keys(b"/test/", f"other-{number:02}"), KEK, SIZE, "test")
    store = story.open()
    before = story.cluster.count
    found = list(list_devices(story.requests(), b"/test/"))
    assert story.cluster.count - before <= 5
    assert [each.device for each in found] == [
        *(f"other-{number:02}" for number in range(30)),
        "vm-1",
    ]
    assert [each.device for each in found if each.alive] == ["vm-1"]
    assert not any(each.quarantined for each in found)
    store.close()


@pytest.mark.parametrize("kind", [Kind.LOSE_REQUEST, Kind.LOSE_ANSWER])
def test_take_over_survives_an_outage_that_is_longer_than_its_lease(
    story: MemoryStory, kind: Kind
) -> None:
    """Its first transaction has no answer, and the lease that it puts a key on ends meanwhile."""
    cluster = story.cluster
    first = cluster.count + 2  # after a read and a lease
    began = cluster.now
    cluster.plan = {number: Fault(kind) for number in range(first, first + 40)}
    store = story.open()
    assert cluster.now - began > LEASE
    assert store.commit(0, [], KEY)
