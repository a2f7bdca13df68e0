# SPDX-License-Identifier: Apache-2.0
"""A write that is durable but was not answered is answered OK when its chain is executed again."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import lives
from tests.support.homes import Files
from tests.support.lives import DEATH, Guest, GuestFactory, Life, LifeFactory, results
from tests.support.oracle import (
    ADDR,
    AUTH,
    COUNT,
    EXPIRED,
    GENERAL,
    KEY,
    LAST,
    NO_KEY,
    OK,
    OTHER_KEY,
    WRITE,
    A,
    B,
    C,
    Frame,
    program_key,
    read_counter,
    read_data,
    read_result,
    write_data,
)
from tests.support.raw import RawGuest, lay_out
from tests.support.rig import Rig
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.store import MAX_PENDING
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.virtio.flags import BROKEN


@pytest.fixture
def raw(engine: Engine) -> Iterator[RawGuest]:
    raw = RawGuest(engine)
    yield raw
    raw.close()


def write(guest: Guest, counter: int, address: int, *blocks: bytes) -> bytes:
    """Submit a write and return its request."""
    request = write_data(counter, address, *blocks) + read_result()
    guest.submit(request)
    return request


def check_written(frames: list[Frame], first: int = 0) -> None:
    """Check that each answer is the OK of the write with the next counter."""
    assert results(frames) == [OK] * len(frames)
    assert [frame.write_counter for frame in frames] == [
        first + number + 1 for number in range(len(frames))
    ]


def counter_of(guest: Guest) -> int:
    return guest.home.counter()


@pytest.mark.parametrize(("chains", "blocks"), [(1, 1), (2, 1), (64, 1), (4, 32), (1, 32)])
def test_batch_that_was_not_published_is_answered_by_the_next_process(
    guest: Guest, chains: int, blocks: int
) -> None:
    for number in range(chains):
        write(guest, number, number, *[bytes([number + 1]) * 256] * blocks)
    guest.live(*DEATH)
    assert guest.answers() == []
    assert counter_of(guest) == chains
    check_written(guest.serve())
    assert counter_of(guest) == chains
    store = guest.home.open(None, None)
    assert store.image[(chains - 1 + blocks - 1) * 256] == chains
    store.close()


def test_failed_writes_of_the_batch_fail_again(guest: Guest) -> None:
    write(guest, 0, 0, A)
    guest.submit(write_data(1, 1, B, key=OTHER_KEY) + read_result())
    write(guest, 1000, 1, B)
    write(guest, 1, 512, B)
    guest.submit(write_data(1, 1, B, block_count=2) + read_result())
    write(guest, 1, 2, C)
    guest.live(*DEATH)
    frames = guest.serve()
    assert results(frames) == [OK, AUTH, COUNT, ADDR, GENERAL, OK]
    # A failed write has the present counter, those that are answered again have their own.
    assert [frame.write_counter for frame in frames] == [1, 2, 2, 2, 2, 2]
    assert counter_of(guest) == 2


def test_write_that_came_too_early_may_be_done_when_executed_again(guest: Guest) -> None:
    write(guest, 1, 1, B)
    write(guest, 0, 0, A)
    guest.live(*DEATH)
    assert counter_of(guest) == 1
    frames = guest.serve()
    assert [(frame.result, frame.write_counter) for frame in frames] == [(OK, 2), (OK, 1)]
    assert counter_of(guest) == 2


def test_result_of_each_write_follows_it_in_one_chain(guest: Guest) -> None:
    request = b"".join(write_data(n, n, A) + read_result() for n in range(3)) + read_data(2)
    guest.submit(request, room=4)
    guest.live(*DEATH)
    guest.live(Life.serve)
    (frames,) = guest.answers()
    check_written(frames[:3])
    assert (frames[3].result, frames[3].data) == (OK, A)


def test_result_is_read_in_a_later_chain(guest: Guest) -> None:
    guest.submit(write_data(0, 3, A), room=0)
    guest.submit(read_result())
    guest.live(*DEATH)
    guest.live(Life.serve)
    none, (frame,) = guest.answers()
    assert (none, frame.result, frame.write_counter, frame.address) == ([], OK, 1, 3)


def test_key_and_write_in_one_batch(blank: Guest) -> None:
    blank.submit(read_counter())
    blank.submit(program_key() + read_result())
    write(blank, 0, 0, A)
    blank.live(*DEATH)
    assert blank.answers() == []
    frames = blank.serve()
    # The read may see what came after it.
    assert results(frames) == [OK, OK, OK]
    assert frames[1].req_resp == spec.VIRTIO_RPMB_RESP_PROGRAM_KEY
    assert [frame.write_counter for frame in frames] == [1, 0, 1]


@pytest.mark.parametrize("home", ["files"], indirect=True)
def test_key_in_a_key_file_is_compared(blank: Guest, tmp_path: Path) -> None:
    blank.key_path = str(tmp_path / "key")
    blank.submit(program_key() + read_result())
    blank.live(*DEATH)
    assert (tmp_path / "key").read_bytes() == KEY
    assert results(blank.serve()) == [OK]


def test_another_key_is_refused(blank: Guest) -> None:
    chain = blank.submit(program_key() + read_result())
    blank.live(*DEATH)
    blank.memory.write(chain.readable.address, program_key(OTHER_KEY))
    assert results(blank.serve()) == [WRITE]


def test_key_of_an_earlier_commit_is_refused(guest: Guest) -> None:
    write(guest, 0, 0, A)
    guest.submit(program_key() + read_result())
    guest.live(*DEATH)
    assert results(guest.serve()) == [OK, WRITE]


def test_malformed_key_request_fails_again(blank: Guest) -> None:
    chain = blank.submit(program_key() + read_result())
    blank.live(*DEATH)
    blank.memory.write(chain.readable.address, program_key(block_count=2))
    assert results(blank.serve()) == [GENERAL]


def test_unprogrammed_device_has_no_write_to_answer(blank: Guest) -> None:
    write(blank, 0, 0, A)
    assert results(blank.serve()) == [NO_KEY]
    write(blank, 0, 0, A)
    assert results(blank.serve()) == [NO_KEY]


@pytest.mark.parametrize("deaths", [1, 3])
def test_killed_again_before_it_serves(guest: Guest, deaths: int) -> None:
    write(guest, 0, 0, A)
    guest.live(*DEATH)
    for _ in range(deaths):
        guest.live()
    check_written(guest.serve())


@pytest.mark.parametrize("deaths", [1, 3])
def test_killed_again_during_the_replay(guest: Guest, deaths: int) -> None:
    """Each process adds a write to the batch, commits it, and publishes nothing."""
    for number in range(deaths + 1):
        write(guest, number, number, A)
        guest.live(*DEATH)
        assert counter_of(guest) == number + 1
    assert guest.answers() == []
    check_written(guest.serve())
    assert counter_of(guest) == deaths + 1


def test_new_write_between_replays(guest: Guest) -> None:
    """And killed again before its batch was published."""
    requests = [write_data(n, n, A) + read_result() for n in range(3)]
    for request in requests:
        guest.submit(request)
    guest.live(*DEATH)
    guest.ring.reset()  # a driver that submits its requests again, in its own order
    guest.submit(requests[0])
    write(guest, 3, 3, A)
    guest.live(*DEATH)
    guest.submit(requests[2])
    frames = guest.serve()
    assert [(frame.result, frame.write_counter) for frame in frames] == [(OK, 1), (OK, 4), (OK, 3)]
    assert counter_of(guest) == 4


def test_answers_behind_a_new_commit_stay_owed(guest: Guest) -> None:
    requests = [write_data(n, n, A) + read_result() for n in range(3)]
    for request in requests:
        guest.submit(request)
    guest.live(*DEATH)
    guest.ring.reset()
    write(guest, 3, 3, A)  # the window has three chains
    guest.live(*DEATH)
    guest.submit(requests[1])
    guest.submit(requests[2])
    frames = guest.serve()
    assert [(frame.result, frame.write_counter) for frame in frames] == [(OK, 4), (OK, 2), (OK, 3)]


@pytest.mark.parametrize("home", ["files"], indirect=True)
def test_checkpoint_inside_the_commit(guest: Guest) -> None:
    def fill(life: Life) -> None:
        blocks = [(address % 512, A) for address in range(MAX_PENDING - 1)]
        assert life.store.commit(0, blocks, None)

    for number in range(2):
        write(guest, number, number, B)
    guest.live(fill, *DEATH)
    assert isinstance(guest.home, Files)
    assert verify(Paths.resolve(str(guest.home.flash))).pending == []
    check_written(guest.serve())


@pytest.mark.parametrize("offset", [0, 195, 196, 227, 228, 483, 484, 500, 503, 504, 506, 508])
def test_changed_frame_is_not_answered_ok(guest: Guest, offset: int) -> None:
    """One byte of one frame changes before it is executed again; the rest is answered OK."""
    chains = []
    for number in range(3):
        chains.append(guest.submit(write_data(number, number, A) + read_result()))
    guest.live(*DEATH)
    place = chains[1].readable.address + offset
    guest.memory.write(place, bytes([guest.memory.read(place, 1)[0] ^ 0x40]))
    frames = guest.serve()
    # No MAC covers the stuff bytes. A large address or count fails before the MAC is verified.
    expected = {0: OK, 195: OK, 504: ADDR, 506: GENERAL}.get(offset, AUTH)
    assert results(frames) == [OK, expected, OK]
    assert counter_of(guest) == 3


def test_other_request_with_an_old_counter_is_refused(guest: Guest) -> None:
    """Its MAC is right, but it was never accepted."""
    chain = guest.submit(write_data(0, 0, A) + read_result())
    write(guest, 1, 1, A)
    guest.live(*DEATH)
    guest.memory.write(chain.readable.address, write_data(0, 0, B))
    assert results(guest.serve()) == [COUNT, OK]
    store = guest.home.open(None, None)
    assert bytes(store.image[:256]) == A
    store.close()


def test_replay_without_a_crash_is_refused(guest: Guest) -> None:
    request = write(guest, 0, 0, A)
    guest.submit(request)
    assert results(guest.serve()) == [OK, COUNT]


def test_replay_after_a_clean_stop_is_refused(guest: Guest) -> None:
    request = write(guest, 0, 0, A)
    guest.live(Life.serve, Life.stop)
    check_written(guest.answer())
    guest.submit(request)
    assert results(guest.serve()) == [COUNT]


def test_stop_before_the_answer_keeps_it_owed(guest: Guest) -> None:
    """Killed after a commit; the next process is stopped before it looks at the ring."""
    request = write(guest, 0, 0, A)
    guest.live(*DEATH)
    guest.live(Life.stop)
    guest.live(Life.stop)
    guest.live(Life.serve, Life.stop)
    check_written(guest.answer())
    guest.submit(request)
    assert results(guest.serve()) == [COUNT]


def test_stop_between_two_owed_answers_keeps_the_second(guest: Guest) -> None:
    requests = [write_data(n, n, A) + read_result() for n in range(2)]
    for request in requests:
        guest.submit(request)
    guest.live(*DEATH)
    guest.ring.reset()
    guest.submit(requests[0])
    guest.live(Life.serve, Life.stop)
    check_written(guest.answer())
    guest.submit(requests[1])
    check_written(guest.serve(), first=1)


def test_window_ends_after_as_many_chains_as_the_batch_had(guest: Guest) -> None:
    """Also if other requests take its place."""
    requests = [write(guest, number, number, A) for number in range(3)]
    guest.live(Life.serve)  # published, then killed
    check_written(guest.answer())
    for request in (requests[2], requests[1]):
        guest.submit(request)
    guest.submit(read_counter())
    guest.submit(requests[0])
    assert results(guest.serve()) == [OK, OK, OK, COUNT]


def test_window_counts_over_batches(guest: Guest, alive: LifeFactory) -> None:
    requests = [write(guest, number, number, A) for number in range(3)]
    guest.live(Life.serve)
    check_written(guest.answer())
    life = alive(guest)
    found = []
    for request in (requests[0], requests[0], requests[1], requests[2]):
        guest.submit(request)
        life.serve()
        found += results(guest.answer())
    assert found == [OK, OK, OK, COUNT]


def test_broken_chains_count_too(guest: Guest) -> None:
    requests = [write(guest, number, number, A) for number in range(2)]
    guest.live(Life.serve)
    check_written(guest.answer())
    guest.ring.offer(200)  # a descriptor of no length
    guest.submit(requests[1])
    guest.submit(requests[0])
    guest.live(Life.serve)
    assert [frame.result for answer in guest.answers() for frame in answer] == [OK, COUNT]


def test_reset_of_the_device_ends_the_window(guest: Guest, alive: LifeFactory) -> None:
    request = write(guest, 0, 0, A)
    guest.live(*DEATH)
    life = alive(guest)
    life.device.reset()
    life.serve()
    assert results(guest.answer()) == [COUNT]
    life.stop()
    guest.submit(request)
    assert results(guest.serve()) == [COUNT]


def test_writes_that_cannot_be_made_durable_do_not_stop_replays(
    guest: Guest, alive: LifeFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(guest, 0, 0, A)
    guest.live(*DEATH)
    write(guest, 1, 1, A)
    life = alive(guest)
    monkeypatch.setattr(life.store, "commit", lambda *_: False)
    life.serve()
    frames = guest.answer()
    assert [(frame.result, frame.write_counter) for frame in frames] == [(OK, 1), (WRITE, 1)]


@pytest.mark.parametrize("strict", [False, True])
def test_last_writes_of_a_device(make_guest: GuestFactory, strict: bool) -> None:
    """The expired bit is judged by the counter of the answer, not by the present one."""
    guest = make_guest(strict=strict)
    guest.initial_counter = LAST - 2
    lives.keyed(guest)
    guest.initial_counter = None
    for number in range(4):
        write(guest, LAST - 2 + min(number, 2), number, A)
    guest.live(*DEATH)
    full = EXPIRED if strict else WRITE | EXPIRED
    frames = guest.serve()
    assert results(frames) == [OK, EXPIRED, full, full]
    assert [frame.write_counter for frame in frames] == [LAST - 1, LAST, LAST, LAST]


def test_last_write_with_a_changed_frame_fails_as_expired(make_guest: GuestFactory) -> None:
    guest = make_guest()
    guest.initial_counter = LAST - 1
    lives.keyed(guest)
    guest.initial_counter = None
    chain = guest.submit(write_data(LAST - 1, 0, A) + read_result())
    guest.live(*DEATH)
    guest.memory.write(chain.readable.address + spec.FRAME_DATA, b"B")
    assert results(guest.serve()) == [WRITE | EXPIRED]


def test_result_of_an_expired_device_without_a_key(make_guest: GuestFactory) -> None:
    guest = make_guest()
    guest.initial_counter = LAST
    write(guest, LAST, 0, A)
    assert results(guest.serve()) == [NO_KEY | EXPIRED]


def test_batch_that_memory_was_lost_under_is_answered_by_the_same_process(
    keyed: Rig, raw: RawGuest
) -> None:
    """Committed, but the driver's memory was truncated before the publication."""
    rig = keyed
    requests = [write_data(number, number, A) for number in range(2)]
    raw.fill(lay_out([*requests, read_result()]))
    raw.share()
    raw.start()
    commit = rig.store.commit

    def lose(*arguments: object) -> bool:
        done = commit(*arguments)  # type: ignore[arg-type]
        os.ftruncate(raw.fd, 0)
        return done

    rig.store.commit = lose  # type: ignore[method-assign,assignment]
    assert rig.device.process(raw.queue) & BROKEN
    rig.store.commit = commit  # type: ignore[method-assign]
    assert rig.store.counter == 2
    raw.fill(lay_out([*requests, read_result()]))
    raw.share()
    raw.start()
    assert not rig.device.process(raw.queue) & BROKEN
    assert raw.used_index() == 3
    assert rig.store.counter == 2
    assert rig.chain(read_result())[0].result == OK
    assert results(rig.chain(write_data(1, 1, A) + read_result())) == [COUNT]
