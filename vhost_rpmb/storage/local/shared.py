# SPDX-License-Identifier: Apache-2.0
"""Files that two hosts see: open and locked by the host that has the device, closed by the other.

The device keeps the same memory for its blocks while the files are closed and opened again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable

import vhost_rpmb.storage.local.snapshot  # noqa: F401  # `open` cannot import it in the sandbox
from vhost_rpmb import hashes, sparse
from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.log import Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.interface import ACTIVE, Access, Possession, Resources
from vhost_rpmb.storage.local.image import served_size
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import FAILURES, Store
from vhost_rpmb.storage.paths import Paths

__all__ = ["SharedFiles"]

logger = Logger(__name__)


class SharedFiles:
    """The device in shared files; implements `vhost_rpmb.storage.interface.Store`.

    With ``incoming`` the files are not touched before `open`; otherwise they are opened now, and
    closed again if the device is not here. ``active``: since `begin`, requests may be served.
    Counter, key and replay record are those of the open files.
    """

    confirm = None  # the lock keeps every other daemon out

    def __init__(
        self,
        paths: Paths,
        *,
        incoming: bool,
        key_set: bool = False,
        initial_counter: int | None = None,
        warn: Callable[[str], None] = logger.warning,
    ) -> None:
        self._paths = paths
        self._key_set = key_set
        self._warn = warn
        self._store: Store | None = None
        self.active = False
        # Of a kept connection: the name of the device is not known before the files are open.
        self.name = hashes.sha256(os.fsencode(paths.state)).hex()[:16]
        size = _size_of(paths.flash)
        self._memory = sparse.new(size)
        self.image = memoryview(self._memory)
        self.damaged = bytearray(size // spec.BLOCK_SIZE)
        if not incoming:
            if not os.path.lexists(paths.state):
                options = {"key_set": key_set, "initial_counter": initial_counter}
                open_store(paths, warn=warn, **options).close()  # type: ignore[arg-type]
            self._open_first()

    def _open_first(self) -> None:
        """Open the files of a device that is here; leave them to a host that has it."""
        try:
            self.open()
        except StateError as error:
            if not _is_locked(self._paths.flash):
                raise
            self._warn(f"nothing is served while another host has the device: {error}")
            return
        if self.store.possession.state != ACTIVE:
            self.close()

    @property
    def store(self) -> Store:
        """The open files."""
        assert self._store is not None
        return self._store

    @property
    def opened(self) -> bool:
        """Whether the files are open."""
        return self._store is not None

    def open(self) -> None:
        """Lock and read the files, and change nothing. Raises UsageError and StateError."""
        if not os.path.lexists(self._paths.state):
            raise StateError(
                f"the state file {self._paths.state}: expected the one of a device that arrives,"
                " found none: name the files that both hosts see"
            )
        store = open_store(
            self._paths,
            key_set=self._key_set,
            warn=self._warn,
            waiting=True,
            hold=True,
            memory=self._memory,
        )
        if len(store.image) != len(self.image):
            store.close()
            raise StateError(f"the image {self._paths.flash}: expected the size that it had")
        self.damaged[:] = store.damaged
        store.damaged = self.damaged
        self._store = store

    def begin(self, possession: Possession | None = None) -> None:
        """Serve from the open files; OSError if that cannot be recorded."""
        try:
            self.store.begin(possession=possession)
        except FAILURES as error:
            raise OSError(None, f"it could not be made durable: {error}") from error
        self.active = True

    def leave(self, possession: Possession | None = None) -> None:
        """Close the files, after a change of what they say; OSError changes nothing."""
        if possession is not None:
            self.store.possess(possession)
        self.close()

    # The store

    @property
    def counter(self) -> int:
        """The write counter; 0 while the files are closed."""
        return 0 if self._store is None else self._store.counter

    @property
    def key(self) -> bytes | None:
        """The programmed key; None while the files are closed."""
        return None if self._store is None else self._store.key

    @property
    def replay(self) -> Replay:
        """The record of the last commit; empty while the files are closed."""
        return NO_REPLAY if self._store is None else self._store.replay

    def commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay = NO_REPLAY,
    ) -> bool:
        """Make it durable, see `vhost_rpmb.storage.local.store.Store`."""
        return self.store.commit(counter, blocks, key, replay)

    def settle(self) -> None:
        """Note that no answer is owed."""
        if self._store is not None:
            self._store.settle()

    @property
    def checkpoint_due(self) -> bool:
        """Whether blocks wait to be written into the image."""
        return self.active and self.store.checkpoint_due

    def checkpoint(self) -> bool:
        """Write the pending blocks into the image."""
        return not self.active or self.store.checkpoint()

    def checkpoint_slice(self) -> bool | None:
        """Do a part of it."""
        return self.store.checkpoint_slice() if self.active else True

    def resources(self) -> Resources:
        """Return the folders of the files: they are opened again later."""
        opening = Access.READ | Access.WRITE
        everything = opening | Access.TRUNCATE | Access.CREATE | Access.REMOVE | Access.SYNC
        folders = {os.path.dirname(self._paths.flash): opening}
        for path in (self._paths.state, self._paths.key):
            if path is not None:
                folders[os.path.dirname(path)] = everything
        return Resources(folders)

    def close(self) -> None:
        """Complete the image and release the locks; idempotent."""
        if self._store is not None:
            self._store.close()
        self._store = None
        self.active = False


def _size_of(path: str) -> int:
    """The bytes of an image that are served; UsageError unless it is one."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            size = os.lseek(fd, 0, os.SEEK_END)
        finally:
            os.close(fd)
    except OSError as error:
        raise UsageError(f"the image {path} cannot be opened: {error.strerror}") from error
    return served_size(path, size, "name the image of the device")


def _is_locked(path: str) -> bool:
    """Whether a process has the image of a device open."""
    with open(path, "rb") as image:
        try:
            fcntl.flock(image, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True
    return False
