# SPDX-License-Identifier: Apache-2.0
"""A device that can be handed to another host: its store, and the mode that the options name.

Imported only with --migration.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from vhost_rpmb.daemon.unkept import Unkept
from vhost_rpmb.errors import Fenced, UsageError
from vhost_rpmb.log import Logger
from vhost_rpmb.migration.copying import Copying
from vhost_rpmb.migration.fence import Fence
from vhost_rpmb.migration.handing import Handing
from vhost_rpmb.migration.mode import MovableDevice, superseded
from vhost_rpmb.migration.note import Note
from vhost_rpmb.migration.seal import MigrationKey
from vhost_rpmb.storage.interface import ACTIVE, SUPERSEDED, VACANT, Access, Store
from vhost_rpmb.storage.local.keyfile import read_key_file
from vhost_rpmb.storage.local.opening import check_possession, open_store
from vhost_rpmb.storage.local.shared import SharedFiles
from vhost_rpmb.storage.local.store import Store as LocalStore
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.typed import TYPE_CHECKING, Protocol
from vhost_rpmb.vhost_user.interfaces import DeviceState

if TYPE_CHECKING:
    from vhost_rpmb.daemon.server import Options

__all__ = ["Migration", "make_migration", "open_movable"]

logger = Logger(__name__)


class Migration(DeviceState, Protocol):
    """A mode, as the server uses it."""

    @property
    def folders(self) -> Mapping[str, Access]:
        """Folders that it will use, beside those of the store."""

    def connected(self) -> None:
        """Note that a front-end has connected."""

    def disconnected(self) -> None:
        """Note that the front-end has disconnected."""

    def start(self) -> str | None:
        """Be active, since a ring is to run.

        Return why it must not, an empty string if it may, None to be asked again soon.
        """


def open_movable(options: Options, paths: Paths) -> Store:
    """Open the files of a device that need not be here. Raises as `open_store` does."""
    if options.migration == "shared":
        return SharedFiles(
            paths,
            incoming=options.incoming,
            key_set=options.key_set,
            initial_counter=options.initial_counter,
        )
    if options.fence_path is not None and not os.path.isdir(options.fence_path):
        raise UsageError(
            f"--fence-path={options.fence_path}: expected a folder that all hosts see, found none:"
            " mount or create it"
        )
    store = open_store(
        paths,
        key_set=options.key_set,
        initial_counter=options.initial_counter,
        waiting=True,
        vacant=options.incoming,
    )
    try:
        _check_start(store, options)
    except BaseException:
        store.close()
        raise
    return store


def _check_start(store: LocalStore, options: Options) -> None:
    """Refuse files without a device, and files that another host has outrun, if that is known."""
    possession = store.possession
    if possession.state == VACANT and not options.incoming:
        check_possession(possession, store.name)
    outrun = possession.state == SUPERSEDED
    if possession.state == ACTIVE and options.fence_path is not None:
        possession = possession._replace(generation=possession.generation + 1)
        outrun = Fence(options.fence_path).taken(store.name, possession.generation)
    if outrun and not options.incoming:
        raise Fenced(superseded(store.name, possession))


def make_migration(
    options: Options, store: Store, device: MovableDevice, handover: Unkept
) -> Migration:
    """Return the mode. Raises UsageError for its files."""
    note = Note(handover.note)
    if not handover.record:
        note.clear()
    if isinstance(store, SharedFiles):
        return Handing(store, device, note, incoming=options.incoming)
    if not isinstance(store, LocalStore):
        from vhost_rpmb.migration.tickets import Tickets  # imported lazily: with --store only

        return Tickets(store, device, note, incoming=options.incoming)  # type: ignore[arg-type]
    fence = None if options.fence_path is None else Fence(options.fence_path)
    sealer = None
    if options.migration_key is not None:
        sealer = MigrationKey.load(options.migration_key, logger.warning)
    return Copying(
        store,
        device,
        note,
        fence=fence,
        sealer=sealer,
        key_file=read_key_file(options.key_path, lambda text: None),
        incoming=options.incoming,
        renaming=handover.rename,
    )
