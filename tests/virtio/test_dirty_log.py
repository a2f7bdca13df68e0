# SPDX-License-Identifier: Apache-2.0
"""Dirty logging in both engines: pages are marked, atomically, and no others."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.support.dirty import DirtyMap
from tests.support.rig import Rig, RigFactory
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio import limits
from vhost_rpmb.virtio.spec import VHOST_LOG_PAGE as PAGE

PAGES = 64
SMALL, LOST = "no bit for some of the pages", "file behind it was truncated"
BORDER = 8 * 7 + 3  # a page in the last byte of the log


class Marked:
    """Guest memory of an engine with a dirty log."""

    def __init__(self, engine: Engine, log: DirtyMap) -> None:
        self.log = log
        self.memory: Any = engine.GuestMemory()
        self.bits: Any = engine.GuestMemory(1)
        size, offset = log.description
        self.bits.add_region(0, size, 0, offset, log.fd)
        self.memory.set_log(self.bits, True)

    def close(self) -> None:
        self.memory.clear()
        self.bits.clear()

    def marks(self, address: int, length: int) -> set[int]:
        """The pages that one call has marked."""
        self.memory.mark(address, length)
        return self.log.take()


@pytest.fixture(params=[0, 1, 2, 3, mmap.PAGESIZE + 5], ids="offset-{}".format)
def marked(engine: Engine, request: pytest.FixtureRequest) -> Iterator[Marked]:
    with DirtyMap(PAGES // 8, request.param) as log:
        made = Marked(engine, log)
        yield made
        made.close()


@pytest.fixture
def fd() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, PAGES * PAGE)
    yield fd
    os.close(fd)


def test_each_page_has_its_bit(marked: Marked) -> None:
    for page in range(PAGES):
        before = marked.log.file
        assert marked.marks(page * PAGE, 1) == {page}
        assert marked.log.file == before  # cleared again, and nothing beside it was touched
        assert marked.marks(page * PAGE + PAGE - 1, 1) == {page}
    assert not marked.memory.log_fault


@pytest.mark.parametrize(
    ("address", "length", "pages"),
    [
        (PAGE - 1, 2, {0, 1}),
        (0, 1, {0}),
        (1, PAGE, {0, 1}),
        (6 * PAGE, 4 * PAGE, {6, 7, 8, 9}),
        (6 * PAGE, 4 * PAGE + 1, {6, 7, 8, 9, 10}),
        (0, PAGES * PAGE, set(range(PAGES))),
    ],
)
def test_range_marks_all_of_its_pages(
    marked: Marked, address: int, length: int, pages: set[int]
) -> None:
    assert marked.marks(address, length) == pages


def test_write_marks_what_it_changed(marked: Marked, fd: int) -> None:
    marked.memory.add_region(8 * PAGE, 4 * PAGE, 0, 0, fd)
    marked.memory.add_region(12 * PAGE, PAGE, 1 << 40, 4 * PAGE, fd)
    marked.memory.write(8 * PAGE, b"x")
    assert marked.log.take() == {8}
    marked.memory.write(12 * PAGE - 1, b"xy")  # over the border of two regions
    assert marked.log.take() == {11, 12}
    marked.memory.write(8 * PAGE, b"")
    assert marked.log.take() == set()
    with pytest.raises(Exception, match="outside every memory region"):
        marked.memory.write(13 * PAGE - 1, b"xy")
    assert marked.log.take() == set()
    marked.memory.read(8 * PAGE, 5 * PAGE)
    assert marked.log.take() == set()


def test_without_a_log_nothing_is_marked(marked: Marked, fd: int) -> None:
    marked.memory.add_region(0, PAGE, 0, 0, fd)
    marked.memory.set_log(None)
    marked.memory.write(0, b"x")
    assert marked.marks(0, 1) == set()
    assert not marked.memory.take_marked()


def test_writes_are_marked_on_request(marked: Marked, fd: int) -> None:
    marked.memory.add_region(0, PAGE, 0, 0, fd)
    marked.memory.set_log(marked.bits, False)
    marked.memory.write(0, b"x")
    assert marked.log.take() == set()
    assert marked.marks(0, 1) == {0}
    marked.memory.set_log(marked.bits, True)
    marked.memory.write(0, b"x")
    assert marked.log.take() == {0}


def test_log_outlives_the_memory_table(marked: Marked, fd: int) -> None:
    marked.memory.clear()
    marked.memory.add_region(0, PAGE, 0, 0, fd)
    marked.memory.write(0, b"x")
    assert marked.log.take() == {0}


def test_marks_are_noticed_once(marked: Marked) -> None:
    assert not marked.memory.take_marked()
    marked.memory.mark(0, 1)
    assert marked.memory.take_marked()
    assert not marked.memory.take_marked()


@pytest.mark.parametrize(
    ("address", "length", "pages"),
    [
        (PAGES * PAGE, 1, set()),
        (PAGES * PAGE - 1, 2, {PAGES - 1}),
        (0, PAGES * PAGE + 1, set(range(PAGES))),
        (2**64 - 1, 1, set()),
        (2**64 - PAGE, PAGE, set()),
        (limits.LOG_ADDRESS_END - 1, 2, set()),
    ],
)
def test_page_without_a_bit_is_left_out(
    marked: Marked, address: int, length: int, pages: set[int]
) -> None:
    before = marked.log.file
    assert marked.marks(address, length) == pages
    assert marked.log.file == before
    assert SMALL in marked.memory.log_fault
    assert marked.marks(0, 1) == {0}
    assert SMALL in marked.memory.log_fault
    marked.memory.set_log(marked.bits, True)
    assert not marked.memory.log_fault


def test_truncated_log_is_reported(engine: Engine, fd: int) -> None:
    """As guest memory: the process goes on, and nothing of it is lost."""
    with DirtyMap(2 * mmap.PAGESIZE) as log:
        marked = Marked(engine, log)
        marked.memory.add_region(0, PAGE, 0, 0, fd)
        os.ftruncate(log.fd, mmap.PAGESIZE)
        marked.memory.mark(0, 1)
        assert os.pread(log.fd, 1, 0) == b"\1"
        assert not marked.memory.log_fault
        marked.memory.mark(8 * PAGE * mmap.PAGESIZE, 1)
        assert LOST in marked.memory.log_fault
        marked.memory.write(0, b"x")
        assert os.pread(fd, 1, 0) == b"x"
        assert marked.memory.read(0, 1) == b"x"
        marked.close()


def test_log_of_a_large_memory_keeps_few_page_tables(engine: Engine) -> None:
    """Marks all over a log of 8 GiB, for 256 TiB of memory."""
    size = 8 << 30
    memory: Any = engine.GuestMemory()
    bits: Any = engine.GuestMemory(1)
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, size)
    bits.add_region(0, size, 0, 0, fd)
    memory.set_log(bits)
    before = page_tables()
    for place in range(0, size, 2 << 20):
        memory.mark(place * 8 * PAGE, 1)
    assert os.pread(fd, 1, size - (2 << 20)) == b"\1"
    assert page_tables() - before < 8 << 10
    assert not memory.log_fault
    bits.clear()
    os.close(fd)


def page_tables() -> int:
    """The page tables of this process in KiB."""
    with open("/proc/self/status") as status:
        (line,) = [line for line in status if line.startswith("VmPTE:")]
    return int(line.split()[1])


# The other writer of the same byte: a process that sets and clears a bit of its own until page STOP
# is marked, and counts how often that had no effect.
STOP = 24
OTHER = """
import ctypes, mmap, sys
from tests.support.dirty import DirtyMap

