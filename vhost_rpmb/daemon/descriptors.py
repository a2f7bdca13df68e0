# SPDX-License-Identifier: Apache-2.0
"""The descriptor store of a service manager: descriptors that outlive the process.

The protocol of sd_pid_notify_with_fds(3). Properties of systemd that this module depends on:

- It silently drops a descriptor of an open file that it has already, and those above its limit.
  Both are therefore determined here, before a descriptor is sent.
- It watches descriptors for a hang-up unless FDPOLL=0 is given; the next process has to see it.
- The order in which it passes descriptors is undefined, and a name may occur twice: names decide,
  and a name that two files have is of no use.
"""

from __future__ import annotations

import os
from collections.abc import Collection, MutableMapping

from vhost_rpmb import libc
from vhost_rpmb.daemon.notify import Notifier
from vhost_rpmb.typed import NamedTuple

__all__ = ["DescriptorStore", "StoreError"]

PREFIX = "rpmb-"  # of the names of all descriptors that are ours

_FIRST = 3  # SD_LISTEN_FDS_START
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "FDSTORE")


class StoreError(Exception):
    """The service manager cannot keep a descriptor; the text says why."""


class _File(NamedTuple):
    fd: int
    inode: tuple[int, int]  # device and number: only files that agree in it are compared


class DescriptorStore:
    """Descriptors by name: the service manager's, and a copy of each in this process.

    The variables are removed from ``environment``. ``managed``: there is a service manager, with
    room for ``limit`` descriptors (0: it has no store). ``inherited`` holds the numbers of the
    descriptors that an earlier process stored; they belong to this object. A name in ``ambiguous``
    has two of them, and is of no use.
    """

    def __init__(self, notifier: Notifier, environment: MutableMapping[str, str]) -> None:
        self._notifier = notifier
        variables = {name: environment.pop(name, "") for name in _VARIABLES}
        self.managed = notifier.active
        self.limit = _number(variables["FDSTORE"]) if self.managed else 0
        self._files: dict[str, _File] = {}
        self._by_inode: dict[tuple[int, int], set[str]] = {}
        self.inherited: frozenset[int] = frozenset()
        self.ambiguous: set[str] = set()
        if _number(variables["LISTEN_PID"]) == os.getpid():
            names = variables["LISTEN_FDNAMES"].split(":")
            self._adopt(names[: _number(variables["LISTEN_FDS"])])

    @property
    def names(self) -> frozenset[str]:
        """The names of all stored descriptors."""
        return frozenset(self._files)

    def get(self, name: str) -> int:
        """The descriptor of this name, which stays ours; KeyError if there is none."""
        return self._files[name].fd

    def find(self, fd: int) -> str | None:
        """The name under which the open file of a descriptor is stored; OSError."""
        status = os.fstat(fd)
        for name in self._by_inode.get((status.st_dev, status.st_ino), ()):
            if libc.same_file(fd, self._files[name].fd):
                return name
        return None

    def add(self, name: str, fd: int) -> None:
        """Store a copy of a descriptor whose open file is not stored yet.

        StoreError if the service manager cannot keep it.
        """
        if len(self._files) >= self.limit:
            raise StoreError(
                f"expected room for more than {self.limit} descriptors in the service manager's "
                "store: increase FileDescriptorStoreMax="
            )
        try:
            libc.same_file(fd, fd)
            copy = os.dup(fd)
        except OSError as error:
            raise StoreError(
                f"descriptors cannot be compared or copied: {error.strerror}"
            ) from None
        self._remember(name, copy)
        try:
            self._notifier.send_reliably("FDSTORE=1", f"FDNAME={name}", "FDPOLL=0", fds=[copy])
        except OSError as error:
            self._forget(name)
            raise StoreError(
                f"the service manager does not take descriptors: {error.strerror}"
            ) from None

    def remove(self, names: Collection[str]) -> None:
        """Remove stored descriptors; StoreError if the service manager cannot be reached."""
        present = self.names | self.ambiguous
        removed = [name for name in names if name in present]
        for name in removed:
            self._forget(name)
        self.ambiguous.difference_update(removed)
        try:
            for name in removed:
                self._notifier.send_reliably("FDSTOREREMOVE=1", f"FDNAME={name}")
        except OSError as error:
            raise StoreError(
                f"the service manager does not remove descriptors: {error.strerror}"
            ) from None

    def close(self) -> None:
        """Close the copies of this process; the service manager keeps its own."""
        for name in self.names:
            self._forget(name)

    def _adopt(self, names: list[str]) -> None:
        """Take the descriptors with our prefix."""
        inherited: set[int] = set()
        for fd, name in enumerate(names, _FIRST):
            if not name.startswith(PREFIX):
                continue
            try:
                os.set_inheritable(fd, False)
            except OSError:
                continue  # not open
            inherited.add(fd)
            if name in self._files:
                self.ambiguous.add(name)
                os.close(fd)
            else:
                self._remember(name, fd)
        self.inherited = frozenset(inherited)
        for name in self.ambiguous:
            self._forget(name)

    def _remember(self, name: str, fd: int) -> None:
        status = os.fstat(fd)
        inode = status.st_dev, status.st_ino
        self._files[name] = _File(fd, inode)
        self._by_inode.setdefault(inode, set()).add(name)

    def _forget(self, name: str) -> None:
        file = self._files.pop(name, None)
        if file is not None:
            self._by_inode[file.inode].discard(name)
            os.close(file.fd)


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) <= 9 else 0
