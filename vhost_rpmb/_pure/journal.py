# SPDX-License-Identifier: Apache-2.0
"""The journal of the result register, in memory that survives the process.

Before a batch is published, the register after it is written with the used index after it. A
process that takes the connection over reads the entry that belongs to the used index in the ring:
the register after the last batch that the driver has seen. Two entries alternate, so that the one
of the batch before is intact while the other one is written.
"""

from __future__ import annotations

import struct

from vhost_rpmb._pure.batch import Register

__all__ = ["JOURNAL_SIZE", "Journal"]

JOURNAL_SIZE = 64  # bytes
_ENTRY_SIZE = 32
# In the byte order of the host: sequence number (0: void), used index, valid, req_resp, result,
# address, write counter; then the check value over these as 32-bit words.
_FIELDS = struct.Struct("=QIBxHHHI")
_SEQUENCE = struct.Struct("=Q")
_WORDS = struct.Struct("=6I")
_CHECK = struct.Struct("=I")
_MASK = 0xFFFF_FFFF


class Journal:
    """The two entries in a writable buffer of 64 bytes."""

    def __init__(self, buffer: memoryview) -> None:
        if len(buffer) != JOURNAL_SIZE or buffer.itemsize != 1 or buffer.readonly:
            raise ValueError(f"a journal is a writable buffer of {JOURNAL_SIZE} bytes")
        self.buffer = buffer
        self._sequence = max((entry[0] for entry in self._entries()), default=0)

    def clear(self) -> None:
        """Make both entries void."""
        self.buffer[:] = bytes(JOURNAL_SIZE)

    def store(self, used: int, register: Register | None) -> None:
        """Write the register that the driver sees from a used index on."""
        self._sequence += 1
        start = self._sequence % 2 * _ENTRY_SIZE
        fields = (0, 0, 0, 0) if register is None else register
        entry = _FIELDS.pack(self._sequence, used, register is not None, *fields)
        end = start + _FIELDS.size
        _SEQUENCE.pack_into(self.buffer, start, 0)  # void while it is written
        self.buffer[start + _SEQUENCE.size : end] = entry[_SEQUENCE.size :]
        _CHECK.pack_into(self.buffer, end, _check(entry))
        _SEQUENCE.pack_into(self.buffer, start, self._sequence)

    def load(self, used: int) -> Register | None:
        """Return the register at a used index; None without one, or without an entry."""
        found = [entry for entry in self._entries() if entry[1] == used]
        if not found:
            return None
        _, _, valid, *fields = max(found)
        return Register(*fields) if valid else None

    def _entries(self) -> list[tuple[int, ...]]:
        """Return the fields of the intact entries."""
        entries = []
        for start in (0, _ENTRY_SIZE):
            raw = bytes(self.buffer[start : start + _FIELDS.size])
            (check,) = _CHECK.unpack_from(self.buffer, start + _FIELDS.size)
            entry = _FIELDS.unpack(raw)
            if entry[0] and check == _check(raw):
                entries.append(entry)
        return entries


def _check(entry: bytes) -> int:
    """Return FNV-1a over the words of an entry."""
    value = 0x811C_9DC5
    for word in _WORDS.unpack(entry):
        value = (value ^ word) * 0x0100_0193 & _MASK
    return value
