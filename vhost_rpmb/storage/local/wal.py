# SPDX-License-Identifier: Apache-2.0
"""A reader of SQLite's write-ahead log, https://www.sqlite.org/fileformat2.html#the_write_ahead_log.

Only for a copy in memory that must not be on the disk; docs/decisions/0009 has the reason. For the
state that a daemon serves, SQLite itself reads the log.
"""

from __future__ import annotations

import struct

__all__ = ["apply_log"]

_MAGIC = 0x377F0682  # the lowest bit is the byte order of the checksums: 1 is big-endian
_VERSION = 3007000
_HEADER = struct.Struct(">IIIIIIII")  # magic, version, page size, sequence, salts, checksum
_FRAME = struct.Struct(">IIIIII")  # page, pages after a commit (else 0), salts, checksum
_CHECKED_HEADER = 24  # bytes of the header under its checksum
_CHECKED_FRAME = 8  # bytes of a frame's header under its checksum
_PAGE_SIZE_OFFSET = 16  # in the header of the database
_FORMATS = slice(18, 20)  # in the header of the database: write and read version
_ROLLBACK = b"\x01\x01"  # versions of a database without a log
_WORD = 0xFFFFFFFF


def apply_log(database: bytes, log: bytes) -> bytes:
    """Return the database with all complete transactions of its log, as one without a log.

    As in SQLite, the log ends at the first frame that does not continue the checksums. Raises
    ValueError for a log that no SQLite of this format wrote for this database.
    """
    content = bytearray(database)
    _put_commits(content, log)
    content[_FORMATS] = _ROLLBACK
    return bytes(content)


def _put_commits(content: bytearray, log: bytes) -> None:
    if len(log) < _HEADER.size:
        return
    magic, version, page_size, _, *salts, first, second = _HEADER.unpack_from(log)
    order = ">" if magic & 1 else "<"
    checksum = _continue((0, 0), log[:_CHECKED_HEADER], order)
    if magic & ~1 != _MAGIC or checksum != (first, second):
        return
    (expected,) = struct.unpack_from(">H", content, _PAGE_SIZE_OFFSET)
    if (version, page_size) != (_VERSION, expected):
        raise ValueError("its log is of another format")
    pages: dict[int, bytes] = {}  # of the transaction that is not complete yet
    start = _HEADER.size
    while start + _FRAME.size + page_size <= len(log):
        number, size, *frame_salts, first, second = _FRAME.unpack_from(log, start)
        body = start + _FRAME.size
        page = log[body : body + page_size]
        checksum = _continue(checksum, log[start : start + _CHECKED_FRAME] + page, order)
        if not number or frame_salts != salts or checksum != (first, second):
            return
        pages[number] = page
        if size:
            _put(content, pages, size)
            pages.clear()
        start = body + page_size


def _put(content: bytearray, pages: dict[int, bytes], size: int) -> None:
    """Put the pages of one transaction into a database that has ``size`` pages after it."""
    page_size = len(next(iter(pages.values())))
    del content[size * page_size :]
    content.extend(bytes(size * page_size - len(content)))
    for number, page in pages.items():
        if number <= size:
            content[(number - 1) * page_size : number * page_size] = page


def _continue(checksum: tuple[int, int], data: bytes, order: str) -> tuple[int, int]:
    first, second = checksum
    for even, odd in struct.iter_unpack(order + "II", data):
        first = (first + even + second) & _WORD
        second = (second + odd + first) & _WORD
    return first, second
