# SPDX-License-Identifier: Apache-2.0
"""Chains of several requests and batches of several chains."""

from __future__ import annotations

import pytest

from tests.support.oracle import (
    COUNT,
    GENERAL,
    OK,
    WRITE,
    A,
    B,
    program_key,
    read_counter,
    read_data,
    read_result,
    sealed,
    split,
    write_data,
)
from tests.support.rig import Rig, RigFactory
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import Replay


def test_more_requests_in_one_chain_are_executed_in_order(rig: Rig) -> None:
    data = (
        program_key()
        + read_result()
        + write_data(0, 5, A)
        + read_data(5)
        + write_data(1, 5, B)
        + read_data(5)
        + read_counter()
    )
    result, first, second, counter = rig.chain(data, 4)
    assert result == sealed(req_resp=spec.VIRTIO_RPMB_RESP_PROGRAM_KEY)
    assert (first.data, second.data, counter.write_counter) == (A, B, 2)


def test_requests_beyond_the_room_are_executed(keyed: Rig) -> None:
    data = read_counter() + write_data(0, 5, A) + read_result() + write_data(1, 6, B)
    (counter,) = keyed.chain(data)
    assert counter.write_counter == 0
    assert keyed.store.counter == 2


def test_answer_that_does_not_fit_leaves_the_room_to_the_next(keyed: Rig) -> None:
    keyed.write(0, 5, A)
    answers = keyed.chain(read_data(5) + read_data(5, 2) + read_counter(), 2)
    assert [answer.req_resp for answer in answers] == [
        spec.VIRTIO_RPMB_RESP_DATA_READ,
        spec.VIRTIO_RPMB_RESP_DATA_READ,
    ]
    assert [answer.result for answer in answers] == [OK, GENERAL]


@pytest.mark.parametrize("length", [1, 511, 513, 1023])
def test_chain_that_is_not_whole_frames_fails_without_effect(keyed: Rig, length: int) -> None:
    data = (write_data(0, 5, A) + read_result())[:length].ljust(length, b"\0")
    assert keyed.chain(data) == [sealed(result=GENERAL)]
    assert keyed.store.counter == 0


def test_chain_without_readable_bytes_fails(keyed: Rig) -> None:
    assert keyed.chain(b"") == [sealed(result=GENERAL)]


@pytest.mark.parametrize("room", [0, 1, 511])
def test_answer_without_room_for_a_frame_is_left_out(keyed: Rig, room: int) -> None:
    assert keyed.raw_chain(read_counter(), room) == b""
    assert keyed.raw_chain(b"x" * 100, room) == b""


def test_room_is_counted_in_whole_frames(keyed: Rig) -> None:
    assert len(keyed.raw_chain(read_counter() + read_counter(), 1000)) == 512
    assert len(keyed.raw_chain(read_data(0, 0), 3 * 512 - 1)) == 1024


def test_chain_of_the_longest_request_is_served(make_rig: RigFactory) -> None:
    rig = make_rig(max_write_blocks=255)
    rig.program()
    data = write_data(0, 0, *[A] * 255) + write_data(1, 255, *[B] * 255) + read_result()
    assert len(data) == 511 * 512
    (answer,) = rig.chain(data)
    assert (answer.result, answer.write_counter) == (OK, 2)


def test_chain_over_the_limit_fails_without_effect(keyed: Rig) -> None:
    frames = 513
    assert keyed.chain(write_data(0, 0, A) * frames) == [sealed(result=GENERAL)]
    assert keyed.store.counter == 0


def test_batch_is_made_durable_once(make_rig: RigFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig()
    rig.program()
    commits: list[tuple[int, int]] = []
    commit = type(rig.store).commit

    def counted(
        store: object,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay,
    ) -> bool:
        assert not rig.ring.collect()  # nothing is answered before it is durable
        commits.append((counter, len(blocks)))
        return commit(store, counter, blocks, key, replay)  # type: ignore[arg-type]

    monkeypatch.setattr(type(rig.store), "commit", counted)
    rooms = []
    for number in range(20):
        room = rig.room(512)
        rig.ring.add(rig.put(write_data(number, number, A) + read_result()), room)
        rooms.append(room[0])
    assert len(rig.process()) == 20
    assert commits == [(20, 20)]
    counters = [split(rig.guest.read(*room))[0].write_counter for room in rooms]
    assert counters == list(range(1, 21))


def test_batch_without_writes_does_not_touch_the_store(
    keyed: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(type(keyed.store), "commit")
    assert keyed.chain(read_counter() + read_data(0) + read_result(), 3)[1].result == OK


def test_reads_see_the_writes_before_them_in_the_batch(keyed: Rig) -> None:
    rooms = []
    for data in (write_data(0, 5, A), read_data(5), write_data(1, 5, B), read_data(5)):
        room = keyed.room(512)
        keyed.ring.add(keyed.put(data), room)
        rooms.append(room[0])
    keyed.process()
    read = [split(keyed.guest.read(*rooms[index]))[0].data for index in (1, 3)]
    assert read == [A, B]


def test_batch_that_cannot_be_made_durable_is_answered_with_failures(
    keyed: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(keyed.store), "commit", lambda *_: False)
    rooms = []
    for number in range(3):
        room = keyed.room(1024)
        keyed.ring.add(keyed.put(write_data(number, 5, A) + read_result() + read_data(5)), room)
        rooms.append(room[0])
    keyed.process()
    answers = [split(keyed.guest.read(*room)) for room in rooms]
    assert [result.result for result, _ in answers] == [WRITE, COUNT, COUNT]
    assert [result.write_counter for result, _ in answers] == [0, 0, 0]
    assert [read.data for _, read in answers] == [bytes(256)] * 3
