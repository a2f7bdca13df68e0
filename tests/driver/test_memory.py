# SPDX-License-Identifier: Apache-2.0
"""Guest memory as the driver allocates, reads and writes it."""

from __future__ import annotations

import os
import secrets
from itertools import pairwise

import pytest

from tests.support.driver import KIB, MIB, THREE_REGIONS
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.vhost_user.wire import MemoryRegion

pytestmark = pytest.mark.usefixtures("no_leaks")


def test_allocations_are_aligned_disjoint_and_inside_one_region() -> None:
    with GuestMemory(THREE_REGIONS) as memory:
        taken = []
        for size in (1, 7, 4096, 600 * KIB, 600 * KIB, 600 * KIB):
            address = memory.allocate(size, 16)
            assert address % 16 == 0
            taken.append((address, address + size))
            assert any(
                region.start <= address and address + size <= region.end
                for region in memory.regions
            )
        taken.sort()
        assert all(low[1] <= high[0] for low, high in pairwise(taken))
        with pytest.raises(MemoryError, match="no 614400 free bytes"):
            memory.allocate(600 * KIB)


def test_freed_memory_is_merged() -> None:
    with GuestMemory(THREE_REGIONS) as memory:
        addresses = [memory.allocate(256 * KIB) for _ in range(12)]
        for address in addresses[::2] + addresses[1::2]:
            memory.free(address)
        for size in (768 * KIB, MIB):
            addresses = sorted(memory.allocate(size) for _ in range(3))
            assert addresses == [region.guest_address for region in THREE_REGIONS]
            for address in addresses:
                memory.free(address)


def test_reserve_takes_exact_bytes_across_adjoining_regions_once() -> None:
    with GuestMemory(THREE_REGIONS) as memory:
        memory.reserve(0x0020_0000 - 100, 512)
        with pytest.raises(MemoryError, match="not free"):
            memory.reserve(0x0020_0000 + 411, 2)
        memory.reserve(0x0020_0000 + 412, 2)
        with pytest.raises(MemoryError, match="not free"):  # a hole between regions
            memory.reserve(0x0030_0000 - 1, 2)
        memory.free(0x0020_0000 - 100)
        memory.reserve(0x0020_0000 - 100, 512)


def test_reads_and_writes_span_adjoining_regions() -> None:
    data = secrets.token_bytes(1000)
    with GuestMemory(THREE_REGIONS) as memory:
        memory.write(0x0020_0000 - 300, data)
        assert memory.read(0x0020_0000 - 300, 1000) == data
        assert memory.read(0x0020_0000, 700) == data[300:]
        with pytest.raises(IndexError, match="in no memory region"):
            memory.read(0x0030_0000 - 10, 11)


def test_mmap_offset_is_applied() -> None:
    with GuestMemory(THREE_REGIONS) as memory:
        memory.write(0x0020_0010, b"shared")
        assert os.pread(memory.regions[1].fd, 6, 64 * KIB + 0x10) == b"shared"
        assert memory.user_address(0x0020_0010) == 0x6F00_0000_0010


def test_16_bit_accesses_are_little_endian() -> None:
    with GuestMemory() as memory:
        address = memory.allocate(4, 2)
        memory.store16(address + 2, 0x1234)
        assert memory.read(address, 4) == b"\0\0\x34\x12"
        memory.write(address, b"\xcd\xab")
        assert memory.load16(address) == 0xABCD


def test_region_that_cannot_be_mapped_leaves_nothing_open() -> None:
    with pytest.raises((OSError, ValueError)):
        GuestMemory((THREE_REGIONS[0], MemoryRegion(0, 4 * KIB, 0, 1)))
