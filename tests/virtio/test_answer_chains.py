# SPDX-License-Identifier: Apache-2.0
"""Chains answered one by one, for a device that knows neither engine nor ring format."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest

from tests.support.raw import RawGuest, lay_out
from tests.support.rig import ALL_FEATURES, Rig, RigFactory
from vhost_rpmb.driver.ring import Segment, Used
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio.flags import BROKEN, FAULTS, MORE, NOTIFY, Unanswered

LIMIT = 1000
MANY = 64


class Recorder:
    """An answer of the whole room, or shorter; it keeps what it was asked."""

    def __init__(self, length: int = LIMIT) -> None:
        self.asked: list[tuple[bytes, int]] = []
        self._length = length

    def __call__(self, request: bytes, room: int) -> bytes:
        self.asked.append((request, room))
        return bytes([len(self.asked)]) * min(room, self._length)


def run(rig: Rig, answer: Recorder, max_bytes: int = LIMIT, max_chains: int = MANY) -> list[Used]:
    rig.ring.publish()
    rig.flags = rig.queue.answer_chains(answer, max_bytes, max_chains)
    return rig.ring.collect()


def content(rig: Rig, segments: Sequence[Segment]) -> bytes:
    return b"".join(rig.guest.read(*segment) for segment in segments)


@pytest.mark.parametrize("features", [0, ALL_FEATURES])
@pytest.mark.parametrize("sizes", [(), (1,), (1, 2, 3, 4), (99,)])
def test_each_chain_is_answered_in_order(
    make_rig: RigFactory, features: int, sizes: Sequence[int]
) -> None:
    rig = make_rig(features=features)
    requests = [bytes([number]) * 100 for number in range(6)]
    rooms = [rig.room(200, sizes) for _ in requests]
    heads = [
        rig.ring.add(rig.put(request, sizes), room)
        for request, room in zip(requests, rooms, strict=True)
    ]
    answer = Recorder()
    assert run(rig, answer) == [Used(head, 200) for head in heads]
    assert answer.asked == [(request, 200) for request in requests]
    for number, room in enumerate(rooms, 1):
        assert content(rig, room) == bytes([number]) * 200
    assert rig.flags == NOTIFY


@pytest.mark.parametrize(("readable", "writable"), [(0, 5), (7, 0)])
def test_chain_may_lack_either_half(rig: Rig, readable: int, writable: int) -> None:
    rig.ring.add(rig.put(bytes(readable)), rig.room(writable))
    answer = Recorder()
    (used,) = run(rig, answer)
    assert used.length == writable
    assert answer.asked == [(bytes(readable), writable)]


@pytest.mark.parametrize("sizes", [(), (LIMIT,), (LIMIT - 1, 2), (LIMIT + 1,), (10, 20)])
def test_longer_chain_is_cut(rig: Rig, sizes: Sequence[int]) -> None:
    request = bytes(range(256)) * 8
    room = rig.room(2048, sizes)
    rig.ring.add(rig.put(request, sizes), room)
    answer = Recorder(length=5000)
    assert [used.length for used in run(rig, answer)] == [LIMIT]
    assert answer.asked == [(request[:LIMIT], LIMIT)]
    assert content(rig, room) == bytes([1]) * LIMIT + b"\xaa" * (2048 - LIMIT)


def test_short_answer_leaves_the_rest_of_the_buffers(rig: Rig) -> None:
    room = rig.room(300, (100, 100))
    rig.ring.add(rig.put(b"request"), room)
    assert [used.length for used in run(rig, Recorder(length=150))] == [150]
    assert content(rig, room) == bytes([1]) * 150 + b"\xaa" * 150


def test_batch_has_a_limit_of_chains(rig: Rig) -> None:
    for _ in range(7):
        rig.ring.add(rig.put(b"request"), rig.room(10))
    answer = Recorder()
    rounds = []
    while len(answer.asked) < 7:
        rounds.append((len(run(rig, answer, max_chains=3)), rig.flags & MORE))
    assert rounds == [(3, MORE), (3, MORE), (1, 0)]
    assert run(rig, answer) == []


def test_broken_chain_is_returned_unanswered(rig: Rig) -> None:
    rig.ring.add([Segment(0x1000, 8)])
    rig.ring.add(rig.put(b"good"), rig.room(10))
    answer = Recorder()
    assert [used.length for used in run(rig, answer)] == [0, 10]
    assert answer.asked == [(b"good", 10)]
    assert rig.flags & FAULTS
    assert sum(rig.queue.take_faults().values()) == 1


def test_broken_ring_answers_nothing(rig: Rig) -> None:
    rig.ring.add(rig.put(b"good"), rig.room(10))
    rig.ring.publish()
    rig.ring.offer(rig.ring.size)
    answer = Recorder()
    run(rig, answer)
    assert rig.flags & BROKEN
    assert len(answer.asked) <= 1
    assert rig.queue.error


@pytest.mark.parametrize("tracked", [False, True])
def test_chain_that_is_answered_later_stays_the_next_one(rig: Rig, tracked: bool) -> None:
    if tracked:
        rig.track()
    heads = [rig.ring.add(rig.put(bytes([number]) * 9), rig.room(10)) for number in range(3)]
    rig.ring.publish()
    asked = []

    def answer(request: bytes, room: int) -> bytes | Unanswered:
        asked.append(request[0])
        return Unanswered.LATER if len(asked) in (2, 3) else bytes(room)

    for expected, base in ((heads[:1], 1), ([], 1), (heads[1:], 3)):
        flags = rig.queue.answer_chains(answer, LIMIT, MANY)
        assert [used.head for used in rig.ring.collect()] == expected
        assert bool(flags & MORE) == (base < 3)
        assert rig.queue.base == base
    assert asked == [0, 1, 1, 1, 2]
    assert not any(rig.record[16::16])


@pytest.mark.parametrize("tracked", [False, True])
def test_chain_that_is_never_answered_is_not_returned(rig: Rig, tracked: bool) -> None:
    if tracked:
        rig.track()
    heads = [rig.ring.add(rig.put(bytes([number]) * 9), rig.room(10)) for number in range(3)]
    rig.ring.publish()
    flags = rig.queue.answer_chains(
        lambda request, room: Unanswered.NEVER if request[0] == 1 else bytes(room), LIMIT, MANY
    )
    assert [used.head for used in rig.ring.collect()] == [heads[0], heads[2]]
    assert not flags & MORE
    assert rig.queue.base == 3
    assert rig.ring.in_flight == 1
    if tracked:
        assert [rig.record[16 + 16 * head] for head in heads] == [0, 1, 0]


def test_lost_memory_is_not_answered(engine: Engine) -> None:
    """The bytes of a request that a truncated file held are never given to the device."""
    guest = RawGuest(engine)
    try:
        guest.fill(lay_out([b"A" * 64]))
        guest.share()
        guest.start()
        os.ftruncate(guest.fd, 0x4000)  # the rings stay
        answer = Recorder()
        assert guest.queue.answer_chains(answer, LIMIT, MANY) & BROKEN
        assert answer.asked == []
        assert "truncated" in guest.queue.error
    finally:
        guest.close()
