# SPDX-License-Identifier: Apache-2.0
"""Opening a device's files, and the decision whether image, state and key file belong together.

docs/durability.md describes how the three files work together, docs/decisions/0009 how files of
different devices or times are recognised.
"""

from __future__ import annotations

import mmap
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress

from vhost_rpmb import hashes
from vhost_rpmb.errors import Fenced, StateError, UsageError
from vhost_rpmb.log import Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.interface import ACTIVE, IMPORTED, VACANT, Possession
from vhost_rpmb.storage.local.contents import Contents, load
from vhost_rpmb.storage.local.creation import create_database
from vhost_rpmb.storage.local.database import Database, DeviceRow
from vhost_rpmb.storage.local.image import ImageFile, ranges
from vhost_rpmb.storage.local.keyfile import fingerprint, read_key_file, require_key
from vhost_rpmb.storage.local.statefile import check_neighbours, has_log, trouble
from vhost_rpmb.storage.local.store import FAILURES, Store
from vhost_rpmb.storage.paths import Paths

__all__ = [
    "check_possession",
    "check_size",
    "choose_key",
    "mismatch",
    "named_errors",
    "open_store",
]

logger = Logger(__name__)

_PAGE_BLOCKS = 16  # 4 KiB: the unit in which disks and file systems lose data


def open_store(
    paths: Paths,
    *,
    key_set: bool = False,
    initial_counter: int | None = None,
    warn: Callable[[str], None] = logger.warning,
    waiting: bool = False,
    vacant: bool = False,
    hold: bool = False,
    memory: mmap.mmap | None = None,
) -> Store:
    """Open a device's durable state, create it if there is none, and lock it for this process.

    ``paths.key`` is where a programmed key is stored; with ``key_set`` the key that is there counts
    as programmed. ``initial_counter`` (default 0) is the first write counter of a new device,
    required for an image that has data. ``warn`` gets warnings for the operator. ``waiting``: the
    device need not be here (see `Possession`); ``vacant``: without a state file, create one that
    waits for the device of another host. With ``hold`` the files are only locked and read, until
    `Store.begin`. ``memory`` gets the blocks.

    Raises UsageError for a file that is not suitable, StateError for files that contradict each
    other or are in use, `Fenced` for a device that was handed to another host. The state of the
    device is unchanged then.
    """
    with ExitStack() as undo:
        image = ImageFile(paths.flash, warn)
        undo.callback(image.close)
        _check_folders(paths)
        with named_errors(paths.state):
            check_neighbours(paths.state)
            key_file = read_key_file(paths.key, warn)
            if os.path.lexists(paths.state):
                _check_log(paths.state)
            else:
                if key_set:
                    require_key(paths.key, key_file)
                _check_new(image, paths.state, None if vacant else initial_counter)
                state = VACANT if vacant else ACTIVE
                create_database(paths.state, image, initial_counter or 0, state)
            database = Database(paths.state)
            undo.callback(_close_quietly, database)
            row = database.device()
            if not waiting:
                check_possession(row.possession, paths.state)
            check_size(image, row, paths.state)
            # The key of a vacant device comes with it.
            empty = row.possession.state == VACANT
            key, new = (None, None) if empty else choose_key(row, paths, key_file, key_set, warn)
            contents = load(image, database, memory)
            if disagreement := mismatch(image, row, paths.state, contents):
                raise StateError(disagreement)
            if initial_counter is not None and initial_counter != row.counter:
                warn(
                    f"--initial-counter={initial_counter} was not applied: the write counter in"
                    f" {paths.state} is {row.counter}, and it only goes up"
                )
            store = Store(paths, database, image, row, key, contents)
            if not hold:
                store.begin(new)
        undo.pop_all()
    return store


def check_possession(possession: Possession, device: str) -> None:
    """Refuse a device that is not here."""
    where = f"device {device}: expected one that is here, found"
    if possession.state == VACANT:
        raise StateError(
            f"{where} none: it waits for one to arrive, start with --migration=copy and --incoming,"
            " or remove the state file and name a new image"
        )
    if possession.state == IMPORTED:
        raise StateError(
            f"{where} one that arrived and was not used yet: start with --migration=copy"
        )
    if possession.state != ACTIVE:
        raise Fenced(
            f"{where} one that was handed to another host (generation {possession.generation}):"
            " use it there; if it is not in use there, see vhost-rpmb-client release"
        )


def _close_quietly(database: Database) -> None:
    with suppress(*FAILURES):
        database.close()


