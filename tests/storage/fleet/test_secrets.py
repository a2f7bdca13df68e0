# SPDX-License-Identifier: Apache-2.0
"""Readers of the engine learn nothing, forged and exchanged records are found, restores too."""

from __future__ import annotations

import copy

import pytest

from tests.storage.fleet.story import KEK, KEYS, MemoryStory, block
from tests.support.oracle import KEY
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.storage.fleet.administration import accept, quarantine, replace_kek
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey

UNSEALED = (KEYS.owner, KEYS.alive, KEYS.incarnation)


@pytest.fixture
def written(story: MemoryStory) -> MemoryStory:
    """A device with key, chunks, table and log that no daemon owns."""
    store = story.open()
    story.commit(store, [], KEY)
    story.commit(store, [(0, block(1)), (100, block(2))])
    store.checkpoint()
    story.commit(store, [(0, block(3))])
    story.commit(store, [(1, block(4))])
    store.close()
    return story


def test_key_and_data_are_not_readable(written: MemoryStory) -> None:
    for value in written.cluster.data.values():
        for secret in (KEY, KEY.hex().encode(), block(1)[:16], block(2)[:16], block(3)[:16]):
            assert secret not in value
    assert "KEY" not in repr(KEK)


def sealed(story: MemoryStory) -> list[bytes]:
    return sorted(key for key in story.cluster.data if key not in UNSEALED)


def test_each_changed_or_missing_record_is_found(written: MemoryStory) -> None:
    genuine = dict(written.cluster.data)
    keys = sealed(written)
    assert {key[len(KEYS.prefix) : len(KEYS.prefix) + 1] for key in keys} == set(
        map(bytes, zip(b"hiktcl"))
    )
    for key in keys:
        value = genuine[key]
        forged = [value[:at] + bytes([value[at] ^ 1]) + value[at + 1 :] for at in (0, 9, -1)]
        for changed in (*forged, value[:-1], b"", None):
            written.cluster.data = dict(genuine)
            if changed is None:
                del written.cluster.data[key]
            else:
                written.cluster.data[key] = changed
            with pytest.raises(StateError):
                written.open()
    written.cluster.data = genuine
    written.open()


def test_each_record_of_an_earlier_time_is_found(story: MemoryStory) -> None:
    store = story.open()
    story.commit(store, [], KEY)
    earlier = []
    for value in range(1, 5):
        story.commit(store, [(0, block(value))])
        earlier.append(dict(story.cluster.data))
        store.checkpoint()
        earlier.append(dict(story.cluster.data))
    story.commit(store, [(0, block(5))])
    store.close()
    genuine = dict(story.cluster.data)
    tried = 0
    for old in earlier:
        for key in sealed(story):
            if key in old and old[key] != genuine[key]:
                story.cluster.data = genuine | {key: old[key]}
                went_back = key == KEYS.head
                with pytest.raises(Fenced if went_back else StateError):
                    story.open()
                tried += 1
                story.cluster.data = dict(genuine)
    assert tried > 10
    story.open()


def test_records_of_one_device_are_none_of_another(written: MemoryStory) -> None:
    other = Keys(KEYS.prefix, "vm-2")
    for key, value in list(written.cluster.data.items()):
        written.cluster.data[key.replace(b"/vm-1", b"/vm-2")] = value
    with pytest.raises(StateError, match="vm-2: its description was changed in the store"):
        open_store(written.requests(), other, KEK, witness_folder=str(written.folder))


def test_another_key_encryption_key_is_named(written: MemoryStory) -> None:
    wrong = KeyEncryptionKey(bytes(32))
    with pytest.raises(StateError, match=f"{wrong.name} of this host, found one .* {KEK.name}"):
        open_store(written.requests(), KEYS, wrong, witness_folder=str(written.folder))


def test_key_encryption_key_is_replaced_under_a_running_daemon(written: MemoryStory) -> None:
    new = KeyEncryptionKey(bytes(32))
    store = written.open()
    replace_kek(written.requests(), KEYS, KEK, new)
    written.commit(store, [(7, block(7))])
    store.close()
    with pytest.raises(StateError, match="configure that key"):
        written.open()
    store = open_store(
        written.requests(), KEYS, new, witness_folder=str(written.folder), clock=lambda: 0
    )
    assert written.found(store) == written.state


def test_running_daemon_is_fenced_by_a_restored_backup(written: MemoryStory) -> None:
    store = written.open()
    backup = copy.copy(written.cluster.data)
    written.commit(store, [(0, block(8))])
    written.cluster.data = backup
    with pytest.raises(Fenced, match="restored from a backup"):
        store.commit(99, [(0, block(9))], None)


def test_start_after_a_restored_backup_is_refused_until_accepted(written: MemoryStory) -> None:
    backup, revision = copy.copy(written.cluster.data), written.cluster.revision
    state = written.state
    store = written.open()
    written.commit(store, [(0, block(8))])
    store.close()
    written.cluster.data = backup
    with pytest.raises(Fenced, match="write counter 3, while this host saw 4"):
        written.open()
    written.cluster.data, written.cluster.revision = copy.copy(backup), revision
    with pytest.raises(Fenced, match=f"went back: .* revision {revision + 1}, while"):
        written.open()
    quarantine(written.requests(), KEYS.prefix)
    with pytest.raises(Fenced, match="vm-1 is quarantined"):
        written.open()
    accept(written.requests(), KEYS, KEK)
    written.state = state
    written.open()


def test_device_in_use_is_not_accepted(written: MemoryStory) -> None:
    store = written.open()
    with pytest.raises(StateError, match="in use: stop its daemon first"):
        accept(written.requests(), KEYS, KEK)
    written.commit(store, [(0, block(9))])


def test_accepted_device_fences_an_earlier_owner(written: MemoryStory) -> None:
    store = written.open()
    written.cluster.sleep(60)
    accept(written.requests(), KEYS, KEK)
    with pytest.raises(Fenced, match="expected this daemon as its owner, found no daemon"):
        store.commit(99, [(0, block(9))], None)
    with pytest.raises(Fenced):
        store.renew()


def test_witness_that_cannot_be_read_is_refused(written: MemoryStory) -> None:
    for path in written.folder.iterdir():
        path.write_text("{}")
    with pytest.raises(StateError, match="expected a record of the store, found another"):
        written.open()


def test_witness_that_cannot_be_written_is_logged_once(
    written: MemoryStory, caplog: pytest.LogCaptureFixture
) -> None:
    store = written.open()
    for path in written.folder.iterdir():
        path.unlink()
    written.folder.rmdir()
    for _ in range(2):
        assert store.renew()
    lines = [record.getMessage() for record in caplog.records]
    written.folder.mkdir()
    assert len(lines) == 1
    assert lines[0].endswith("could not be written: No such file or directory")