class Other(DirtyMap):
    def __init__(self, fd, size):
        self._map, self._offset = mmap.mmap(fd, size), 0
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

fd, size, page, stop = map(int, sys.argv[1:])
log = Other(fd, size)
bits, byte, mask = log._map, page // 8, 1 << page % 8
turns = lost = 0
print("ready", flush=True)
while not bits[stop // 8]:
    log.set(page)
    lost += not bits[byte] & mask
    log.clear(page)
    lost += bool(bits[byte] & mask)
    turns += 1
print(turns, lost, flush=True)
"""


@pytest.mark.parametrize("page", [BORDER, 0])
def test_two_writers_lose_no_bit_of_a_byte(engine: Engine, page: int) -> None:
    """The byte is also the last one of the log, which ends within a word."""
    mine = page ^ 1
    with DirtyMap(8) as log, ExitStack() as stack:
        marked = Marked(engine, log)
        stack.callback(marked.close)
        other = stack.enter_context(
            subprocess.Popen(
                [sys.executable, "-c", OTHER, *map(str, (log.fd, 8, page, STOP))],
                pass_fds=(log.fd,),
                stdout=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(other.kill)
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        lost = 0
        start = time.process_time()
        while time.process_time() - start < 2:
            for _ in range(200):
                for _ in range(20):
                    marked.memory.mark(mine * PAGE, 1)
                lost += mine not in log.pages
                log.clear(mine)
                lost += mine in log.pages
        log.set(STOP)
        turns, others = map(int, other.stdout.readline().split())
        assert (lost, others) == (0, 0)
        assert turns > 1000


# The ring


@pytest.fixture
def logged(make_rig: RigFactory, engine: Engine) -> Iterator[tuple[Rig, DirtyMap]]:
    """A device whose ring and answers are marked in a log that has a ring elsewhere."""
    rig = make_rig()
    rig.guest.allocate(PAGE)  # between the ring and all buffers
    with DirtyMap(1 << 16) as log:
        bits: Any = engine.GuestMemory(1)
        bits.add_region(0, log.description.mmap_size, 0, 0, log.fd)
        rig.memory.set_log(bits, True)
        yield rig, log
        bits.clear()


ELSEWHERE = 0x10_0000


def test_used_ring_is_marked_at_its_log_address(logged: tuple[Rig, DirtyMap]) -> None:
    """Which need not be in guest memory."""
    rig, log = logged
    rig.queue.mark_ring(ELSEWHERE + 0x800)
    rig.program()
    pages = log.take()
    assert ELSEWHERE // PAGE in pages
    assert rig.ring.used_ring // PAGE not in pages
    assert len(pages) == 2  # with that of the answer
    rig.queue.mark_ring(None)
    rig.read(0)
    assert len(log.take()) == 1


def test_answers_and_ring_are_marked_independently(
    logged: tuple[Rig, DirtyMap], engine: Engine
) -> None:
    rig, log = logged
    rig.program()
    answer = log.take()
    assert len(answer) == 1
    rig.memory.set_log(None)
    rig.queue.mark_ring(ELSEWHERE)
    rig.read(0)
    assert log.take() == set()


@pytest.mark.parametrize("address", [limits.LOG_ADDRESS_END, 2**64 - 1])
def test_log_address_beyond_every_log_is_refused(rig: Rig, address: int) -> None:
    with pytest.raises(ValueError, match=f"a log address that a log reaches, found {address:#x}"):
        rig.queue.mark_ring(address)


def test_all_of_a_ring_is_marked_on_request(logged: tuple[Rig, DirtyMap]) -> None:
    rig, log = logged
    rig.queue.mark_written()
    assert log.take() == set()
    rig.queue.mark_ring(ELSEWHERE + PAGE - 100)
    rig.queue.mark_written()
    assert log.take() == {ELSEWHERE // PAGE, ELSEWHERE // PAGE + 1}
    rig.queue.reset()
    rig.queue.mark_written()
    assert log.take() == set()
