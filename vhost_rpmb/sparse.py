# SPDX-License-Identifier: Apache-2.0
"""The memory of a device's blocks: pages of zeros take none."""

from __future__ import annotations

import mmap
from contextlib import suppress

__all__ = ["clear", "new", "put"]

_PAGE_SIZE = 4096  # bytes: of a smaller unit the rest of a page takes memory as well
_ZEROS = bytes(_PAGE_SIZE)


def new(size: int) -> mmap.mmap:
    """Return memory of a multiple of pages, all zeros."""
    # Private: of shared memory, a page that is only read takes memory too.
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    with suppress(OSError):  # a kernel that has none
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def put(memory: mmap.mmap, start: int, data: bytes) -> None:
    """Put data, from the beginning of a page on, where there are zeros."""
    for part in range(0, len(data), _PAGE_SIZE):
        page = data[part : part + _PAGE_SIZE]
        if page != _ZEROS[: len(page)]:
            memory[start + part : start + part + len(page)] = page


def clear(memory: mmap.mmap) -> None:
    """Make all of it zeros."""
    for start in range(0, len(memory), _PAGE_SIZE):
        if memory[start : start + _PAGE_SIZE] != _ZEROS:
            memory[start : start + _PAGE_SIZE] = _ZEROS
