# SPDX-License-Identifier: Apache-2.0
"""A store that hosts share is asked before the answers of each batch are published."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.oracle import read_counter, read_data
from tests.support.rig import Rig
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import Fenced


class Confirming:
    """What is durable and what is published at each call."""

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.seen: list[tuple[int, int]] = []
        self.fenced = False

    def __call__(self) -> None:
        self.seen.append((self.rig.store.counter, self.rig.ring.used_index))
        if self.fenced:
            raise Fenced("another daemon owns the device")


@pytest.fixture
def confirming(engine: Engine, flash: Path) -> Confirming:
    rig = Rig(engine, flash)
    made = Confirming(rig)
    rig.program()
    rig.store.confirm = made  # type: ignore[misc]
    rig.replace_device()
    return made


def test_after_the_commit_and_before_the_publication(confirming: Confirming) -> None:
    rig = confirming.rig
    used = rig.ring.used_index
    rig.write(0, 3, b"a" * 256)
    rig.chain(read_counter())
    assert confirming.seen == [(1, used), (1, used + 1)]
    rig.close()


def test_once_a_batch_and_never_without_one(confirming: Confirming) -> None:
    rig = confirming.rig
    for _ in range(3):
        rig.ring.add(rig.put(read_counter()), rig.room(512))
    rig.ring.publish()
    rig.process()
    assert len(confirming.seen) == 1
    rig.process()
    assert len(confirming.seen) == 1
    rig.close()


def test_nothing_is_answered_by_a_fenced_daemon(confirming: Confirming) -> None:
    rig = confirming.rig
    used = rig.ring.used_index
    confirming.fenced = True
    for request in (read_data(0), read_counter()):
        rig.ring.add(rig.put(request), rig.room(512))
    rig.ring.publish()
    with pytest.raises(Fenced):
        rig.process()
    assert rig.ring.used_index == used
    rig.close()