@contextmanager
def named_errors(state_path: str) -> Iterator[None]:
    """Turn failures of SQLite, files and memory into errors for the operator."""
    try:
        yield
    except sqlite3.Error as error:
        raise StateError(trouble(state_path, error)) from error
    except OSError as error:
        raise StateError(f"{error.filename or state_path}: {error.strerror}") from error
    except MemoryError as error:
        raise StateError("there is not enough memory for the image: free some") from error


# Files that do not belong together


def _check_folders(paths: Paths) -> None:
    """Refuse a path in a folder that does not exist."""
    for name, path in (("the state path", paths.state), ("--key-path", paths.key)):
        if path is not None and not os.path.isdir(os.path.dirname(path)):
            raise UsageError(f"the folder of {name}, {path}, does not exist: create it first")


def _check_log(state_path: str) -> None:
    """Refuse a log of another state file or time, before SQLite applies it."""
    if has_log(state_path):
        # Not in the memory of a daemon that was closed before.
        from vhost_rpmb.storage.local.snapshot import Snapshot

        Snapshot(state_path).close()


def _check_new(image: ImageFile, state_path: str, initial_counter: int | None) -> None:
    """Refuse to create a new device where the state of an old one may be lost or misplaced.

    The stamp is set only after the state is durable, and data is written only after that: a crash
    during the creation leaves an image that is accepted here, or a state file.
    """
    stamp = image.stamp()
    if stamp is not None:
        raise StateError(
            f"the image {image.path}: expected the state file of device {stamp.device} at"
            f" {state_path}, found none: restore the state file with its -wal file, or name it"
            " with --state-path; a new device needs a new image"
        )
    if initial_counter is None and not image.is_blank():
        raise StateError(
            f"the image {image.path}: expected a state file at {state_path} or a blank image, found"
            " data without a state file: restore the state file, or name it with --state-path;"
            " to create a new device from this data, give its first write counter with"
            " --initial-counter=N"
        )


def check_size(image: ImageFile, row: DeviceRow, state_path: str) -> None:
    """Refuse an image of another size than the state is for."""
    if row.size != image.file_size:
        raise StateError(
            f"the image {image.path} has {image.file_size} bytes, but {state_path} belongs to one"
            f" of {row.size} bytes: restore the right image, or name the state that belongs to"
            " this one with --state-path"
        )


def mismatch(image: ImageFile, row: DeviceRow, state_path: str, contents: Contents) -> str:
    """Return why the image is not the one of the state, and what to do; empty if it is.

    Only an image with damaged blocks can be another one. The rules are those of decision 0009.
    """
    lost = contents.lost
    if not lost:
        return ""
    image_name, stamp = f"the image {image.path}", image.stamp()
    state_name = f"the state file {state_path}"
    written = {address for address, mark in enumerate(contents.written) if mark}
    written = (written - contents.pending) | set(lost)
    lost_pages = {address // _PAGE_BLOCKS for address in lost}
    if stamp is not None and stamp.device != row.name:
        why = f"{image_name} belongs to another device than {state_name}"
    elif stamp is not None and stamp.starts > row.starts:
        why = f"{state_name} is from an earlier time than {image_name}"
    elif contents.earlier:
        why = (
            f"{image_name} is from an earlier time than {state_name} (it has older versions of"
            f" block {ranges(contents.earlier)})"
        )
    elif contents.blank:
        why = f"{image_name} is empty, but {state_name} belongs to one that is not"
    elif stamp is None and row.stamped:
        why = (
            f"{image_name} is not the file that {state_name} belongs to, and no true copy of it"
            f" ({len(lost)} blocks differ)"
        )
    elif len(lost_pages) > 1 and 2 * len(lost) > len(written):
        why = f"{image_name} and {state_name} do not belong together ({len(lost)} blocks differ)"
    else:
        return ""
    return why + ": restore image, state file and key file that were saved together"


def choose_key(
    row: DeviceRow,
    paths: Paths,
    key_file: bytes | None,
    key_set: bool,
    warn: Callable[[str], None],
) -> tuple[bytes | None, bytes | None]:
    """Return the key of the device, if any, and its fingerprint if the key is in the key file.

    Raises StateError for a key file that contradicts the state.
    """
    state_path, key_path = paths.state, paths.key
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
            " restore it"
            + (", or leave out --key-path, since the state file has the key" if row.key else "")
        )
    if len(key_file) < spec.KEY_SIZE:
        raise StateError(
            f"the device of {state_path} is programmed, but the key file {key_path} has"
            f" {len(key_file)} bytes instead of 32: restore it"
        )
    expected = row.fingerprint if row.key is None else fingerprint(row.key)
    if not hashes.equal(fingerprint(key_file), expected or b""):
        raise StateError(
            f"the key file {key_path} holds another key than the one that the device of"
            f" {state_path} was programmed with: restore files that belong together"
        )
    return key_file, row.fingerprint
