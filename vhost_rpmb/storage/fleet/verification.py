# SPDX-License-Identifier: Apache-2.0
"""Verification of a device as a start would, without owning it: a daemon may serve it meanwhile."""

from __future__ import annotations

from typing import NamedTuple

from vhost_rpmb.errors import StateError
from vhost_rpmb.storage.fleet.contents import load, open_device
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.ownership import active_owner
from vhost_rpmb.storage.fleet.requests import Requests, named_refusals
from vhost_rpmb.storage.fleet.seal import KeyEncryptionKey

__all__ = ["Verified", "verify"]

_TRIES = 100
_PAUSE = 0.02  # seconds


class Verified(NamedTuple):
    """What was verified: all of it belongs to the authenticated head."""

    device: str
    size: int
    counter: int
    programmed: bool
    chunks: int  # that are not zeros
    log_bytes: int  # sealed entries that are not in the chunks yet


def verify(requests: Requests, keys: Keys, kek: KeyEncryptionKey) -> Verified:
    """Read and authenticate head, key, chunks and log. Raises StateError."""
    with named_refusals(f"to read {keys.device}"):
        for _ in range(_TRIES):
            found = requests.read([], [keys.owner, keys.info, keys.head]).found
            if keys.owner in found:
                active_owner(found[keys.owner], keys.device)
            device = open_device(keys, found.get(keys.info), found.get(keys.head), kek)
            try:
                contents = load(requests, keys, device)
            except StateError:
                if requests.read([], [keys.head]).found.get(keys.head) == device.head_record:
                    raise
                requests.wait(_PAUSE)  # a daemon changed the state while it was read
                continue
            head, used = device.head, set(contents.pending)
            used |= {number for number, version in enumerate(contents.versions) if version}
            return Verified(
                *(keys.device, device.info.size, head.counter, head.programmed),
                *(len(used), contents.log_bytes),
            )
    raise StateError(
        f"the device {keys.device}: expected a pause of its daemon's writes, found none: repeat the"
        " command when the virtual machine is idle"
    )
