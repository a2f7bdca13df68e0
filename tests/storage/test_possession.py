# SPDX-License-Identifier: Apache-2.0
"""The state of a hand-over is durable, and a failure changes nothing."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from tests.support.oracle import KEY
from tests.support.store import A, B, Open
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.interface import (
    ACTIVE,
    EXPORTED,
    IMPORTED,
    SUPERSEDED,
    VACANT,
    Possession,
    Received,
)
from vhost_rpmb.storage.local.database import Database

LEFT = Possession(EXPORTED, 3, bytes(16), bytes(range(16)))
ARRIVED = Possession(IMPORTED, 4, bytes(16), bytes(16))
RECEIVED = Received(
    name="0123456789abcdef",
    image=A + bytes(256) + B + bytes(509 * 256),
    damaged=frozenset({5}),
    counter=9,
    key=KEY,
    replay=Replay(1, b"", True),
)


@pytest.mark.parametrize(
    ("state", "refusal", "text"),
    [
        (EXPORTED, Fenced, "was handed to another host .generation 3."),
        (SUPERSEDED, Fenced, "was handed to another host"),
        (IMPORTED, StateError, "arrived and was not used yet"),
        (VACANT, StateError, "waits for one to arrive"),
    ],
)
def test_device_that_is_elsewhere_is_refused(
    opened: Open, state: str, refusal: type[Exception], text: str
) -> None:
    store = opened()
    store.possess(LEFT._replace(state=state))
    store.close()
    store = opened(waiting=True)
    assert store.possession == LEFT._replace(state=state)
    store.close()
    with pytest.raises(refusal, match=text):
        opened()


def test_device_is_adopted(opened: Open) -> None:
    store = opened(vacant=True, waiting=True)
    store.adopt(RECEIVED, ARRIVED)
    for _ in range(2):
        assert (store.name, store.counter, store.key) == (RECEIVED.name, 9, KEY)
        assert store.possession == ARRIVED
        assert bytes(store.image) == RECEIVED.image
        assert [address for address, mark in enumerate(store.damaged) if mark] == [5]
        assert store.replay == RECEIVED.replay
        store.close()
        store = opened(waiting=True)


@pytest.mark.parametrize("failing", ["rename", "possess", "mark_damaged", "add_pending"])
def test_failed_adoption_changes_nothing(
    opened: Open, monkeypatch: pytest.MonkeyPatch, failing: str
) -> None:
    store = opened(vacant=True, waiting=True)
    name = store.name

    def fail(*_: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Database, failing, fail)
        with pytest.raises(OSError, match="disk is full"):
            store.adopt(RECEIVED, ARRIVED)
    assert (store.name, store.counter, store.key, store.replay) == (name, 0, None, NO_REPLAY)
    assert store.possession.state == VACANT
    assert not any(store.image)
    store.close()
    store = opened(waiting=True)
    assert (store.name, store.possession.state, store.key) == (name, VACANT, None)
    store.adopt(RECEIVED, ARRIVED)
    assert store.possession == ARRIVED


def test_failed_hand_over_changes_nothing(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened()
    with monkeypatch.context() as patch:
        patch.setattr(
            Database, "possess", lambda *_: (_ for _ in ()).throw(sqlite3.OperationalError("full"))
        )
        with pytest.raises(OSError, match="full"):
            store.possess(LEFT)
    assert store.possession == Possession(ACTIVE)
    assert store.commit(1, [(0, A)], None)
    store.close()
    assert opened().possession == Possession(ACTIVE)


def test_unknown_state_is_damage(opened: Open, flash: Path) -> None:
    opened().close()
    with sqlite3.connect(f"{flash}.state") as connection:
        connection.execute("UPDATE device SET state = 'both'")
    connection.close()
    with pytest.raises(StateError, match="damaged"):
        opened()
