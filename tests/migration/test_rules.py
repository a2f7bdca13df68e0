# SPDX-License-Identifier: Apache-2.0
"""Whether a state may replace what is here, in each state of the device."""

from __future__ import annotations

import pytest

from tests.migration.test_blob import STATE
from tests.support.oracle import KEY
from vhost_rpmb.migration.note import NOTE_SIZE, Note
from vhost_rpmb.migration.rules import Present, check_arrival, is_own
from vhost_rpmb.storage.interface import (
    ACTIVE,
    EXPORTED,
    IMPORTED,
    SUPERSEDED,
    VACANT,
    Possession,
)
from vhost_rpmb.storage.local.keyfile import fingerprint

TOKEN = STATE.token
ARRIVING = STATE._replace(counter=100, generation=5, fingerprint=fingerprint(KEY))


def present(state: str, generation: int, token: bytes = b"", **changes: object) -> Present:
    possession = Possession(state, generation, token)
    found = Present(STATE.name, possession, 100, STATE.size, STATE.config, KEY)
    return found._replace(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("here", "accepted"),
    [
        (present(VACANT, 0, name="other", counter=0, key=None), True),
        (present(ACTIVE, 4), True),
        (present(ACTIVE, 5), False),
        (present(ACTIVE, 5, TOKEN), False),
        (present(ACTIVE, 6), False),
        (present(EXPORTED, 5, TOKEN), True),
        (present(EXPORTED, 5, TOKEN, counter=99), False),
        (present(EXPORTED, 5, TOKEN, counter=101), False),
        (present(EXPORTED, 5, bytes(16)), False),
        (present(EXPORTED, 4, bytes(16)), True),
        (present(EXPORTED, 6, TOKEN), False),
        (present(IMPORTED, 5, TOKEN), True),
        (present(IMPORTED, 5, bytes(16)), False),
        (present(IMPORTED, 4, bytes(16)), True),
        (present(SUPERSEDED, 5, TOKEN), False),
        (present(SUPERSEDED, 4), True),
        (present(ACTIVE, 4, name="other"), False),
        (present(ACTIVE, 4, counter=101), False),
        (present(ACTIVE, 4, counter=99), True),
        (present(ACTIVE, 4, size=2 * STATE.size), False),
        (present(ACTIVE, 4, config=bytes((1, 16, 255))), False),
        (present(VACANT, 0, config=bytes((1, 16, 255))), False),
        (present(ACTIVE, 4, key=bytes(32)), False),
        (present(ACTIVE, 4, key=None), True),
    ],
    ids=str,
)
def test_arrival_is_judged(here: Present, accepted: bool) -> None:
    if accepted:
        check_arrival(here, ARRIVING)
    else:
        with pytest.raises(ValueError, match="expected"):
            check_arrival(here, ARRIVING)


def test_own_state_is_the_one_that_left_or_arrived() -> None:
    assert is_own(present(EXPORTED, 5, TOKEN), ARRIVING)
    assert is_own(present(IMPORTED, 5, TOKEN), ARRIVING)
    assert not is_own(present(ACTIVE, 5, TOKEN), ARRIVING)
    assert not is_own(present(EXPORTED, 5, TOKEN, name="other"), ARRIVING)


def test_note_is_of_one_hand_over() -> None:
    buffer = memoryview(bytearray(NOTE_SIZE))
    left = Possession(EXPORTED, 5, TOKEN)
    note = Note(buffer)
    assert not note.given
    assert not note.matches(Possession(EXPORTED, 0, bytes(16)))
    note.give(left)
    again = Note(buffer)  # of another process
    assert again.given
    assert again.matches(left)
    assert not again.matches(left._replace(generation=6))
    assert not again.matches(left._replace(token=bytes(16)))
    assert again.stayed(Possession(ACTIVE, 4, TOKEN))
    assert not again.stayed(Possession(ACTIVE, 3))
    assert not again.stayed(Possession(ACTIVE, 5))
    assert again.took_back(Possession(ACTIVE, 5))
    assert not again.took_back(left)
    assert not again.took_back(Possession(ACTIVE, 6))
    again.clear()
    assert not note.given
    assert not note.matches(left)


def test_note_tells_leaving_from_arriving() -> None:
    left = Possession(EXPORTED, 5, TOKEN)
    note = Note()
    note.arrive(left)
    assert note.arrived
    assert not note.given
    assert note.matches(left)
    assert not note.took_back(Possession(ACTIVE, 5))
    assert not note.stayed(Possession(ACTIVE, 4))
