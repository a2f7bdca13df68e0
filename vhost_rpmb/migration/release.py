# SPDX-License-Identifier: Apache-2.0
"""Taking a device back by the operator's word: it is not in use on any other host."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing

from vhost_rpmb.errors import Fenced, StateError, UsageError
from vhost_rpmb.migration.fence import Fence
from vhost_rpmb.migration.mode import superseded
from vhost_rpmb.storage.interface import ACTIVE, EXPORTED, SUPERSEDED, Possession
from vhost_rpmb.storage.local.opening import check_possession, open_store
from vhost_rpmb.storage.local.store import FAILURES
from vhost_rpmb.storage.paths import Paths

__all__ = ["release"]


def release(paths: Paths, fence: Fence | None, warn: Callable[[str], None]) -> tuple[str, int]:
    """Make a device that was handed over active in its files; return its name and generation.

    With a fence folder only if no other host has claimed it. Idempotent. Raises UsageError,
    StateError, and `Fenced` if another host has claimed the device.
    """
    with closing(open_store(paths, warn=warn, waiting=True, hold=True)) as store:
        possession = store.possession
        if possession.state == ACTIVE:
            return store.name, possession.generation
        if possession.state not in (EXPORTED, SUPERSEDED):
            check_possession(possession, store.name)
        try:
            won = possession.state == EXPORTED and (
                fence is None or fence.claim(store.name, possession.generation, possession.claim)
            )
        except OSError as error:
            raise UsageError(
                f"--fence-path: the folder cannot be used: {error.strerror}"
            ) from error
        if not won:
            raise Fenced(superseded(store.name, possession))
        try:
            store.begin(possession=Possession(ACTIVE, possession.generation))
        except FAILURES as error:
            raise StateError(f"{paths.state}: it could not be made durable: {error}") from error
        return store.name, possession.generation
