# SPDX-License-Identifier: Apache-2.0
"""A state database that is read without being changed."""

from __future__ import annotations

import sqlite3

from vhost_rpmb.errors import StateError
from vhost_rpmb.storage.local.database import StateReader
from vhost_rpmb.storage.local.files import open_regular
from vhost_rpmb.storage.local.statefile import check_header, in_use, lock_readers
from vhost_rpmb.storage.local.wal import apply_log
from vhost_rpmb.storage.paths import log_of

__all__ = ["Snapshot"]


class Snapshot(StateReader):
    """A copy of a state database and its log in private memory; the files are not changed."""

    def __init__(self, path: str, *, away: bool = False) -> None:
        starts = check_header(path, away=away)
        content, log = _read_with_log(path)
        super().__init__(sqlite3.connect(":memory:", isolation_level=None), path, away=away)
        try:
            try:
                self._connection.deserialize(apply_log(content, log or b""))
            except ValueError as error:
                raise self._damaged(str(error)) from error
            self._check(starts, log is not None)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free the memory."""
        self._connection.close()


def _read_with_log(path: str) -> tuple[bytes, bytes | None]:
    """Read a state file and its log, if there is one, while no daemon uses them."""
    with open(path, "rb", opener=open_regular) as file:
        try:
            lock_readers(file, path)
        except (BlockingIOError, PermissionError):
            raise StateError(in_use(path)) from None
        content = file.read()
        try:
            with open(log_of(path), "rb", opener=open_regular) as log:
                return content, log.read()
        except FileNotFoundError:
            return content, None
