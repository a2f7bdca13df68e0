# SPDX-License-Identifier: Apache-2.0
"""The blocks of a device at a start: the image, compared with its digests, and pending blocks."""

from __future__ import annotations

import mmap
from collections.abc import Set as AbstractSet

from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.database import NO_DIGESTS, StateReader
from vhost_rpmb.storage.local.image import ImageFile, digest, is_zeros
from vhost_rpmb.typed import NamedTuple

__all__ = ["Contents", "load"]


class Contents(NamedTuple):
    """The blocks of a device, and how they differ from what was stored."""

    memory: mmap.mmap  # the blocks
    damaged: bytearray  # one byte a block, non-zero where it differs from what was stored
    pending: set[int]  # addresses of blocks that may not be in the image yet
    pending_total: int  # the number of those in the database, with repetition
    written: AbstractSet[int]  # addresses of blocks that have a digest
    earlier: list[int]  # addresses of damaged blocks that are earlier versions of themselves
    blank: bool  # the image is all zeros

    @property
    def lost(self) -> list[int]:
        """Addresses of damaged blocks, ascending."""
        return [address for address, mark in enumerate(self.damaged) if mark]


def load(image: ImageFile, database: StateReader, memory: mmap.mmap | None = None) -> Contents:
    """Read the image, compare it with its digests, and put pending blocks in place of its own.

    ``memory`` (default: new) gets the blocks; what it has is replaced.
    """
    if memory is None:
        memory = mmap.mmap(-1, image.size)
    else:
        memory[:] = bytes(image.size)
    blocks = image.size // spec.BLOCK_SIZE
    damaged = bytearray(blocks)
    digests = database.digests(blocks)
    rows = list(database.pending(blocks))
    pending = dict(rows)
    blank = True
    earlier = []
    for first, count, data in image.chunks():
        if data is not None and not is_zeros(data):
            start = first * spec.BLOCK_SIZE
            memory[start : start + len(data)] = data
            blank = False
        for number, address in enumerate(range(first, first + count)):
            start = number * spec.BLOCK_SIZE
            found = None if data is None else digest(data[start : start + spec.BLOCK_SIZE])
            stored = digests.get(address, NO_DIGESTS)
            if found != stored.sha256 and address not in pending:
                damaged[address] = 1
                if found and stored.had(found):
                    earlier.append(address)
    for address, block in pending.items():
        start = address * spec.BLOCK_SIZE
        memory[start : start + spec.BLOCK_SIZE] = block
    return Contents(memory, damaged, set(pending), len(rows), digests.keys(), earlier, blank)
