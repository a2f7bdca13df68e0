# SPDX-License-Identifier: Apache-2.0
"""The paths of a device's files: the only module that derives one path from another."""

from __future__ import annotations

import os

from vhost_rpmb.errors import UsageError
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Paths", "journal_of", "log_of", "new_of"]


class Paths(NamedTuple):
    """The files of one device, absolute and with symbolic links resolved.

    Resolved once a process by `resolve`, and handed to the store or to the offline check; the
    sandbox gets its folders from the store. A symbolic link to the image therefore leads to the
    same state as the image itself.
    """

    flash: str
    state: str
    key: str | None = None

    @classmethod
    def resolve(
        cls, flash_path: str, state_path: str | None = None, key_path: str | None = None
    ) -> Self:
        """Resolve the paths that options name; by default the state is beside the image.

        Raises UsageError if one file would have two purposes.
        """
        flash = os.path.realpath(flash_path)
        state = _resolve(flash + ".state" if state_path is None else state_path)
        key = None if key_path is None else _resolve(key_path)
        paths = cls(flash, state, key)
        paths._check_collisions()
        return paths

    def _check_collisions(self) -> None:
        new = new_of(self.state)
        uses = [
            (self.flash, "--flash-path"),
            (self.state, "the state path"),
            (log_of(self.state), "the log of the state file"),
            (journal_of(self.state), "the journal of the state file"),
            (new, "the temporary file of the state path"),
            (log_of(new), "the log of the temporary state file"),
            (journal_of(new), "the journal of the temporary state file"),
        ]
        if self.key is not None:
            uses += [
                (self.key, "--key-path"),
                (new_of(self.key), "the temporary file of --key-path"),
            ]
        seen: dict[str, str] = {}
        for path, use in uses:
            if path in seen:
                raise UsageError(
                    f"{seen[path]} and {use} are the same file, {path}: name two files"
                )
            seen[path] = use


def log_of(state_path: str) -> str:
    """Return the path of SQLite's write-ahead log of a state file."""
    return state_path + "-wal"


def journal_of(state_path: str) -> str:
    """Return the path of SQLite's rollback journal of a state file."""
    return state_path + "-journal"


def new_of(path: str) -> str:
    """Return the temporary path of a file, until it is complete."""
    return path + ".new"


def _resolve(path: str) -> str:
    """Resolve symbolic links, except a dangling one: opening it is refused later."""
    real = os.path.realpath(path)
    return os.path.abspath(path) if os.path.islink(path) and not os.path.lexists(real) else real
