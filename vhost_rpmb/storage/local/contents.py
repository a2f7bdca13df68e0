# SPDX-License-Identifier: Apache-2.0
"""The blocks of a device at a start: the image, compared with its digests, and pending blocks."""

from __future__ import annotations

import mmap

from vhost_rpmb import sparse
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
    written: bytearray  # one byte a block, non-zero where it has a digest
    earlier: list[int]  # addresses of damaged blocks that are earlier versions of themselves
    blank: bool  # the image is all zeros

    @property
    def lost(self) -> list[int]:
        """Addresses of damaged blocks, ascending."""
        return [address for address, mark in enumerate(self.damaged) if mark]


def load(image: ImageFile, database: StateReader, memory: mmap.mmap | None = None) -> Contents:
    """Read the image, compare it with its digests, and put pending blocks in place of its own.

    ``memory`` (default: new) gets the blocks; what it has is replaced. Blocks, digests and pending
    blocks are read one by one, because memory of many freed objects stays with the process.
    """
    if memory is None:
        memory = sparse.new(image.size)
    else:
        sparse.clear(memory)
    blocks = image.size // spec.BLOCK_SIZE
    damaged, written = bytearray(blocks), bytearray(blocks)
    digests = database.digests(blocks)
    row = next(digests, None)
    blank = True
    earlier = []
    for first, count, data in image.chunks():
        stored = {}
        while row is not None and row[0] < first + count:
            stored[row[0]] = row[1]
            written[row[0]] = 1
            row = next(digests, None)
        zeros = data is not None and is_zeros(data)
        if zeros and not stored:
            continue
        if data is not None and not zeros:
            sparse.put(memory, first * spec.BLOCK_SIZE, data)
            blank = False
        for number, address in enumerate(range(first, first + count)):
            start = number * spec.BLOCK_SIZE
            found = None if data is None else digest(data[start : start + spec.BLOCK_SIZE])
            expected = stored.get(address, NO_DIGESTS)
            if found != expected.sha256:
                damaged[address] = 1
                if found and expected.had(found):
                    earlier.append(address)
    pending, pending_total = set(), 0
    for address, block in database.pending(blocks):
        start = address * spec.BLOCK_SIZE
        memory[start : start + spec.BLOCK_SIZE] = block
        damaged[address] = 0
        pending.add(address)
        pending_total += 1
    earlier = [address for address in earlier if address not in pending]
    return Contents(memory, damaged, pending, pending_total, written, earlier, blank)
