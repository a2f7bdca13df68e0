# SPDX-License-Identifier: Apache-2.0
"""Reads the parts of a record one after the other; each ends where its layout says."""

from __future__ import annotations

from vhost_rpmb.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import struct
    from typing import Any

__all__ = ["Cursor"]


class Cursor:
    """A position in ``data``, which errors name ``what``; ValueError at its end."""

    def __init__(self, data: bytes, what: str, position: int = 0) -> None:
        self._data = data
        self._what = what
        self._position = position

    def raw(self, count: int) -> bytes:
        """Take a number of bytes."""
        left = len(self._data) - self._position
        if count > left:
            raise ValueError(f"expected {count} more bytes of the {self._what}, found {left}")
        self._position += count
        return self._data[self._position - count : self._position]

    def take(self, layout: struct.Struct) -> tuple[Any, ...]:
        """Take the fields of a layout."""
        return layout.unpack(self.raw(layout.size))

    def counted(self, layout: struct.Struct) -> bytes:
        """Take bytes behind their number."""
        return self.raw(self.take(layout)[0])

    def end(self) -> None:
        """ValueError unless all was taken."""
        left = len(self._data) - self._position
        if left:
            raise ValueError(f"expected the end of the {self._what}, found {left} more bytes")
