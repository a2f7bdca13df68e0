# SPDX-License-Identifier: Apache-2.0
"""Writes that are durable although their answers may be lost: the replay record and its window.

A batch is committed, then published by one store into guest memory. A process that ends in between
leaves one batch durable and unanswered, and its chains are executed again. Each commit therefore
stores a record of the answers that it owes, in the same transaction. docs/durability.md describes
the rule, docs/security.md why it gives nothing away.
"""

from __future__ import annotations

import struct

from vhost_rpmb.rpmb.limits import MAX_REPLAY_WRITES, REPLAY_WRITE_SIZE
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Self

__all__ = ["NO_REPLAY", "Replay", "Window"]

_HEADER = struct.Struct(">IB")  # chains, flags
_KEY_PROGRAMMED = 1


class Replay(NamedTuple):
    """The record of one commit: the answers that it owes.

    ``chains``: of the batch. ``writes``: of each DATA_WRITE answered OK in it, in order, the write
    counter as requested (4 bytes, big-endian) and the key_mac that was verified (32 bytes), which
    authenticates data, address, count and counter. ``key_programmed``: PROGRAM_KEY was answered OK.
    """

    chains: int = 0
    writes: bytes = b""
    key_programmed: bool = False

    def pack(self) -> bytes:
        """Return the bytes that a store keeps; none for the empty record."""
        if not self.chains:
            return b""
        return _HEADER.pack(self.chains, self.key_programmed and _KEY_PROGRAMMED) + self.writes

    @classmethod
    def unpack(cls, packed: bytes) -> Self:
        """Read a record; raise ValueError for bytes that `pack` does not return."""
        if not packed:
            return cls()
        if len(packed) < _HEADER.size or (len(packed) - _HEADER.size) % REPLAY_WRITE_SIZE:
            raise ValueError(f"a replay record of {len(packed)} bytes")
        chains, flags = _HEADER.unpack_from(packed)
        if not chains or flags & ~_KEY_PROGRAMMED:
            raise ValueError(f"a replay record of {chains} chains with flags 0x{flags:x}")
        return cls(chains, packed[_HEADER.size :], bool(flags & _KEY_PROGRAMMED))

    def split(self) -> list[bytes]:
        """Return the writes one by one."""
        size = REPLAY_WRITE_SIZE
        return [self.writes[start : start + size] for start in range(0, len(self.writes), size)]


NO_REPLAY = Replay()  # the empty record


class Window:
    """The next chains, whose requests may be those of a record: ``left`` of them."""

    def __init__(self, replay: Replay) -> None:
        self.arm(replay)

    def arm(self, replay: Replay) -> None:
        """Open the window for the chains of a record."""
        self.left = replay.chains
        self._replay = replay
        self._writes = frozenset(replay.split())

    def has_write(self, write: bytes) -> bool:
        """Whether a write (counter and verified MAC, as in `Replay.writes`) is in the record."""
        return write in self._writes

    @property
    def has_key(self) -> bool:
        """Whether the commit of the record programmed the key."""
        return self._replay.key_programmed

    def record(self, chains: int, writes: bytes, key_programmed: bool) -> Replay:
        """Return the record for the commit of the next batch: the answers that it owes.

        Where the window extends beyond the batch, the answers that are owed to later chains are
        kept, within a bound.
        """
        if chains >= self.left:
            return Replay(chains, writes, key_programmed)
        kept = self._replay.split()
        kept += [write for write in Replay(chains, writes).split() if write not in self._writes]
        return Replay(
            self.left,
            b"".join(kept[-MAX_REPLAY_WRITES:]),
            key_programmed or self._replay.key_programmed,
        )

    def answered(self, chains: int) -> None:
        """Count chains whose answers were published."""
        self.left = max(self.left - chains, 0)

    def close(self) -> None:
        """Drop the record: nothing is owed any more."""
        self.arm(NO_REPLAY)
