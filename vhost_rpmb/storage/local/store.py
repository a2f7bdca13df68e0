# SPDX-License-Identifier: Apache-2.0
"""Durable state of a device: the decisions over image, state database and key file.

This module and the three below it (state, image, keyfile) are all that touches the disk. How the
three files work together, and what may be lost at which moment (nothing that was acknowledged), is
written down in docs/durability.md.
"""

from __future__ import annotations

import hmac
import logging
import mmap
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import NamedTuple

from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.interface import Access, Resources
from vhost_rpmb.storage.local.database import (
    NO_DIGESTS,
    Database,
    DeviceRow,
    Snapshot,
    StateReader,
    check_surroundings,
    create_database,
    has_log,
    trouble,
)
from vhost_rpmb.storage.local.image import ImageFile, Stamp, digest, is_zeros, ranges, runs
from vhost_rpmb.storage.local.keyfile import fingerprint, read_key_file, require_key, write_key_file
from vhost_rpmb.storage.paths import Paths

__all__ = ["Report", "Store", "open_store", "resources", "verify"]

logger = logging.getLogger(__name__)

MAX_PENDING = 4096  # blocks kept in the database before they are written into the image

_PAGE_BLOCKS = 16  # 4 KiB: what a disk or a file system loses at once
# What can make a step fail that is to be durable: the answer then is a failure, not an end.
_FAILURES = (sqlite3.Error, OSError, MemoryError)


def open_store(
    paths: Paths,
    *,
    key_set: bool = False,
    initial_counter: int | None = None,
    warn: Callable[[str], None] = logger.warning,
) -> Store:
    """Open a device's durable state, make it if there is none, and lock it for this process.

    ``paths.key`` is where a programmed key is kept, ``key_set`` tells that the key there counts as
    programmed; ``initial_counter`` (default 0) is where a new device's write counter begins, and
    has to be given for an image that holds data. ``warn`` gets what the operator should know.

    Raises UsageError for a file that cannot serve its purpose, StateError for files that contradict
    each other or are in use. Nothing that the device holds is changed then.
    """
    state_path, key_path = paths.state, paths.key
    image = ImageFile(paths.flash, warn)
    try:
        _check_folders(paths)
        with _named_errors(state_path):
            check_surroundings(state_path)
            key_file = read_key_file(key_path, warn)
            if os.path.lexists(state_path):
                _check_log(state_path)
            else:
                if key_set:
                    require_key(key_path, key_file)
                _check_new(image, state_path, initial_counter)
                create_database(state_path, image, initial_counter or 0)
            database = Database(state_path)
            try:
                row = database.device()
                _check_image(image, row, state_path)
                key, new = _settle_key(row, state_path, key_path, key_file, key_set, warn)
                contents = _load(image, database, row, state_path)
                if contents.disagreement:
                    raise StateError(contents.disagreement)
                if initial_counter is not None and initial_counter != row.counter:
                    warn(
                        f"--initial-counter={initial_counter} was not applied: the write counter in"
                        f" {state_path} is {row.counter}, and it only goes up"
                    )
                store = Store(paths, database, image, row.counter, key, contents)
                if new is not None:
                    database.program(None, new)
                database.warm_log()
                database.mark_running(row.starts + 1)
                database.set_stamped(image.set_stamp(Stamp(row.name, row.starts + 1)))
                store.checkpoint()
            except BaseException:
                with suppress(*_FAILURES):
                    database.close()
                raise
        return store
    except BaseException:
        image.close()
        raise


class Report(NamedTuple):
    """What `verify` found: ``damaged`` and ``pending`` are addresses of blocks, ascending."""

    state_path: str
    blocks: int
    counter: int
    programmed: bool
    key_in_file: bool
    clean: bool  # the last stop was a clean one
    pending: list[int]
    damaged: list[int]
    disagreement: str  # which files do not belong together, and what to do; or empty


def verify(
    paths: Paths,
    *,
    warn: Callable[[str], None] = logger.warning,
) -> Report:
    """Check a device that is not running, as a start would, and change nothing.

    ``paths.key`` is needed only to check the key file. Raises UsageError and StateError as
    `open_store` does, but reports an image that does not belong to the state.
    """
    state_path, key_path = paths.state, paths.key
    image = ImageFile(paths.flash, warn, writable=False)
    try:
        if not os.path.lexists(state_path):
            raise StateError(
                f"the state file {state_path} does not exist: name the one that belongs to"
                f" {paths.flash} with --state-path"
            )
        with _named_errors(state_path):
            check_surroundings(state_path)
            database = Snapshot(state_path)
            try:
                row = database.device()
                _check_image(image, row, state_path)
                if key_path is not None:
                    key_file = read_key_file(key_path, warn)
                    _settle_key(row, state_path, key_path, key_file, False, warn)
                contents = _load(image, database, row, state_path)
            finally:
                database.close()
    finally:
        image.close()
    return Report(
        state_path=state_path,
        blocks=len(contents.damaged),
        counter=row.counter,
        programmed=row.key is not None or row.fingerprint is not None,
        key_in_file=row.fingerprint is not None,
        clean=not row.running,
        pending=sorted(contents.pending),
        damaged=contents.lost(),
        disagreement=contents.disagreement,
    )


