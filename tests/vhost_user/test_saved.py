# SPDX-License-Identifier: Apache-2.0
"""The record of a connection as bytes; records of every released format stay readable."""

from __future__ import annotations

from pathlib import Path

import pytest

from vhost_rpmb.vhost_user import saved
from vhost_rpmb.vhost_user.saved import (
    Inflight,
    Intake,
    Owed,
    Record,
    SavedLog,
    SavedRegion,
    SavedVring,
    State,
)
from vhost_rpmb.vhost_user.wire import MemoryRegion

DATA = Path(__file__).parents[1] / "data"

# The content of tests/data/session-record-1.
FORMAT_1 = Record(
    State(
        offered=0x1_3000_0000,
        config=b"\1\x20\xff",
        features=0x1_7000_0000,
        protocol_features=0x1_A209,
        owned=True,
        status=15,
        regions=[
            SavedRegion(MemoryRegion(0, 0x8000_0000, 0x7F00_0000_0000, 0), 1),
            SavedRegion(MemoryRegion(1 << 32, 4096, 0x7F80_0000_0000, 0x8000_0000), 1),
        ],
        vrings=[
            SavedVring(64, (1 << 12, 2 << 12, 3 << 12), True, True, 0xFFFF, 2, 0xFFFD, 4, 3, 2),
            SavedVring(0, None, False, False, 0, 0, 0, 0, 0, 0),
        ],
        inflight=Inflight(5, 4096, 8192, 2, 64),
    ),
    Intake(b"\x0d\0\0\0", (6, 0), False, b"\1", (7,)),
    Owed(b"reply", (8,)),
)

# The content of tests/data/session-record-2.
FORMAT_2 = FORMAT_1._replace(
    state=FORMAT_1.state._replace(
        vrings=[
            FORMAT_1.state.vrings[0]._replace(log_address=3 << 12),
            FORMAT_1.state.vrings[1],
        ],
        log=SavedLog(9, 1 << 20, 4096, 10),
    )
)
PRESENT = FORMAT_2


def packed(record: Record) -> bytes:
    return saved.pack(saved.pack_state(record.state), record.intake, record.owed)


@pytest.mark.parametrize(("number", "record"), [(1, FORMAT_1), (2, FORMAT_2)])
def test_record_of_each_format_is_read(number: int, record: Record) -> None:
    assert Record.unpack((DATA / f"session-record-{number}").read_bytes()) == record


def test_present_format_has_a_record() -> None:
    assert packed(PRESENT) == (DATA / f"session-record-{saved.FORMAT}").read_bytes()


@pytest.mark.parametrize("inflight", [None, Inflight(1, 2, 3, 4, 5)])
def test_record_is_read_as_it_was_packed(inflight: Inflight | None) -> None:
    record = PRESENT._replace(state=PRESENT.state._replace(inflight=inflight))
    assert Record.unpack(packed(record)) == record


def test_largest_record_fits() -> None:
    """509 regions, a message of the maximum size and its descriptors."""
    region = FORMAT_1.state.regions[0]
    state = PRESENT.state._replace(regions=[region] * 509)
    record = Record(state, Intake(bytes(4108), (1,) * 32, True, b"", (1,) * 253), Owed())
    assert Record.unpack(packed(record)) == record
    assert len(packed(record)) < 61440 - 32


def test_cut_record_is_refused() -> None:
    data = packed(PRESENT)
    for size in range(len(data)):
        with pytest.raises(ValueError, match="more bytes of the record, found"):
            Record.unpack(data[:size])


def test_longer_record_is_refused() -> None:
    with pytest.raises(ValueError, match="expected the end of the record, found 1 more"):
        Record.unpack(packed(PRESENT) + b"\0")


@pytest.mark.parametrize("number", [0, saved.FORMAT + 1, 0xFFFF])
def test_other_format_is_refused(number: int) -> None:
    data = number.to_bytes(2, "little") + packed(PRESENT)[2:]
    with pytest.raises(ValueError, match=rf"a record of format 1 to \d, found format {number}"):
        Record.unpack(data)


def test_files_are_all_that_the_state_names() -> None:
    assert FORMAT_1.state.files == {1, 2, 3, 4, 5}
    assert PRESENT.state.files == {1, 2, 3, 4, 5, 9, 10}
