# SPDX-License-Identifier: Apache-2.0
"""The store of a running device: commits into the database, checkpoints into the image.

An acknowledged commit is never lost; docs/durability.md lists the guarantees and their tests.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import suppress

from vhost_rpmb.log import FailureLog, Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.interface import Access, Possession, Received, Resources
from vhost_rpmb.storage.local.background import Background
from vhost_rpmb.storage.local.contents import Contents
from vhost_rpmb.storage.local.database import Database, DeviceRow
from vhost_rpmb.storage.local.image import ImageFile, Stamp, ranges, runs
from vhost_rpmb.storage.local.keyfile import fingerprint, write_key_file
from vhost_rpmb.storage.paths import Paths

__all__ = ["FAILURES", "Store", "resources"]

logger = Logger(__name__)

MAX_PENDING = 4096  # blocks stored in the database before a checkpoint writes them into the image
# Of a slice, which a request may have to wait for.
_SLICE_BLOCKS = 16
_SLICE_COMMITS = 16
_SLICE_SECONDS = 0.0002  # of waiting for the sync of the image

# Exceptions of a durable step that are answered with a failure instead of ending the process.
FAILURES = (sqlite3.Error, OSError, MemoryError)


def resources(paths: Paths, programmed: bool) -> Resources:
    """Return the folders that an open store still uses, ``programmed`` with a key or not.

    The image, the state file and its log stay open. SQLite removes the log at the end; if the state
    file cannot be marked as closed, an empty log replaces it. A key file is written once.
    """
    access = Access.CREATE | Access.REMOVE | Access.SYNC
    folders = {os.path.dirname(paths.state): access}
    if paths.key is not None and not programmed:
        folders[os.path.dirname(paths.key)] = access | Access.WRITE
    return Resources(folders)


class Store:
    """The durable state of one device in local files; implements `vhost_rpmb.storage.interface`.

    A commit is a transaction of the database. A checkpoint moves its blocks into the image.
    """

    confirm = None  # the lock keeps every other daemon out

    def __init__(
        self,
        paths: Paths,
        database: Database,
        image_file: ImageFile,
        row: DeviceRow,
        key: bytes | None,
        contents: Contents,
    ) -> None:
        self._paths = paths
        self._database = database
        self._image_file = image_file
        self._closed = False
        self._commit_uncertain = False  # a commit reported as failed may be durable
        self._failures = FailureLog(logger, "writes are made durable again")
        self._begun = False  # the files say that the device is in use
        self._starts = row.starts + 1
        self.name = row.name
        self.counter = row.counter
        self.key = key
        self.replay = row.replay
        self.possession = row.possession
        self._owed = bool(row.replay.chains)  # answers of the last commit may not be published
        self.image = memoryview(contents.memory)
        self.damaged = contents.damaged
        self._pending = contents.pending
        self._slices: Iterator[None] | None = None  # of the checkpoint that is under way
        # Blocks that a checkpoint moved into the image; the next durable transaction deletes them
        # from the database, where they count so much.
        self._moved: set[int] = set()
        self._moved_total = 0
        self._database_blocks = contents.pending_total
        self._checkpoint_at = MAX_PENDING
        lost = contents.lost
        if lost:
            logger.error(
                "%d blocks of %s are not what was stored there, and cannot be read until they are"
                " written again: address %s",
                len(lost),
                image_file.path,
                ranges(lost),
            )

    def begin(self, fingerprint: bytes | None = None, possession: Possession | None = None) -> None:
        """Record that the device is in use; until then nothing is changed.

        ``fingerprint``: of a key that counts as programmed from now on. ``possession`` replaces the
        present one in the same transaction. Raises sqlite3.Error and OSError.
        """
        if fingerprint is not None:
            self._database.program(None, fingerprint)
        self._database.warm_log()
        self._begun = True
        self._database.mark_running(self._starts, possession)
        if possession is not None:
            self.possession = possession
        self._set_stamp()

    def _set_stamp(self) -> None:
        self._database.set_stamped(self._image_file.set_stamp(Stamp(self.name, self._starts)))

    def possess(self, possession: Possession) -> None:
        """Record durably whether the device may answer. OSError, with everything unchanged."""
        try:
            self._rewrite_uncertain_commit()
            self._commit_uncertain = True
            with self._database.transaction():
                self._database.possess(possession)
            self._made_durable()
        except FAILURES as error:
            self._undo(None)
            raise OSError(None, f"it could not be made durable: {_why(error)}") from error
        self.possession = possession

    def adopt(self, received: Received, possession: Possession) -> None:
        """Replace the device by one that was received, in one transaction.

        OSError, with everything unchanged.
        """
        if not self.checkpoint():
            raise OSError(None, "the image cannot be written")
        size = spec.BLOCK_SIZE
        memory = received.image
        changed = [
            (address, memory[address * size : (address + 1) * size])
            for address, mark in enumerate(self.damaged)
            if address not in received.damaged
            and (mark or memory[address * size : (address + 1) * size] != self._block(address))
        ]
        new_key = received.key if self.key is None else None
        try:
            self._rewrite_uncertain_commit()
            if new_key is not None and self._paths.key is not None:
                write_key_file(self._paths.key, new_key)
            self._commit_uncertain = True
            with self._database.transaction():
                self._database.rename(received.name)
                self._database.possess(possession)
                if new_key is not None:
                    self._database.program(*self._columns(new_key))
                self._database.mark_damaged(received.damaged)
                self._database.add_pending(received.counter, changed, received.replay)
            self._made_durable()
        except FAILURES as error:
            self._undo(new_key)
            raise OSError(None, f"it could not be made durable: {_why(error)}") from error
        self.name, self.possession = received.name, possession
        self.counter, self.replay = received.counter, received.replay
        self.key = received.key
        self._owed = bool(received.replay.chains)
        self.image[:] = memory
        self.damaged[:] = bytes(len(self.damaged))
        for address in received.damaged:
            self.damaged[address] = 1
        self._pending.update(address for address, _ in changed)
        self._database_blocks += len(changed)
        with suppress(*FAILURES):
            self._set_stamp()

    def _block(self, address: int) -> bytes:
        start = address * spec.BLOCK_SIZE
        return bytes(self.image[start : start + spec.BLOCK_SIZE])

    def commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay = NO_REPLAY,
    ) -> bool:
        """Make a write counter, blocks, a new key and a replay record durable atomically.

        Return False, with everything unchanged, if that fails; the reason is logged.
        """
        try:
            self._rewrite_uncertain_commit()
            if key is not None and self._paths.key is not None:
                write_key_file(self._paths.key, key)
            self._commit_uncertain = True
            if key is None and not self._database.has_waiting:
                self._database.add_pending(counter, blocks, replay)
            else:
                with self._database.transaction():
                    if key is not None:
                        self._database.program(*self._columns(key))
                    self._database.add_pending(counter, blocks, replay)
            self._made_durable()
        except FAILURES as error:
            self._failures.report(f"a write could not be made durable: {_why(error)}")
            self._undo(key)
            return False
        self._failures.report("")
        self.counter = counter
        self.replay = replay
        self._owed = True
        if key is not None:
            self.key = key
        for address, data in blocks:
            start = address * spec.BLOCK_SIZE
            self.image[start : start + spec.BLOCK_SIZE] = data
            self.damaged[address] = 0
            self._pending.add(address)
        self._database_blocks += len(blocks)
        if self._database_blocks >= self._checkpoint_at:
            self.checkpoint()
        return True

    def settle(self) -> None:
        """Note that no answer is owed, so that `close` empties the replay record."""
        self._owed = False

    @property
    def owed(self) -> Replay:
        """The record of answers that are owed; empty if there are none."""
        return self.replay if self._owed else NO_REPLAY

    def _columns(self, key: bytes) -> tuple[bytes | None, bytes | None]:
        """Return the columns of a key: itself, or its fingerprint if a file has the key."""
        return (key, None) if self._paths.key is None else (None, fingerprint(key))

    def _made_durable(self) -> None:
        """Note that a transaction, and what waited for it, is durable."""
        self._commit_uncertain = False
        if self._moved:
            self._moved = set()

    def _undo(self, key: bytes | None) -> None:
        """Make sure that a failed commit stays undone; else the next commit does it first."""
        self._undo_moves()
        with suppress(*FAILURES):
            self._rewrite_uncertain_commit()
            if key is not None and self._paths.key is not None:
                os.unlink(self._paths.key)  # last: until here the state might refer to it

    def _rewrite_uncertain_commit(self) -> None:
        """Overwrite a failed commit with one of no blocks: present counter, key and record.

        A commit whose sync failed may be on the disk all the same. Both begin at the same place of
        the log, which is read only as far as each transaction continues the one before. Raises
        sqlite3.Error as long as the empty commit cannot be made durable either.
        """
        if not self._commit_uncertain:
            return
        with self._database.transaction():
            if self.key is None:
                self._database.program(None, None)
            self._database.rename(self.name)
            self._database.possess(self.possession)
            self._database.add_pending(self.counter, (), self.replay)
        self._made_durable()

    def _compact_pending(self) -> None:
        """Store each pending block once; without it they would accumulate while the image fails."""
        addresses = sorted(self._pending)
        self._commit_uncertain = True
        with self._database.transaction():
            self._database.clear_pending(self.counter, self.replay)
            blocks = ((address, self._block(address)) for address in addresses)
            self._database.add_pending(self.counter, blocks, self.replay)
        self._made_durable()
        self._database_blocks = len(addresses)

    @property
    def checkpoint_due(self) -> bool:
        """Whether blocks wait in the database to be written into the image."""
        return bool(self._pending) or self._slices is not None

    def checkpoint(self) -> bool:
        """Write the pending blocks into the image, and delete them from the database.

        Return False if that fails; nothing is lost, the reason is logged.
        """
        self._drop_slices()
        if not self._pending and not self._database.has_waiting:
            return True
        addresses = sorted(self._pending)
        try:
            self._rewrite_uncertain_commit()
            for first, count in runs(addresses):
                start = first * spec.BLOCK_SIZE
                self._image_file.write(start, self.image[start : start + count * spec.BLOCK_SIZE])
            self._image_file.sync()
            with self._database.transaction():
                self._database.set_digests((a, self._block(a)) for a in addresses)
                self._database.clear_pending(self.counter, self.replay)
            self._made_durable()
        except FAILURES as error:
            self._checkpoint_failed(error)
            return False
        self._pending.clear()
        self._database_blocks = 0
        self._checkpoint_at = MAX_PENDING
        return True

    def _checkpoint_failed(self, error: BaseException) -> None:
        # Every block is written again at the next try: after a failed sync the kernel may have
        # marked pages clean that are not on the disk.
        self._undo_moves()
        self._commit_uncertain = True
        with suppress(*FAILURES):
            self._compact_pending()
        self._checkpoint_at = self._database_blocks + MAX_PENDING // 4
        logger.error(
            "%d blocks could not be written into %s (they stay in the state database): %s",
            len(self._pending),
            self._image_file.path,
            _why(error),
        )

    def checkpoint_slice(self) -> bool | None:
        """Do a part of a checkpoint; None: more is left. Otherwise as `checkpoint`.

        Between two parts the device may be served: what is committed then stays pending.
        """
        try:
            self._rewrite_uncertain_commit()
            if self._slices is None:
                self._slices = self._slice_checkpoint()
            next(self._slices)
        except StopIteration:
            self._slices = None
            return True
        except FAILURES as error:
            self._checkpoint_failed(error)
            return False
        return None

    def _drop_slices(self) -> None:
        """End a checkpoint that is under way, as if it had not begun."""
        if self._slices is not None:
            slices, self._slices = self._slices, None
            with suppress(*FAILURES):  # of the sync that it waits for
                slices.close()  # type: ignore[attr-defined]

    def _undo_moves(self) -> None:
        """Undo what a checkpoint in slices did since the last durable transaction."""
        self._drop_slices()
        with suppress(*FAILURES):
            self._database.undo_waiting()
        if self._moved:
            self._pending |= self._moved
            self._database_blocks += self._moved_total
            self._moved = set()

    def _slice_checkpoint(self) -> Iterator[None]:
        """The steps of `checkpoint`, about the blocks that are pending now.

        Nothing is synced in the database: its changes wait for the next durable transaction, which
        may be a commit of the guest between two steps. A block that is committed meanwhile has a
        later row, and its digest is not read before that row is gone. Rows go from the oldest on;
        the last one, which has the counter, together with the counter's move to the device's row.
        """
        moved, self._pending = self._pending, set()
        blocks, counter, replay = self._database_blocks, self.counter, self.replay
        sync = None
        try:
            last = self._database.last_pending()
            addresses = sorted(moved)
            parts = [
                addresses[start : start + _SLICE_BLOCKS]
                for start in range(0, len(addresses), _SLICE_BLOCKS)
            ]
            for part in parts:
                for first, count in runs(part):
                    start = first * spec.BLOCK_SIZE
                    end = start + count * spec.BLOCK_SIZE
                    self._image_file.write(start, self.image[start:end])
                yield
            sync = Background(self._image_file.sync)
            while not sync.ended(_SLICE_SECONDS):
                yield
            for part in parts:
                with self._database.waiting():
                    self._database.set_digests((a, self._block(a)) for a in part)
                yield
            while True:
                with self._database.waiting():
                    if not self._database.clear_oldest(last, _SLICE_COMMITS):
                        self._database.clear_pending(counter, replay, last)
                        break
                yield
            self._moved, moved = moved, set()
            self._moved_total = blocks
            self._database_blocks -= blocks
            self._checkpoint_at = MAX_PENDING
        finally:
            self._pending |= moved
            if sync is not None:
                sync.ended()  # before the file is closed

    def resources(self) -> Resources:
        """Return the folders in which serving and closing create, write or remove files."""
        return resources(self._paths, self.key is not None)

    def close(self) -> None:
        """Complete the image, mark the state as clean, and release the locks; idempotent."""
        if self._closed:
            return
        self._closed = True
        try:
            try:
                if self._begun:
                    self._complete()
            finally:
                # Also after an error of our own: without the mark, the log that SQLite removes at
                # the end of the process would be missed by the next start.
                self._database.close()
        except FAILURES as error:
            logger.error("the state could not be marked as clean: %s", _why(error))
        finally:
            self._image_file.close()

    def _complete(self) -> None:
        """Do what the next start would have to do, as far as the disk allows it."""
        self.checkpoint()
        try:
            self._clear_settled()
        except FAILURES:
            # Retried once: if the disk failed for a moment only, the stop is clean all the same.
            with suppress(*FAILURES):
                self._clear_settled()

    def _clear_settled(self) -> None:
        """Empty the replay record unless an answer is owed."""
        self._rewrite_uncertain_commit()
        if self.replay.chains and not self._owed:
            with self._database.transaction():
                self._database.clear_replay()


def _why(error: BaseException) -> str:
    """Return the text of a failure; a MemoryError has none of its own."""
    return str(error) or "out of memory"