class _Contents(NamedTuple):
    """The blocks of a device as they were found.

    ``memory``: the blocks; ``damaged``: one byte a block, non-zero where it is not what was stored;
    ``pending``: addresses that the image need not hold yet; ``disagreement``: why the image is not
    the one that belongs to the state, or empty.
    """

    memory: mmap.mmap
    damaged: bytearray
    pending: set[int]
    disagreement: str

    def lost(self) -> list[int]:
        return [address for address, mark in enumerate(self.damaged) if mark]


def _load(image: ImageFile, database: StateReader, row: DeviceRow, state_path: str) -> _Contents:
    """Read the image, compare it with what was stored, and put what is pending over it."""
    memory = mmap.mmap(-1, image.size)
    blocks = image.size // spec.BLOCK_SIZE
    damaged = bytearray(blocks)
    digests = database.digests(blocks)
    pending = dict(database.pending(blocks))
    empty = True  # nothing but zeros in the image
    earlier = []  # blocks that the image has as they were before
    for first, count, data in image.chunks():
        if data is not None and not is_zeros(data):
            start = first * spec.BLOCK_SIZE
            memory[start : start + len(data)] = data
            empty = False
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
    contents = _Contents(memory, damaged, set(pending), "")
    lost = contents.lost()
    if not lost:
        return contents
    image_name, stamp = f"the image {image.path}", image.stamp()
    state_name = f"the state file {state_path}"
    stored_blocks = {address for address in digests if address not in pending}
    lost_pages = {address // _PAGE_BLOCKS for address in lost}
    why = ""
    if stamp is not None and stamp.device != row.name:
        why = f"{image_name} belongs to another device than {state_name}"
    elif stamp is not None and stamp.starts > row.starts:
        why = f"{state_name} is from an earlier time than {image_name}"
    elif earlier:
        why = (
            f"{image_name} is from an earlier time than {state_name} (it has older versions of"
            f" block {ranges(earlier)})"
        )
    elif empty:
        why = f"{image_name} is empty, but {state_name} belongs to one that is not"
    elif stamp is None and row.stamped:
        why = (
            f"{image_name} is not the file that {state_name} belongs to, and no true copy of it"
            f" ({len(lost)} blocks differ)"
        )
    elif len(lost_pages) > 1 and 2 * len(lost) > len(stored_blocks.union(lost)):
        why = f"{image_name} and {state_name} do not belong together ({len(lost)} blocks differ)"
    if why:
        why += ": bring back image, state file and key file that were saved together"
    return contents._replace(disagreement=why)


def resources(paths: Paths, programmed: bool) -> Resources:
    """Give the folders that an open store still uses, ``programmed`` with a key or not.

    The image, the state file and its log stay open. SQLite removes the log at the end; if the state
    file cannot be marked as closed, an empty log replaces it. A key file is written once.
    """
    access = Access.CREATE | Access.REMOVE | Access.SYNC
    folders = {os.path.dirname(paths.state): access}
    if paths.key is not None and not programmed:
        folders[os.path.dirname(paths.key)] = access | Access.WRITE
    return Resources(folders)


class Store:
    """The durable state of one device.

    ``image``: the blocks as they are now, in private memory; ``damaged``: one byte a block,
    non-zero where the image does not hold what was stored; ``counter``: the write counter;
    ``key``: 32 bytes, or None while no key is programmed.
    """

    def __init__(
        self,
        paths: Paths,
        database: Database,
        image_file: ImageFile,
        counter: int,
        key: bytes | None,
        contents: _Contents,
    ) -> None:
        self._paths = paths
        self._database = database
        self._image_file = image_file
        self._closed = False
        self._in_doubt = False  # the database may hold a commit that was reported as failed
        self._said = ""  # the trouble that was logged last, while it lasts
        self.counter = counter
        self.key = key
        self.image = memoryview(contents.memory)
        self.damaged = contents.damaged
        self._pending = contents.pending
        self._kept_blocks = len(contents.pending)  # in the database, some more than once
        self._checkpoint_at = MAX_PENDING
        lost = contents.lost()
        if lost:
            logger.error(
                "%d blocks of %s are not what was stored there, and cannot be read until they are"
                " written again: address %s",
                len(lost),
                image_file.path,
                ranges(lost),
            )

    def _block(self, address: int) -> bytes:
        start = address * spec.BLOCK_SIZE
        return bytes(self.image[start : start + spec.BLOCK_SIZE])

    def commit(self, counter: int, blocks: list[tuple[int, bytes]], key: bytes | None) -> bool:
        """Make a write counter, blocks (address, 256 bytes) and a new key durable as one step.

        ``key``: the key that the guest programs, None to leave it. Return False, with everything as
        before, where that cannot be done; the reason is logged.
        """
        try:
            self._settle_doubt()
            if key is not None and self._paths.key is not None:
                write_key_file(self._paths.key, key)
            self._in_doubt = True
            if key is None:
                self._database.add_pending(counter, blocks)
            else:
                with self._database.transaction():
                    self._database.program(*self._kept(key))
                    self._database.add_pending(counter, blocks)
            self._in_doubt = False
        except _FAILURES as error:
            self._report(f"a write could not be made durable: {_why(error)}")
            self._undo(key)
            return False
        self._report("")
        self.counter = counter
        if key is not None:
            self.key = key
        for address, data in blocks:
            start = address * spec.BLOCK_SIZE
            self.image[start : start + spec.BLOCK_SIZE] = data
            self.damaged[address] = 0
            self._pending.add(address)
        self._kept_blocks += len(blocks)
        if self._kept_blocks >= self._checkpoint_at:
            self.checkpoint()
        return True

    def _report(self, trouble: str) -> None:
        """Log a trouble once while it lasts: a guest can repeat what runs into it."""
        if trouble and trouble != self._said:
            logger.error("%s", trouble)
        elif self._said and not trouble:
            logger.warning("writes are made durable again")
        self._said = trouble

    def _kept(self, key: bytes) -> tuple[bytes | None, bytes | None]:
        """Give what the database keeps of a key: itself, or a fingerprint where a file has it."""
        return (key, None) if self._paths.key is None else (None, fingerprint(key))

    def _undo(self, key: bytes | None) -> None:
        """After a failed commit: see to it that it stays undone, now or before the next one."""
        with suppress(*_FAILURES):
            self._settle_doubt()
            if key is not None and self._paths.key is not None:
                os.unlink(self._paths.key)  # only now: no state can need it any more

    def _settle_doubt(self) -> None:
        """Write down what is true behind what came before a failed commit, in place of that one.

        A commit whose sync failed may be on the disk all the same. The log is read as far as each
        transaction continues the one before; this one begins where the failed one began. Raises
        sqlite3.Error as long as the truth cannot be made durable.
        """
        if not self._in_doubt:
            return
        with self._database.transaction():
            if self.key is None:
                self._database.program(None, None)
            self._database.add_pending(self.counter, ())
        self._in_doubt = False

    def _keep_once(self) -> None:
        """While the image takes nothing: keep each pending block once, or they would pile up."""
        addresses = sorted(self._pending)
        self._in_doubt = True
        with self._database.transaction():
            self._database.clear_pending(self.counter)
            self._database.add_pending(self.counter, ((a, self._block(a)) for a in addresses))
        self._in_doubt = False
        self._kept_blocks = len(addresses)

    @property
    def checkpoint_due(self) -> bool:
        """Whether blocks wait in the database to be written into the image."""
        return bool(self._pending)

    def checkpoint(self) -> bool:
        """Write the pending blocks into the image, and let the database forget them.

        Return False where that cannot be done now; nothing is lost then, the reason is logged.
        """
        if not self._pending:
            return True
        addresses = sorted(self._pending)
        try:
            self._settle_doubt()
            for first, count in runs(addresses):
                start = first * spec.BLOCK_SIZE
                self._image_file.write(start, self.image[start : start + count * spec.BLOCK_SIZE])
            self._image_file.sync()
            with self._database.transaction():
                self._database.set_digests((a, self._block(a)) for a in addresses)
                self._database.clear_pending(self.counter)
        except _FAILURES as error:
            # Every block is written again at the next try: after a failed sync the system may take
            # for written what is not on the disk.
            self._in_doubt = True
            with suppress(*_FAILURES):
                self._keep_once()
            self._checkpoint_at = self._kept_blocks + MAX_PENDING // 4
            logger.error(
                "%d blocks could not be written into %s (they stay in the state database): %s",
                len(addresses),
                self._image_file.path,
                _why(error),
            )
            return False
        self._pending.clear()
        self._kept_blocks = 0
        self._checkpoint_at = MAX_PENDING
        return True

    def resources(self) -> Resources:
        """Give the folders in which serving and closing create, write or remove files."""
        return resources(self._paths, self.key is not None)

    def close(self) -> None:
        """Complete the image, leave the state marked as clean, and release the locks.

        A second call does nothing.
        """
        if self._closed:
            return
        self._closed = True
        try:
            self.checkpoint()
            with suppress(*_FAILURES):
                self._settle_doubt()
            self._database.close()
        except _FAILURES as error:
            logger.error("the state could not be marked as clean: %s", _why(error))
        finally:
            self._image_file.close()


@contextmanager
def _named_errors(state_path: str) -> Iterator[None]:
    """Turn what goes wrong below into a text for the operator."""
    try:
        yield
    except sqlite3.Error as error:
        raise StateError(trouble(state_path, error)) from error
    except OSError as error:
        raise StateError(f"{error.filename or state_path}: {error.strerror}") from error
    except MemoryError as error:
        raise StateError("there is not enough memory for the image: free some") from error


def _why(error: BaseException) -> str:
    """Name a failure; a MemoryError has no text of its own."""
    return str(error) or "out of memory"


def _check_log(state_path: str) -> None:
    """Refuse a state file that its log does not fit, before SQLite puts the two together."""
    if has_log(state_path):
        Snapshot(state_path).close()


def _check_new(image: ImageFile, state_path: str, initial_counter: int | None) -> None:
    """Refuse to make a new device where the state of an old one may be lost or hidden.

    The stamp is set only after the state is durable, and data is written only after that: a crash
    while a device is made leaves an image that passes here, or a state file.
    """
    stamp = image.stamp()
    if stamp is not None:
        raise StateError(
            f"the image {image.path}: expected the state file of device {stamp.device} at"
            f" {state_path}, found none: bring back the state file with its -wal file, or name it"
            " with --state-path; a new device needs a new image"
        )
    if initial_counter is None and not image.is_blank():
        raise StateError(
            f"the image {image.path}: expected a state file at {state_path} or a blank image, found"
            " data without a state file: bring back the state file, or name it with --state-path;"
            " to make a new device of this data, give its first write counter with"
            " --initial-counter=N"
        )


def _check_image(image: ImageFile, row: DeviceRow, state_path: str) -> None:
    if row.size != image.file_size:
        raise StateError(
            f"the image {image.path} has {image.file_size} bytes, but {state_path} belongs to one"
            f" of {row.size} bytes: bring back the right image, or name the state that belongs to"
            " this one with --state-path"
        )


def _check_folders(paths: Paths) -> None:
    """Refuse a path that stands in a folder that is not there."""
    for name, path in (("the state path", paths.state), ("--key-path", paths.key)):
        if path is not None and not os.path.isdir(os.path.dirname(path)):
            raise UsageError(f"the folder of {name}, {path}, does not exist: make it first")


def _settle_key(
    row: DeviceRow,
    state_path: str,
    key_path: str | None,
    key_file: bytes | None,
    key_set: bool,
    warn: Callable[[str], None],
) -> tuple[bytes | None, bytes | None]:
    """Decide which key the device has, if any: return it, and its fingerprint where a file has it.

    Raises StateError where the key file contradicts the durable state.
    """
    if row.key is None and row.fingerprint is None:
        if key_set:
            key = require_key(key_path, key_file)
            return key, fingerprint(key)
        if key_file is not None:
            warn(
                f"the key in {key_path} does not count as programmed (that takes --key-set): a key"
                " that the guest programs will replace it"
            )
        return None, None
    if key_path is None:
        if row.key is None:
            raise StateError(
                f"the device of {state_path} is programmed, and its key is in a key file: name it"
                " with --key-path"
            )
        return row.key, None
    if key_file is None:
        raise StateError(
            f"the device of {state_path} is programmed, but the key file {key_path} does not exist:"
            " bring it back"
            + (", or leave out --key-path, since the state file has the key" if row.key else "")
        )
    if len(key_file) < spec.KEY_SIZE:
        raise StateError(
            f"the device of {state_path} is programmed, but the key file {key_path} has"
            f" {len(key_file)} bytes instead of 32: bring it back"
        )
    expected = row.fingerprint if row.key is None else fingerprint(row.key)
    if not hmac.compare_digest(fingerprint(key_file), expected or b""):
        raise StateError(
            f"the key file {key_path} holds another key than the one that the device of"
            f" {state_path} was programmed with: bring back the files that belong together"
        )
    return key_file, row.fingerprint
