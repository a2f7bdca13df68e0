# SPDX-License-Identifier: Apache-2.0
"""The files of a device that moves to or from another home; `Mark` says that it is not here.

A marked device is refused by every start, also of earlier versions. Until its files have no mark
they may be incomplete, or an earlier state than that of the other home.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.contents import load
from vhost_rpmb.storage.local.creation import create_arriving
from vhost_rpmb.storage.local.database import Database, Mark
from vhost_rpmb.storage.local.files import published_file, write_all
from vhost_rpmb.storage.local.image import ImageFile, ranges
from vhost_rpmb.storage.local.keyfile import read_key_file
from vhost_rpmb.storage.local.opening import choose_key, mismatch, named_errors, open_store
from vhost_rpmb.storage.local.snapshot import Snapshot
from vhost_rpmb.storage.local.statefile import is_marked
from vhost_rpmb.storage.paths import Paths, log_of
from vhost_rpmb.typed import NamedTuple

__all__ = ["LocalDevice", "Mark", "complete", "create_files", "locked", "mark_of", "unmark"]


class LocalDevice(NamedTuple):
    """The complete state of a stopped device in files, locked for this process."""

    database: Database
    memory: memoryview
    counter: int
    key: bytes | None
    mark: Mark | None


def mark_of(paths: Paths) -> Mark | None:
    """Return the mark of a stopped device; None for one that is here. Raises StateError."""
    with named_errors(paths.state), closing(Snapshot(paths.state, away=True)) as snapshot:
        return snapshot.mark()


def complete(paths: Paths) -> bool:
    """Complete an `unmark` that was interrupted; return whether one was. Raises StateError."""
    if not os.path.lexists(paths.state):
        return False
    with named_errors(paths.state), closing(Snapshot(paths.state, away=True)) as snapshot:
        interrupted = snapshot.mark() is None and is_marked(paths.state)
    if interrupted:
        unmark(paths)
    return interrupted


@contextmanager
def locked(paths: Paths, warn: Callable[[str], None]) -> Iterator[LocalDevice]:
    """Lock and verify a stopped device, after a start and a stop that complete its files.

    Raises UsageError and StateError, also for damaged blocks.
    """
    complete(paths)
    if not os.path.lexists(paths.state) or mark_of(paths) is None:
        open_store(paths, warn=warn).close()
    with (
        named_errors(paths.state),
        closing(ImageFile(paths.flash, warn)) as image,
        closing(Database(paths.state, away=True)) as database,
    ):
        row = database.device()
        if row.running:
            raise StateError(
                f"the state file {paths.state}: expected one that was closed, found one in use by"
                " another process: end that process, and repeat the command"
            )
        key, _ = choose_key(row, paths, read_key_file(paths.key, warn), False, warn)
        contents = load(image, database)
        if contents.lost:
            raise StateError(
                mismatch(image, row, paths.state, contents)
                or f"the image {paths.flash}: expected the blocks that were stored, found others at"
                f" address {ranges(contents.lost)}: restore it, or write them again"
            )
        memory = memoryview(contents.memory)
        yield LocalDevice(database, memory, row.counter, key, database.mark())


def create_files(
    paths: Paths,
    image: memoryview,
    counter: int,
    key: bytes | None,
    mark: Mark,
    progress: Callable[[int], object],
) -> None:
    """Write the files of a device that moves here; files that an earlier attempt left are replaced.

    ``progress`` gets blocks. Raises UsageError for files of any other origin, StateError if the
    files cannot be written.
    """
    again = os.path.lexists(paths.state)
    try:
        if not again or mark_of(paths) is None:
            for path in (paths.state, log_of(paths.state), paths.flash):
                if os.path.lexists(path):
                    raise UsageError(f"{path} exists already: choose another path, or remove it")
        with named_errors(paths.state):
            # The state first: from its mark on the image is known to be one of this move.
            publish = os.rename if again else os.link
            create_arriving(paths.state, image, counter, key, mark, publish)
            with published_file(paths.flash, os.rename) as fd:
                for start in range(0, len(image), spec.CAPACITY_UNIT):
                    write_all(fd, bytes(image[start : start + spec.CAPACITY_UNIT]))
                    progress(spec.CAPACITY_UNIT // spec.BLOCK_SIZE)
    except FileExistsError:
        raise UsageError(f"{paths.state} exists already: choose another path") from None


def unmark(paths: Paths) -> None:
    """Declare a device whose files are complete to be here. Raises StateError."""
    with named_errors(paths.state), closing(Database(paths.state, away=True)) as database:
        database.set_mark(None)
