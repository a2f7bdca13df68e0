# SPDX-License-Identifier: Apache-2.0
"""Guest memory on both engines."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support.rig import RigFactory
from vhost_rpmb.engine import Engine
from vhost_rpmb.virtio.flags import BROKEN

PAGE = mmap.PAGESIZE


@pytest.fixture
def memory(engine: Engine) -> Iterator[Any]:
    memory = engine.GuestMemory()
    yield memory
    memory.clear()


@pytest.fixture
def fd() -> Iterator[int]:
    """A memfd of 8 pages, each filled with its number."""
    fd = os.memfd_create("guest")
    os.write(fd, b"".join(bytes([number]) * PAGE for number in range(8)))
    yield fd
    os.close(fd)


def test_reads_and_writes_by_guest_physical_address(memory: Any, fd: int) -> None:
    memory.add_region(0x10000, 2 * PAGE, 0x7F0000000000, PAGE, fd)
    assert memory.read(0x10000, 3) == b"\1\1\1"
    assert memory.read(0x10000 + 2 * PAGE - 2, 2) == b"\2\2"
    memory.write(0x10001, b"ab")
    assert os.pread(fd, 4, PAGE) == b"\1ab\1"
    assert memory.read(0x10000, 0) == b""


def test_range_may_span_regions_that_adjoin(memory: Any, fd: int) -> None:
    memory.add_region(0x20000 + PAGE, PAGE, 0x1000, 5 * PAGE, fd)
    memory.add_region(0x20000, PAGE, 0x9000, 2 * PAGE, fd)
    assert memory.read(0x20000 + PAGE - 1, 2) == b"\2\5"
    memory.write(0x20000 + PAGE - 1, b"xy")
    assert os.pread(fd, 1, 3 * PAGE - 1) + os.pread(fd, 1, 5 * PAGE) == b"xy"


@pytest.mark.parametrize(
    ("address", "length"),
    [
        (0xFFFF, 1),
        (0xFFFF, 2),
        (0x10000 + 2 * PAGE, 1),
        (0x10000 + 2 * PAGE - 1, 2),
        (0x10000, 2 * PAGE + 1),
        (0, 1),
        (2**64 - 1, 2),
        (2**64 - 1, 1),
    ],
)
def test_range_outside_is_refused_and_nothing_is_written(
    memory: Any, engine: Engine, fd: int, address: int, length: int
) -> None:
    memory.add_region(0x10000, 2 * PAGE, 0x7F0000000000, 0, fd)
    with pytest.raises(Exception, match="outside every memory region"):
        memory.read(address, length)
    before = os.pread(fd, 8 * PAGE, 0)
    with pytest.raises(Exception, match="outside every memory region"):
        memory.write(address, b"z" * length)
    assert os.pread(fd, 8 * PAGE, 0) == before


def test_hole_between_regions_is_outside(memory: Any, fd: int) -> None:
    memory.add_region(0x10000, PAGE, 0, 0, fd)
    memory.add_region(0x10000 + 2 * PAGE, PAGE, 2 * PAGE, 0, fd)
    with pytest.raises(Exception, match="outside"):
        memory.read(0x10000, 3 * PAGE)


@pytest.mark.parametrize(
    ("region", "rule"),
    [
        ((0x10000, 0, 0, 0), "empty"),
        ((2**64 - PAGE, PAGE, 0, 0), "end of the address space"),
        ((0x10000, PAGE, 2**64 - PAGE, 0), "end of the address space"),
        ((0x10000, 2**64 - PAGE, 0, 0), "address space|end of its file"),
        ((0x10000, PAGE, 0, 8 * PAGE), "end of its file"),
        ((0x10000, PAGE, 0, 7 * PAGE + 1), "end of its file"),
        ((0x10000, PAGE, 0, 2**64 - PAGE), "end of its file"),
        ((0x40000, PAGE, 0, 0), "overlaps"),
        ((0x40000 - 1, 2, 0, 0), "overlaps"),
        ((0x40000 + 2 * PAGE - 1, 1, 0, 0), "overlaps"),
        ((0x40000 - PAGE, 4 * PAGE, 0, 0), "overlaps"),
        ((0x40000 + PAGE, 1, 0, 0), "overlaps"),
    ],
)
def test_region_that_breaks_a_rule_is_refused(
    memory: Any, fd: int, region: tuple[int, int, int, int], rule: str
) -> None:
    memory.add_region(0x40000, 2 * PAGE, 0x40000, 0, fd)
    with pytest.raises(ValueError, match=rule):
        memory.add_region(*region, fd)
    assert memory.regions == ((0x40000, 2 * PAGE, 0x40000),)


def test_descriptor_that_cannot_be_mapped_is_an_os_error(memory: Any) -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match=r"."):
        memory.add_region(0x10000, PAGE, 0, 0, reading)
    with pytest.raises(OSError, match=r"."):
        memory.add_region(0x10000, PAGE, 0, 0, 12345)
    os.close(reading)
    os.close(writing)
    assert memory.regions == ()


def test_offset_inside_a_page_is_mapped_right(memory: Any, fd: int) -> None:
    memory.add_region(0x10000, PAGE, 0, PAGE - 1, fd)
    assert memory.read(0x10000, 2) == b"\0\1"


def test_regions_are_counted(engine: Engine, fd: int) -> None:
    memory = engine.GuestMemory(2)
    memory.add_region(0x10000, PAGE, 0x10000, 0, fd)
    memory.add_region(0x30000, PAGE, 0x30000, 0, fd)
    with pytest.raises(ValueError, match="2 memory regions already"):
        memory.add_region(0x50000, PAGE, 0x50000, 0, fd)
    memory.remove_region(0x10000, PAGE, 0x10000)
    memory.add_region(0x50000, PAGE, 0x50000, 0, fd)
    assert [region[0] for region in memory.regions] == [0x30000, 0x50000]
    memory.clear()
    assert memory.regions == ()


def test_509_regions_are_found(memory: Any, fd: int) -> None:
    for number in range(509):
        memory.add_region(number * 2 * PAGE, PAGE, number * 2 * PAGE, number % 8 * PAGE, fd)
    for number in range(509):
        assert memory.read(number * 2 * PAGE, 1) == bytes([number % 8])
        with pytest.raises(Exception, match="outside"):
            memory.read(number * 2 * PAGE + PAGE, 1)


def test_regions_have_64_tib_at_most(memory: Any) -> None:
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 40 << 40)
    memory.add_region(0, 40 << 40, 0, 0, fd)
    with pytest.raises(ValueError, match="more than 64 TiB"):
        memory.add_region(40 << 40, (24 << 40) + PAGE, 40 << 40, 0, fd)
    memory.add_region(40 << 40, PAGE, 40 << 40, 0, fd)
    os.close(fd)


@pytest.mark.parametrize("offset", [0, PAGE - 1])
def test_mappings_made_anew_have_the_same_memory(memory: Any, offset: int) -> None:
    """Of a file touched in more places than page tables are kept for, in two regions."""
    step = 2 << 20
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 4000 * step)
    memory.add_region(0, 2000 * step, 0, offset, fd)
    memory.add_region(2000 * step, 1000 * step, 2000 * step, 2000 * step + offset, fd)
    before = mappings("memfd:sparse")
    for number in range(3000):
        memory.write(number * step, number.to_bytes(4))
    for number in (*range(0, 3000, 7), 2999):
        assert os.pread(fd, 4, number * step + offset) == number.to_bytes(4)
        assert memory.read(number * step, 4) == number.to_bytes(4)
    os.pwrite(fd, b"mark", offset)
    assert memory.read(0, 4) == b"mark"
    assert mappings("memfd:sparse") == before
    os.close(fd)


@pytest.mark.parametrize("key", [(0x10000, PAGE, 1), (0x10000, 1, 0), (0x10001, PAGE, 0)])
def test_region_is_removed_by_all_three_values(
    memory: Any, fd: int, key: tuple[int, int, int]
) -> None:
    memory.add_region(0x10000, PAGE, 0, 0, fd)
    with pytest.raises(ValueError, match="no such memory region"):
        memory.remove_region(*key)
    memory.remove_region(0x10000, PAGE, 0)
    assert memory.regions == ()


def mappings(name: str = "memfd:leak") -> int:
    with open("/proc/self/maps") as maps:
        return sum(name in line for line in maps)


def test_nothing_stays_mapped_or_open(engine: Engine) -> None:
    fd = os.memfd_create("leak")
    os.ftruncate(fd, 8 * PAGE)
    descriptors = len(os.listdir("/proc/self/fd"))
    memory = engine.GuestMemory()
    memory.add_region(0, PAGE, 0, 0, fd)
    memory.add_region(PAGE * 4, PAGE, 0, PAGE, fd)
    assert mappings() == 2
    memory.remove_region(0, PAGE, 0)
    assert mappings() == 1
    memory.clear()
    assert mappings() == 0
    memory.add_region(0, PAGE, 0, 0, fd)
    del memory
    assert mappings() == 0
    assert len(os.listdir("/proc/self/fd")) == descriptors
    os.close(fd)


@pytest.mark.parametrize("offset", [(1 << 63) - 4096, 1 << 63, (1 << 64) - 4096])
def test_region_outside_of_a_file_is_refused(make_rig: RigFactory, offset: int) -> None:
    rig = make_rig()
    with pytest.raises((ValueError, OSError)):
        rig.memory.add_region(1 << 40, 8192, 1 << 40, offset, rig.guest.regions[0].fd)
    assert not rig.device.process(rig.queue) & BROKEN
