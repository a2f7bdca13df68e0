# SPDX-License-Identifier: Apache-2.0
"""The bytes that travel: what was packed is read again, and everything else is refused."""

from __future__ import annotations

import hashlib
import random

import pytest

from vhost_rpmb.migration.blob import COPY, TICKET, State, largest, pack, unpack
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay

UNIT = 128 * 1024
A, B = b"a" * 256, b"b" * 256
STATE = State(
    kind=COPY,
    name="0123456789abcdef",
    generation=7,
    token=bytes(range(16)),
    counter=0xFFFF_FFFF,
    size=UNIT,
    config=bytes((1, 32, 255)),
    fingerprint=bytes(32),
    sealed_key=b"sealed" * 10,
    register=bytes(range(10)),
    replay=Replay(2, bytes(72), True),
    damaged=[1, 511],
    blocks=[(0, A), (510, B)],
)
TICKET_STATE = STATE._replace(
    kind=TICKET, digest=bytes(32), damaged=[], blocks=[], replay=NO_REPLAY
)


@pytest.mark.parametrize(
    "state",
    [STATE, STATE._replace(fingerprint=b"", sealed_key=b"", register=b""), TICKET_STATE],
    ids=["full", "empty", "ticket"],
)
def test_state_survives_the_way(state: State) -> None:
    blob = pack(state)
    assert unpack(blob, state.kind) == state
    assert int.from_bytes(blob[8:16], "big") == len(blob)
    assert hashlib.sha256(blob[:-32]).digest() == blob[-32:]


def test_largest_state_fits() -> None:
    blocks = [(address, A) for address in range(65536)]
    replay = Replay(1024, bytes(1024 * 36))
    state = STATE._replace(size=128 * UNIT, blocks=blocks, damaged=[], replay=replay)
    blob = pack(state)
    assert 0 < largest(state.size) - len(blob) < 200_000
    assert unpack(blob, COPY).image() == A * 65536


def test_image_has_zeros_where_there_is_no_block() -> None:
    assert STATE.image() == A + bytes(509 * 256) + B + bytes(256)


def test_cut_state_is_refused_at_each_length() -> None:
    blob = pack(STATE)
    for length in range(len(blob)):
        with pytest.raises(ValueError, match="expected"):
            unpack(blob[:length], COPY)


def test_changed_state_is_refused_at_each_byte() -> None:
    blob = bytearray(pack(STATE))
    for position in range(len(blob)):
        blob[position] ^= 1 << position % 8
        with pytest.raises(ValueError, match="expected"):
            unpack(bytes(blob), COPY)
        blob[position] ^= 1 << position % 8
    assert unpack(bytes(blob), COPY) == STATE


def test_trailing_bytes_are_refused() -> None:
    blob = pack(STATE)
    with pytest.raises(ValueError, match=f"expected a state of {len(blob)} bytes"):
        unpack(blob + b"\0", COPY)


def sealed(content: bytes) -> bytes:
    """Content with a length and a digest that are right."""
    content = content[:8] + (len(content) + 32).to_bytes(8, "big") + content[16:]
    return content + hashlib.sha256(content).digest()


def test_fields_are_checked_behind_the_digest() -> None:
    """Whoever can make a digest breaks nothing: a state is read, or refused with ValueError."""
    source = random.Random(1)
    content = pack(STATE)[:-32]
    refused = 0
    for _ in range(3000):
        changed = bytearray(content[: source.randrange(21, len(content) + 1)])
        for _ in range(source.randrange(3)):
            changed[source.randrange(20, len(changed))] = source.randrange(256)
        try:
            unpack(sealed(bytes(changed)), COPY)
        except ValueError:
            refused += 1
    assert refused > 1500


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"name": ""}, "name"),
        ({"name": "../evil"}, "name"),
        ({"name": "0123456789abcdef0"}, "name"),
        ({"generation": 0}, "generation"),
        ({"size": 0}, "128 KiB"),
        ({"size": UNIT + 256}, "128 KiB"),
        ({"size": 129 * UNIT}, "128 KiB"),
        ({"fingerprint": bytes(31)}, "fingerprint"),
        ({"register": bytes(9)}, "register"),
        ({"digest": bytes(32)}, "digest"),
        ({"damaged": [1, 1]}, "ascending"),
        ({"damaged": [512]}, "ascending"),
        ({"damaged": [510]}, "not damaged"),
        ({"blocks": [(1, A), (0, A)]}, "ascending"),
        ({"blocks": [(512, A)]}, "ascending"),
        ({"replay": Replay(1, bytes(35))}, "replay record"),
    ],
    ids=str,
)
def test_values_that_no_device_has_are_refused(changes: dict[str, object], text: str) -> None:
    state = STATE._replace(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=text):
        unpack(pack(state), COPY)


def test_other_formats_and_kinds_are_refused() -> None:
    blob = pack(STATE)
    newer = sealed(blob[:16] + b"\0\2" + blob[18:-32])
    with pytest.raises(ValueError, match="expected a state of format 1, found 2"):
        unpack(newer, COPY)
    with pytest.raises(ValueError, match="use the same mode on both hosts"):
        unpack(blob, TICKET)
    with pytest.raises(ValueError, match="found other bytes"):
        unpack(bytes(1000), COPY)
