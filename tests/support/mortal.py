# SPDX-License-Identifier: Apache-2.0
"""The daemon, which may die at each step: ``python -m tests.support.mortal FILE OPTIONS...``.

At each call of the functions below, and after it, the process kills itself with a probability of
one in the number in FILE (0: never). The product has no such points: they are put around its
functions here. A connection that three processes in a row fail to continue is given up, so that
the third one in a row does not die before it serves.
"""

from __future__ import annotations

import os
import random
import signal
import struct
import sys
from pathlib import Path
from typing import Any

from tests.support.faulty import around
from vhost_rpmb import cli, libc
from vhost_rpmb.daemon import handover, notify
from vhost_rpmb.storage.fleet.etcd import Etcd
from vhost_rpmb.storage.fleet.presence import Presence
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.local import database, store
from vhost_rpmb.vhost_user import inflight, inflight_packed, intake, session, vring

_ODDS = struct.Struct("=II")  # and how many in a row died before they served anything

STEPS: list[tuple[Any, str]] = [
    (notify.Notifier, "send_reliably"),
    (handover.Handover, "save"),
    (handover, "_checksum"),  # between the body of a record and its header
    (handover.Handover, "retain"),
    (libc, "receive_message"),
    (libc, "send_message"),
    (intake.KeptReader, "_store"),
    (session.Session, "_serve"),
    (session.Session, "restore"),
    (session.Session, "run"),
    (inflight.Record, "recover"),
    (inflight.Record, "store"),
    (inflight_packed, "resume"),
    (vring.Vring, "recover"),
    (vring, "signal"),
    (store.Store, "commit"),
    (store.Store, "checkpoint"),
    (store.Store, "checkpoint_slice"),
    (database.Database, "clear_pending"),
    (database.Database, "clear_oldest"),
    (FleetStore, "commit"),
    (FleetStore, "checkpoint"),
    (Presence, "claim"),
    (Etcd, "txn"),
]


def set_odds(path: Path, odds: int) -> None:
    """Let the daemon die at one in so many steps from now on; 0: not at all."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        os.pwrite(fd, _ODDS.pack(odds, 0), 0)  # in one step, because the daemon reads it
    finally:
        os.close(fd)


def main() -> int:
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)
    served = False

    def reach() -> None:
        odds, early = _ODDS.unpack(os.pread(fd, _ODDS.size, 0))
        if odds and not random.randrange(odds) and (served or early < 2):
            os.pwrite(fd, _ODDS.pack(odds, 0 if served else early + 1), 0)
            signal.raise_signal(signal.SIGKILL)  # which the sandbox allows, unlike os.kill()

    def serve() -> None:
        nonlocal served
        served = True

    around(handover.Handover, "served", after=serve)
    for place, name in STEPS:
        around(place, name, before=reach, after=reach)
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
