# SPDX-License-Identifier: Apache-2.0
"""A dirty log as a front-end has it, and what is to be found in it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence

from vhost_rpmb import libc
from vhost_rpmb.closing import Closing
from vhost_rpmb.driver.memory import GuestMemory
from vhost_rpmb.vhost_user.wire import LogDescription
from vhost_rpmb.virtio.spec import VHOST_LOG_PAGE as PAGE

_FUTEX_OP_CLEAR_BIT = 3 | 8


def log_size(memory: GuestMemory) -> int:
    """The bytes of a log that has a bit for every page; not a multiple of 8, unless by chance."""
    return -(-memory.regions[-1].end // (8 * PAGE))


class DirtyMap(Closing):
    """The log: ``fd`` is its memfd, which begins ``offset`` bytes before it."""

    def __init__(self, size: int, offset: int = 0) -> None:
        self.description = LogDescription(size, offset)
        self.fd = os.memfd_create("dirty-log")
        os.ftruncate(self.fd, offset + size)
        self._map = mmap.mmap(self.fd, offset + size)
        self._offset = offset
        self._start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)

    @property
    def bits(self) -> bytes:
        return self._map[self._offset :]

    @property
    def file(self) -> bytes:
        """The whole file, with what does not belong to the log."""
        return self._map[:]

    @property
    def pages(self) -> set[int]:
        """The numbers of the marked pages."""
        return {
            8 * byte + bit
            for byte, bits in enumerate(self.bits)
            if bits
            for bit in range(8)
            if bits >> bit & 1
        }

    def take(self) -> set[int]:
        """Return the marked pages and clear their bits: first the bit, then the page is copied."""
        pages = self.pages
        for page in pages:
            self.clear(page)
        return pages

    def set(self, page: int) -> None:
        libc.atomic_set_bit(self._start + self._offset + page // 8, page % 8)

    def clear(self, page: int) -> None:
        """Clear a bit with one atomic access, as `libc.atomic_set_bit` sets one."""
        address = self._start + self._offset + page // 8
        word, byte = address & ~3, address & 3
        operation = _FUTEX_OP_CLEAR_BIT << 28 | (8 * byte + page % 8) << 12
        libc._call("futex", word, 5 | 128, 0, None, word, operation)


def pages_of(spans: Iterable[tuple[int, int]]) -> set[int]:
    """The pages of ranges of guest memory, given by address and length."""
    return {
        page
        for address, length in spans
        if length
        for page in range(address // PAGE, (address + length - 1) // PAGE + 1)
    }


def snapshot(memory: GuestMemory) -> list[bytes]:
    """The content of each region."""
    return [bytes(region.view) for region in memory.regions]


def changed_pages(memory: GuestMemory, before: Sequence[bytes]) -> set[int]:
    """The pages with bytes that are not those of a snapshot."""
    changed = set()
    for region, old in zip(memory.regions, before, strict=True):
        new = bytes(region.view)
        for start in range(0, len(new), PAGE):
            if new[start : start + PAGE] != old[start : start + PAGE]:
                changed.add((region.start + start) // PAGE)
    return changed
