# SPDX-License-Identifier: Apache-2.0
"""Each durable write is answered OK exactly once, wherever the process is killed."""

from __future__ import annotations

import mmap
import os
import random
import shutil
import signal
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.campaign import DIVISOR
from tests.support.homes import Files, Home
from tests.support.lives import DEATH, Guest, Life, keyed
from tests.support.oracle import (
    AUTH,
    BLOCK_SIZE,
    COUNT,
    FRAME_SIZE,
    OK,
    OTHER_KEY,
    program_key,
    read_counter,
    read_result,
    split,
    write_data,
)
from tests.support.stores import step, stop_at_changes, trace_me
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.store import MAX_PENDING
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths

LIVES = 600 // DIVISOR  # on each engine
SAMPLE = 40 if DIVISOR == 1 else 8  # of the states that stores leave
MOST_BLOCKS = 32
TOO_FAR = 100_000  # ahead of every write counter


@pytest.fixture
def guest(engine: Engine, home: Home) -> Iterator[Guest]:
    guest = Guest(engine, home)
    guest.journal = mmap.mmap(-1, 64)
    yield keyed(guest)
    guest.close()


class Expected(NamedTuple):
    """What a chain has to be answered, once: its result, and the counter of a write."""

    result: int | None  # None: no answer
    counter: int | None = None


class Driver:
    """A pipelining driver with a model of the device."""

    def __init__(self, guest: Guest, seed: int) -> None:
        self.guest = guest
        self.source = random.Random(seed)
        self.counter = 0
        self.image = bytearray(spec.CAPACITY_UNIT)
        self.expected: deque[Expected] = deque()
        self.answered = 0  # writes

    def submit(self) -> None:
        source = self.source
        kind = source.choice(("write", "write", "write", "silent", "forged", "early", "counter"))
        count = source.choice((1, 1, 1, 2, 8, MOST_BLOCKS))
        address = source.randrange(spec.CAPACITY_UNIT // BLOCK_SIZE - count + 1)
        blocks = [source.randbytes(BLOCK_SIZE) for _ in range(count)]
        if kind == "counter":
            self._add(read_counter(), Expected(OK))
        elif kind == "forged":
            request = write_data(self.counter, address, *blocks, key=OTHER_KEY)
            self._add(request + read_result(), Expected(AUTH))
        elif kind == "early":
            request = write_data(self.counter + TOO_FAR, address, *blocks)
            self._add(request + read_result(), Expected(COUNT))
        else:
            request = write_data(self.counter, address, *blocks)
            start = address * BLOCK_SIZE
            self.image[start : start + count * BLOCK_SIZE] = b"".join(blocks)
            self.counter += 1
            if kind == "write":
                self._add(request + read_result(), Expected(OK, self.counter))
            else:
                self._add(request, Expected(None))
                self._add(read_result(), Expected(OK, self.counter))

    def _add(self, request: bytes, expected: Expected) -> None:
        self.guest.submit(request, room=expected.result is not None)
        self.expected.append(expected)

    def check(self) -> None:
        """Compare what was answered since the last time, in order."""
        for answer in self.guest.answers():
            expected = self.expected.popleft()
            if expected.result is None:
                assert answer == []
                continue
            (frame,) = answer
            assert frame.result == expected.result
            if expected.counter is not None:
                assert frame.write_counter == expected.counter
                self.answered += 1


def die_at(number: int) -> Sequence[Callable[[Life], None]]:
    """Be killed after the n-th commit, if there are so many."""

    def arm(life: Life) -> None:
        life.before_publication(lambda: os.kill(os.getpid(), signal.SIGKILL), number)

    return arm, Life.serve


FATES: Sequence[Sequence[Callable[[Life], None]]] = (
    DEATH,
    DEATH,
    die_at(2),
    (Life.serve,),
    (Life.serve, Life.stop),
    (Life.stop,),
    (),
)


@pytest.mark.timeout(300 + 3 * LIVES)
def test_each_write_is_answered_once(guest: Guest) -> None:
    driver = Driver(guest, seed=11)
    for _ in range(LIVES):
        for _ in range(driver.source.choice((0, 1, 2, 7, 30))):
            if guest.ring.free_descriptors > 2:
                driver.submit()
        guest.live(*driver.source.choice(FATES))
        driver.check()
    guest.live(Life.serve)
    driver.check()
    assert not driver.expected
    assert driver.answered > LIVES
    store = guest.home.open(None, None)
    assert store.counter == driver.counter
    assert bytes(store.image) == driver.image
    store.close()


# Every store into memory that survives


class Survivors:
    """The memory that survives a process: used ring, answers, and the journal."""

    def __init__(self, guest: Guest, answers: Sequence[int]) -> None:
        ring = guest.ring
        places = [(ring.used_ring, 6 + 8 * ring.size), *((place, FRAME_SIZE) for place in answers)]
        (region,) = guest.memory.regions
        assert guest.journal is not None
        self._views = [
            *(region.view[place - region.start :][:length] for place, length in places),
            memoryview(guest.journal),
        ]
        self.states = [self.look()]  # after each store

    def look(self) -> bytes:
        return b"".join(self._views)

    def note(self) -> None:
        if (state := self.look()) != self.states[-1]:
            self.states.append(state)

    def restore(self, state: bytes) -> None:
        for view in self._views:
            view[:], state = state[: len(view)], state[len(view) :]

    def release(self) -> None:
        for view in self._views:
            view.release()


class Batch(NamedTuple):
    """What the process executes whose stores are stepped through."""

    writes: int
    blocks: int = 1  # of each write
    key: bool = False  # programmed in the same batch
    checkpoint: bool = False  # its commit has to make room first
    replayed: bool = False  # an earlier process committed it

    def name(self) -> str:
        """The name of its test."""
        kinds = [kind for kind in ("key", "checkpoint", "replayed") if getattr(self, kind)]
        return "-".join([f"{self.writes}x{self.blocks}", *kinds])


def step_through(
    guest: Guest, survivors: Survivors, batch: Batch, save: Callable[[], None]
) -> None:
    """Step through a process from its commit to its end; note what each store leaves behind.

    ``save`` is called after the commit. The replay of a batch, which commits nothing, is stepped
    through from its beginning.
    """
    pure = guest.engine.name == "pure"
    child = os.fork()
    if not child:
        try:
            life = Life(guest)
            if batch.checkpoint:
                fill_up(life)

            def begin() -> None:
                if pure:
                    stop_at_changes(survivors.look)
                else:
                    trace_me()
                signal.raise_signal(signal.SIGSTOP)

            if batch.replayed:
                begin()
            else:
                life.before_publication(begin)
            life.serve()
            os._exit(0)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, os.WUNTRACED)
    assert os.WIFSTOPPED(status), "the process failed"
    save()
    while os.WIFSTOPPED(status):
        survivors.note()
        status = resume(child) if pure else step(child)
    assert os.waitstatus_to_exitcode(status) == 0, "the process failed"


