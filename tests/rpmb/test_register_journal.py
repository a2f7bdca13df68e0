# SPDX-License-Identifier: Apache-2.0
"""The result register survives with the connection: by a journal that the next process reads."""

from __future__ import annotations

import mmap
from pathlib import Path

import pytest

from tests.support.homes import Files
from tests.support.lives import DEATH, Guest, Life, LifeFactory, keyed, results
from tests.support.oracle import GENERAL, OK, A, read_counter, read_result, write_data
from tests.support.rig import Rig, make_image
from vhost_rpmb import engine as engines


def test_register_survives_with_the_connection(guest: Guest) -> None:
    guest.journal = mmap.mmap(-1, 64)
    guest.submit(write_data(0, 7, A), room=0)
    guest.live(Life.serve)
    guest.submit(read_result())
    guest.live(Life.serve)
    _, (frame,) = guest.answers()
    assert (frame.result, frame.write_counter, frame.address) == (OK, 1, 7)
    guest.submit(read_result())  # also by a process that wrote nothing itself
    assert results(guest.serve()) == [OK]


def test_register_is_that_of_the_last_published_batch(guest: Guest, alive: LifeFactory) -> None:
    """The batch that was committed, but not published, is not in it: it is executed again."""
    guest.journal = mmap.mmap(-1, 64)
    guest.submit(write_data(0, 7, A), room=0)
    guest.live(Life.serve)
    guest.submit(write_data(1, 8, A), room=0)
    guest.live(*DEATH)
    guest.ring.reset(guest.ring.used_index)
    guest.submit(read_result())
    (frame,) = guest.serve()
    assert (frame.result, frame.write_counter, frame.address) == (OK, 1, 7)


def test_register_of_another_used_index_is_not_restored(guest: Guest) -> None:
    guest.journal = mmap.mmap(-1, 64)
    guest.submit(write_data(0, 7, A), room=0)
    guest.live(Life.serve)
    guest.ring.reset(100)  # by a driver that lies about the used index
    guest.submit(read_result())
    assert results(guest.serve()) == [GENERAL]


def test_register_and_journal_are_cleared(guest: Guest, alive: LifeFactory) -> None:
    """By a new connection and by a reset of the device, also for the process after this one."""
    guest.journal = mmap.mmap(-1, 64)
    life = alive(guest)
    for clear in (life.device.clear_register, life.device.reset):
        guest.submit(write_data(life.store.counter, 7, A), room=0)
        life.serve()
        assert any(guest.journal[:])
        clear()
        assert not any(guest.journal[:])
        guest.submit(read_result())
        life.serve()
        _, (frame,) = guest.answers()
        assert frame.result == GENERAL
        life.device.restore_register(guest.ring.used_index)  # "none", as the last batch had it
        guest.submit(read_result())
        life.serve()
        assert results(guest.answer()) == [GENERAL]


def test_register_without_a_journal_ends_with_the_process(guest: Guest) -> None:
    guest.submit(write_data(0, 7, A), room=0)
    guest.live(Life.serve)
    guest.submit(read_result())
    guest.live(Life.serve)
    _, (frame,) = guest.answers()
    assert frame.result == GENERAL


@pytest.mark.parametrize("offset", [0, 8, 12, 14, 16, 18, 20, 24])
def test_damaged_journal_has_no_register(guest: Guest, alive: LifeFactory, offset: int) -> None:
    guest.journal = mmap.mmap(-1, 64)
    guest.submit(write_data(0, 7, A) + read_result())
    life = alive(guest)
    life.serve()
    assert results(guest.answer()) == [OK]
    written = bytes(guest.journal)
    for start in (0, 32):
        guest.journal[start + offset] ^= 1
    life.device.restore_register(guest.ring.used_index)
    guest.submit(read_result())
    life.serve()
    assert results(guest.answer()) == [GENERAL]
    guest.journal[:] = written
    life.device.journal = memoryview(guest.journal)
    life.device.restore_register(2)
    guest.submit(read_result())
    life.serve()
    assert results(guest.answer()) == [OK]


def test_both_engines_have_the_same_journal(flash: Path, tmp_path: Path) -> None:
    journals = []
    for number, name in enumerate(engines.ENGINES):
        guest = Guest(engines.load(name), Files(make_image(tmp_path / f"image{number}")))
        guest.journal = mmap.mmap(-1, 64)
        keyed(guest)
        written = []
        for request in (read_counter(), write_data(0, 7, A), write_data(9, 7, A)):
            guest.submit(request + read_result(), room=2)
            guest.live(Life.serve)
            written.append(bytes(guest.journal))
        journals.append(written)
        guest.close()
    assert journals[0] == journals[1]
    assert len(set(journals[0])) == 3


@pytest.mark.parametrize("size", [0, 63, 65])
def test_journal_of_a_wrong_size_is_refused(rig: Rig, size: int) -> None:
    with pytest.raises(ValueError, match="64 bytes"):
        rig.device.journal = memoryview(bytearray(size))


def test_journal_can_be_taken_away(rig: Rig) -> None:
    buffer = bytearray(64)
    rig.device.journal = memoryview(buffer)
    assert rig.device.journal is not None
    rig.program()
    assert any(buffer)
    rig.device.journal = None
    assert rig.device.journal is None
    before = bytes(buffer)
    rig.write(0, 0, A)
    assert bytes(buffer) == before
    rig.device.restore_register(rig.ring.used_index)
    assert rig.chain(read_result())[0].result == GENERAL
