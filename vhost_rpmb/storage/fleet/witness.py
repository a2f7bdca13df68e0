# SPDX-License-Identifier: Apache-2.0
"""What this host knows of the store: a restored backup, which is a replay, is found by it.

After a restore the engine's identity, its leases and its terms are the same as before; only values
went back. Each device that a daemon of this host served has a file with the latest revision of the
engine and the latest head. The files of one *incarnation* of the store belong together; another
incarnation is the operator's statement that a restore was intended.
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from typing import NamedTuple

from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.log import FailureLog, Logger
from vhost_rpmb.storage.fleet.layout import Head
from vhost_rpmb.storage.interface import Access, Resources

__all__ = ["Witness"]

logger = Logger(__name__)


class _Seen(NamedTuple):
    revision: int
    counter: int
    seq: int
    chain: str


class Witness:
    """The witness files of one host in a folder, which must exist."""

    def __init__(self, folder: str, incarnation: bytes) -> None:
        self._folder = os.path.realpath(folder)
        self._incarnation = incarnation.hex()
        self._failures = FailureLog(logger)
        self._noted: tuple[str, Head, int] | None = None

    def _path(self, device: str) -> str:
        return os.path.join(self._folder, f"{self._incarnation}-{device}.json")

    def check(self, device: str, head: Head, revision: int) -> None:
        """Raise `Fenced` if the store went back behind what this host saw.

        Raises StateError if that cannot be read.
        """
        try:
            names = os.listdir(self._folder)
        except OSError as error:
            raise StateError(f"the witness folder {self._folder}: {error.strerror}") from error
        pattern = re.compile(rf"{self._incarnation}-(.+)\.json")
        for match in filter(None, map(pattern.fullmatch, names)):
            seen = self._read(match[1])
            if revision < seen.revision:
                raise self._went_back(f"revision {revision}, while this host saw {seen.revision}")
            if match[1] != device:
                continue
            if head.counter < seen.counter or head.seq < seen.seq:
                raise self._went_back(
                    f"device {device} with write counter {head.counter}, while this host saw"
                    f" {seen.counter}"
                )
            if head.seq == seen.seq and head.chain.hex() != seen.chain:
                raise self._went_back(f"other writes of device {device} than this host saw")

    def _went_back(self, found: str) -> Fenced:
        return Fenced(
            f"the store went back: expected no earlier state, found {found}: if a backup was"
            " restored on purpose, accept the device"
        )

    def _read(self, device: str) -> _Seen:
        path = self._path(device)
        try:
            with open(path, encoding="utf-8") as file:
                seen = _Seen(**json.load(file))
            if any(type(value) is not int for value in seen[:3]):
                raise ValueError
        except (OSError, ValueError, TypeError) as error:
            raise StateError(
                f"the witness file {path}: expected a record of the store, found another: remove it"
                " if the store was not restored from a backup"
            ) from error
        return seen

    def note(self, device: str, head: Head, revision: int) -> None:
        """Remember a state until `flush` records it: no guest waits for a disk."""
        self._noted = device, head, revision

    @property
    def pending(self) -> bool:
        """Whether `flush` has work."""
        return self._noted is not None

    def flush(self) -> None:
        """Record the state that was noted last, if it is not recorded."""
        if self._noted is not None:
            self.record(*self._noted)

    def record(self, device: str, head: Head, revision: int) -> None:
        """Record the state; a failure is logged once, since no commit depends on it."""
        self._noted = None
        seen = _Seen(revision, head.counter, head.seq, head.chain.hex())
        path = self._path(device)
        new = path + ".new"
        failure = ""
        try:
            # One that a killed process left: a sandbox does not allow to truncate it.
            with suppress(FileNotFoundError):
                os.unlink(new)
            with open(new, "x", encoding="utf-8") as file:
                json.dump(seen._asdict(), file)
                file.flush()
                os.fdatasync(file.fileno())
            os.replace(new, path)
        except OSError as error:
            failure = f"the witness file {path} could not be written: {error.strerror}"
            with suppress(OSError):
                os.unlink(new)
        self._failures.report(failure)

    def resources(self) -> Resources:
        """Return the access that `check` and `record` need."""
        access = Access.CREATE | Access.REMOVE | Access.WRITE | Access.READ
        return Resources({self._folder: access})
