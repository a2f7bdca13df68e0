# SPDX-License-Identifier: Apache-2.0
"""Creation of state files: of a new device, and of one that moves here; both atomic."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress

from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.interface import ACTIVE
from vhost_rpmb.storage.local.database import (
    SCHEMA,
    SET_DIGEST,
    STOPPED,
    Mark,
    put_mark,
    uri,
)
from vhost_rpmb.storage.local.files import published_file, sync_folder
from vhost_rpmb.storage.local.image import ImageFile, digest
from vhost_rpmb.storage.paths import journal_of, log_of, new_of

__all__ = ["create_arriving", "create_database"]


def create_database(path: str, image: ImageFile, counter: int, state: str = ACTIVE) -> None:
    """Create the state file of a new device atomically; never replaces a file.

    ``state``: ACTIVE, or VACANT for files that wait for a device.
    """
    if os.path.lexists(log_of(path)):
        raise StateError(
            f"{log_of(path)}: expected its state file {path}, found none: restore the state file"
            " from a backup; a start without it would set the write counter back"
        )
    with _published(path, os.link) as database:
        _fill(database, image.file_size, image.blocks(), counter, state)
    sync_folder(image.path)


def create_arriving(
    path: str,
    image: memoryview,
    counter: int,
    key: bytes | None,
    mark: Mark,
    publish: Callable[[str, str], None],
) -> None:
    """Create the state file of a device that moves here, atomically; see `published_file`."""
    blocks = (
        (start // spec.BLOCK_SIZE, bytes(image[start : start + spec.BLOCK_SIZE]))
        for start in range(0, len(image), spec.BLOCK_SIZE)
    )
    with _published(path, publish) as database:
        _fill(database, len(image), blocks, counter)
        with database:
            database.execute("UPDATE device SET key = ?", (key,))
            put_mark(database, 0, mark)


@contextmanager
def _published(path: str, publish: Callable[[str, str], None]) -> Iterator[sqlite3.Connection]:
    """Create a state file atomically; see `published_file`."""
    new = new_of(path)
    leftovers = (journal_of(new), log_of(new))
    _remove(leftovers)
    try:
        with published_file(path, publish), closing(sqlite3.connect(uri(new), uri=True)) as made:
            yield made
    finally:
        with suppress(OSError):
            _remove(leftovers)


def _remove(paths: Iterable[str]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            os.unlink(path)


def _fill(
    connection: sqlite3.Connection,
    size: int,
    blocks: Iterable[tuple[int, bytes]],
    counter: int,
    state: str = ACTIVE,
) -> None:
    """Write the state of a new device into an empty file, without syncing it."""
    connection.executescript(SCHEMA)
    with connection:
        connection.execute(
            "INSERT INTO device VALUES (1, ?, ?, ?, NULL, NULL, 0, 0, ?, x'', ?, 0, x'', x'')",
            (os.urandom(8).hex(), size, counter, STOPPED, state),
        )
        digests = ((address, digest(data)) for address, data in blocks)
        connection.executemany(SET_DIGEST, ((a, sha256) for a, sha256 in digests if sha256))
