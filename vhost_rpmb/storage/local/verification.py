# SPDX-License-Identifier: Apache-2.0
"""The check of a device that is not running."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import closing

from vhost_rpmb.errors import StateError
from vhost_rpmb.log import Logger
from vhost_rpmb.storage.interface import Possession
from vhost_rpmb.storage.local.contents import load
from vhost_rpmb.storage.local.image import ImageFile
from vhost_rpmb.storage.local.keyfile import read_key_file
from vhost_rpmb.storage.local.opening import check_size, choose_key, mismatch, named_errors
from vhost_rpmb.storage.local.snapshot import Snapshot
from vhost_rpmb.storage.local.statefile import check_neighbours
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.typed import NamedTuple

__all__ = ["Report", "verify"]

logger = Logger(__name__)


class Report(NamedTuple):
    """The result of `verify`; ``pending`` and ``damaged`` are addresses of blocks, ascending."""

    state_path: str
    blocks: int
    counter: int
    programmed: bool
    key_in_file: bool
    clean: bool  # the state was closed by the last stop
    pending: list[int]
    damaged: list[int]
    possession: Possession
    disagreement: str  # the files that do not belong together, and what to do; or empty


def verify(paths: Paths, *, warn: Callable[[str], None] = logger.warning) -> Report:
    """Check a device that is not running, as a start would, without changing anything.

    ``paths.key`` is needed only to check the key file. Raises UsageError and StateError as
    `open_store` does, but reports an image that does not belong to the state.
    """
    with closing(ImageFile(paths.flash, warn, writable=False)) as image:
        if not os.path.lexists(paths.state):
            raise StateError(
                f"the state file {paths.state} does not exist: name the one that belongs to"
                f" {paths.flash} with --state-path"
            )
        with named_errors(paths.state):
            check_neighbours(paths.state)
            with closing(Snapshot(paths.state)) as database:
                row = database.device()
                check_size(image, row, paths.state)
                if paths.key is not None:
                    choose_key(row, paths, read_key_file(paths.key, warn), False, warn)
                contents = load(image, database)
                disagreement = mismatch(image, row, paths.state, contents)
    return Report(
        state_path=paths.state,
        blocks=len(contents.damaged),
        counter=row.counter,
        programmed=row.key is not None or row.fingerprint is not None,
        key_in_file=row.fingerprint is not None,
        clean=not row.running,
        pending=sorted(contents.pending),
        damaged=contents.lost,
        possession=row.possession,
        disagreement=disagreement,
    )
