# SPDX-License-Identifier: Apache-2.0
"""Moving a device between files and a store that hosts share; it is never active in two homes.

Each step is durable before the next one, and a repetition of the command continues wherever an
earlier one was interrupted. In the order of the steps:

- import: mark the files ``moving``, so that they refuse every start; put the chunks; make the
  device exist in one change; mark the files ``moved``.
- export: own the device; write files that are marked ``arriving``; replace its owner by a
  tombstone with the token of these files; delete the contents; remove the mark.
"""

from __future__ import annotations

import os
import secrets
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext

from vhost_rpmb.errors import StateError, UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.fleet import moving as fleet
from vhost_rpmb.storage.fleet.administration import NameTaken, taken
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.ownership import EXPORTED
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.local import moving as local
from vhost_rpmb.storage.local.moving import LocalDevice, Mark
from vhost_rpmb.storage.paths import Paths

__all__ = ["Progress", "export_device", "import_device"]

# Of a number of blocks: a context, in which a function is called with the blocks that are done.
Progress = Callable[[int], AbstractContextManager[Callable[[int], object]]]

_MOVING, _MOVED, _ARRIVING = "moving", "moved", "arriving"


def no_progress(blocks: int) -> AbstractContextManager[Callable[[int], object]]:
    """Show nothing."""
    return nullcontext(lambda blocks: None)


def import_device(
    requests: Requests,
    keys: Keys,
    kek: KeyEncryptionKey,
    paths: Paths,
    *,
    warn: Callable[[str], None],
    progress: Progress = no_progress,
) -> int:
    """Move a stopped device from files into the store; return its size. Raises as `locked` does."""
    with local.locked(paths, warn) as device:
        size = len(device.memory)
        mark = _begin_import(requests, keys, kek, paths, device)
        _check_place(requests, keys, mark)
        if mark.state == _MOVED:
            return size
        try:
            with progress(size // spec.BLOCK_SIZE) as advance:
                fleet.add(
                    *(requests, keys, kek, mark.record, device.memory, device.counter, device.key),
                    advance,
                )
        except NameTaken:
            device.database.set_mark(None)
            raise
        device.database.set_mark(mark._replace(state=_MOVED))
        return size


def _begin_import(
    requests: Requests, keys: Keys, kek: KeyEncryptionKey, paths: Paths, device: LocalDevice
) -> Mark:
    """Return the mark of the files, made durable before anything is put into the store."""
    mark = device.mark
    if mark is None:
        owner, _ = fleet.home(requests, keys)
        if owner is not None and owner.state != EXPORTED:
            raise taken(keys)
        origin = f"imported from {paths.flash} of host {socket.gethostname()}"
        record = fleet.describe_new(keys, kek, len(device.memory), origin)
        mark = Mark(_MOVING, fleet.place_of(requests, keys), keys.device, record)
        device.database.set_mark(mark)
    elif mark.state not in (_MOVING, _MOVED):
        raise _wrong_move(paths, mark, "import")
    elif mark.device != keys.device:
        raise UsageError(
            f"the device of {paths.state}: expected the name {mark.device} of the first attempt,"
            f" found {keys.device}: name that one"
        )
    return mark


def _check_place(requests: Requests, keys: Keys, mark: Mark) -> None:
    """Refuse another store than that of the first attempt, which may have added the device."""
    place = fleet.place_of(requests, keys)
    if place != mark.place and fleet.home(requests, keys)[1] != mark.record:
        raise StateError(
            f"the import of {keys.device}: expected the store {mark.place!r} of the first attempt,"
            f" found {place!r}: repeat it with that one"
        )


def _wrong_move(paths: Paths, mark: Mark, found: str) -> UsageError:
    expected = "export" if mark.state == _ARRIVING else "import"
    return UsageError(
        f"the device of {paths.state}: expected the {expected} of {mark.device} to be repeated,"
        f" found an {found}: repeat that one"
    )


def export_device(
    requests: Requests,
    keys: Keys,
    paths: Paths,
    open_store: Callable[[], FleetStore],
    *,
    progress: Progress = no_progress,
) -> int:
    """Move a device into new files; return its size. ``open_store`` takes it over.

    Raises UsageError, StateError, and `Fenced` if a daemon takes the device over meanwhile.
    """
    if local.complete(paths):
        return os.path.getsize(paths.flash)
    mark = local.mark_of(paths) if os.path.lexists(paths.state) else None
    if mark is not None and (mark.state != _ARRIVING or mark.device != keys.device):
        raise _wrong_move(paths, mark, f"export of {keys.device}")
    owner, _ = fleet.home(requests, keys)
    if mark is None or owner is None or owner.token.encode() != mark.record:
        mark = _hand_out(requests, keys, paths, open_store, progress)
    fleet.discard(requests, keys, mark.record.decode())
    local.unmark(paths)
    return os.path.getsize(paths.flash)


def _hand_out(
    requests: Requests,
    keys: Keys,
    paths: Paths,
    open_store: Callable[[], FleetStore],
    progress: Progress,
) -> Mark:
    """Write marked files of the device, then replace its owner by their token."""
    with closing(open_store()) as store:
        # From here on no change of an earlier attempt applies.
        place = fleet.place_of(requests, keys)
        mark = Mark(_ARRIVING, place, keys.device, secrets.token_hex(16).encode())
        with progress(len(store.image) // spec.BLOCK_SIZE) as advance:
            local.create_files(paths, store.image, store.counter, store.key, mark, advance)
        store.hand_out(mark.record.decode())
    return mark