def resume(child: int) -> int:
    """Let a stopped child continue until it stops itself or ends."""
    os.kill(child, signal.SIGCONT)
    return os.waitpid(child, os.WUNTRACED)[1]


def fill_up(life: Life) -> None:
    """Leave no room for a batch: its commit moves the pending blocks into the image."""
    blocks = [(spec.CAPACITY_UNIT // BLOCK_SIZE - 1, bytes(BLOCK_SIZE))] * (MAX_PENDING - 1)
    assert life.store.commit(life.store.counter, blocks, None)


@pytest.mark.needs_ptrace
@pytest.mark.usefixtures("untraced")
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "batch",
    [
        Batch(1, blocks=MOST_BLOCKS),
        Batch(2, key=True),
        Batch(2, checkpoint=True),
        Batch(2, replayed=True),
        Batch(2, key=True, replayed=True),
        pytest.param(Batch(64), marks=pytest.mark.long),
        pytest.param(Batch(64, replayed=True), marks=pytest.mark.long),
        pytest.param(Batch(16, MOST_BLOCKS, checkpoint=True), marks=pytest.mark.long),
    ],
    ids=Batch.name,
)
def test_killed_at_every_store_of_the_publication(
    engine: Engine, flash: Path, batch: Batch, tmp_path: Path
) -> None:
    """The answers are there, or the chains are executed again; the result register as well."""
    with Guest(engine, Files(flash), size=512) as guest:
        guest.journal = mmap.mmap(-1, 64)
        if not batch.key:
            keyed(guest)
        base = guest.ring.used_index
        submitted = [guest.submit(program_key() + read_result())] if batch.key else []
        for number in range(batch.writes):
            data = [bytes([number + 1]) * BLOCK_SIZE] * batch.blocks
            submitted.append(guest.submit(write_data(number, number, *data) + read_result()))
        published = base + len(submitted)
        reading = guest.submit(read_result())
        set_available(guest, published)
        survivors = Survivors(guest, [each.writable[0].address for each in (*submitted, reading)])
        if batch.replayed:
            guest.live(*DEATH)
        saved = tmp_path / "saved"
        saved.mkdir()

        def save() -> None:
            for path in flash.parent.glob("flash.img*"):
                shutil.copy2(path, saved)
            if batch.checkpoint:
                assert verify(Paths.resolve(str(saved / flash.name))).pending == []

        step_through(guest, survivors, batch, save)
        states = survivors.states
        indices = [int.from_bytes(state[2:4], "little") for state in states]
        # Used elements and answers come first, then one store publishes the batch.
        assert set(indices) == {base, published}
        assert indices == sorted(indices)
        border = indices.index(published)
        assert border > 2 * len(submitted)
        spread = range(0, border, max(border // SAMPLE, 1))
        for number in sorted({0, border - 1, border, len(states) - 1, *spread}):
            survivors.restore(states[number])
            set_available(guest, published)
            for path in saved.iterdir():
                shutil.copy2(path, flash.parent)
            guest.live(Life.serve)
            assert guest.ring.used_index == published
            for index, chain in enumerate(submitted):
                element = guest.ring.used_element((base + index) % guest.ring.size)
                assert element == (chain.head, FRAME_SIZE)
                assert_written(guest, chain.writable[0].address, index + (not batch.key))
            set_available(guest, published + 1)
            guest.live(Life.serve)
            assert_written(guest, reading.writable[0].address, batch.writes)
        assert verify(Paths.resolve(str(flash))).counter == batch.writes
        survivors.release()


def set_available(guest: Guest, index: int) -> None:
    """Set the available index without the driver's knowledge."""
    guest.memory.store16(guest.ring.available_ring + 2, index)


def assert_written(guest: Guest, address: int, counter: int) -> None:
    (frame,) = split(guest.memory.read(address, FRAME_SIZE))
    assert (frame.result, frame.write_counter) == (OK, counter)
