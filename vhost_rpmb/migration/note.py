# SPDX-License-Identifier: Apache-2.0
"""What was handed over on the present connection, in memory that survives the process with it."""

from __future__ import annotations

import struct

from vhost_rpmb.storage.interface import Possession

__all__ = ["NOTE_SIZE", "Note"]

_LAYOUT = struct.Struct("=Q16sQ")  # generation, token, kind
_NONE, _GIVEN, _ARRIVED = 0, 1, 2
_INTENT = struct.Struct("=Q16s")  # generation, token
_INTENT_AT = _LAYOUT.size
NOTE_SIZE = _LAYOUT.size + _INTENT.size


class Note:
    """The hand-over of the present connection, in a buffer of `NOTE_SIZE` bytes.

    A front-end that gave the device away on a connection may take it back there, if the other host
    did not activate it: the virtual machine is the same one.
    """

    def __init__(self, buffer: memoryview | None = None) -> None:
        self._buffer = memoryview(bytearray(NOTE_SIZE)) if buffer is None else buffer

    def give(self, possession: Possession) -> None:
        """Note that the device leaves; before that is durable."""
        _LAYOUT.pack_into(self._buffer, 0, possession.generation, possession.token, _GIVEN)

    def arrive(self, possession: Possession) -> None:
        """Note that the device has arrived."""
        _LAYOUT.pack_into(self._buffer, 0, possession.generation, possession.token, _ARRIVED)

    def intend(self, possession: Possession) -> None:
        """Note what the device is about to be taken over with; before that is durable."""
        _INTENT.pack_into(self._buffer, _INTENT_AT, possession.generation, possession.token)

    def clear(self) -> None:
        """Forget it: a new connection begins."""
        self._buffer[:NOTE_SIZE] = bytes(NOTE_SIZE)

    @property
    def given(self) -> bool:
        """Whether the device left on the present connection."""
        return self._kind == _GIVEN

    @property
    def arrived(self) -> bool:
        """Whether the device arrived on the present connection."""
        return self._kind == _ARRIVED

    @property
    def _kind(self) -> int:
        return int(_LAYOUT.unpack_from(self._buffer)[2])

    def matches(self, possession: Possession) -> bool:
        """Whether the noted hand-over is this one."""
        generation, token, kind = _LAYOUT.unpack_from(self._buffer)
        return kind != _NONE and (generation, token) == (possession.generation, possession.token)

    def intended(self, possession: Possession) -> bool:
        """Whether the device was taken over on the present connection as it is now."""
        found = _INTENT.unpack_from(self._buffer, _INTENT_AT)
        return self._kind != _NONE and found == (possession.generation, possession.token)

    def stayed(self, possession: Possession) -> bool:
        """Whether the device has not left after all: its process ended before that was durable."""
        generation, *_ = _LAYOUT.unpack_from(self._buffer)
        return self.given and generation == possession.generation + 1

    def took_back(self, possession: Possession) -> bool:
        """Whether this is the state after the device that left was taken back."""
        generation, _, kind = _LAYOUT.unpack_from(self._buffer)
        return kind == _GIVEN and generation == possession.generation and not possession.token
