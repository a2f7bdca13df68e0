# SPDX-License-Identifier: Apache-2.0
"""The daemon, with points at which it dies: ``python -m tests.support.faulty FILE OPTIONS...``.

FILE has the name of a point, written by `Faults`. A process that reaches that point empties the
file and kills itself, so that the next one passes it; with a ``!`` before the name the file stays,
with a ``~`` the process stops as by SIGSTOP.
The product has no such points: they are put around its methods here.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vhost_rpmb import cli
from vhost_rpmb.daemon import handover
from vhost_rpmb.migration.copying import Copying
from vhost_rpmb.migration.handing import Handing
from vhost_rpmb.migration.tickets import Tickets
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.fleet.tenancy import Tenancy
from vhost_rpmb.storage.local import store
from vhost_rpmb.vhost_user import foreign, intake, session, transfer

# In the order of the steps of a message.
POINTS = ("peeked", "stored", "saving", "saved", "consumed", "handled", "replied", "removed")
# In the order of the steps of a transfer of device state; "part" is of the bytes.
SAVING = ("giving", "given", "moving", "part", "moved", "checking")
LOADING = ("moving", "part", "moved", "checking", "loading", "loaded")
_SIZE = 32


class Faults:
    """The test's side: a file that names the point at which the daemon dies next."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "fault"
        self.path.write_bytes(bytes(_SIZE))

    def command(self, *options: str) -> list[str]:
        """The command of a daemon that dies at the points."""
        return [sys.executable, "-m", "tests.support.faulty", str(self.path), *options]

    def arm(self, point: str) -> None:
        """Let the daemon die (or stop) at the next occurrence of a point."""
        with self.path.open("r+b") as file:
            file.write(point.encode().ljust(_SIZE, b"\0"))

    @property
    def armed(self) -> bool:
        """Whether the daemon has not reached the point since."""
        return any(self.path.read_bytes())


def around(
    place: Any,
    name: str,
    before: Callable[[], None] | None = None,
    after: Callable[[], None] | None = None,
) -> None:
    """Replace a function of a module or class by itself, with something before and after it."""
    function: Callable[..., Any] = getattr(place, name)

    @functools.wraps(function)
    def surrounded(*arguments: Any, **keywords: Any) -> Any:
        if before is not None:
            before()
        result = function(*arguments, **keywords)
        if after is not None:
            after()
        return result

    setattr(place, name, surrounded)


def main() -> int:
    fd = os.open(sys.argv[1], os.O_RDWR | os.O_CLOEXEC)

    def reach(point: str) -> None:
        armed = os.pread(fd, _SIZE, 0).rstrip(b"\0").decode()
        if armed.lstrip("!~") != point:
            return
        if not armed.startswith("!"):
            os.pwrite(fd, bytes(_SIZE), 0)
        # The sandbox allows this, unlike os.kill().
        signal.raise_signal(signal.SIGSTOP if armed.startswith("~") else signal.SIGKILL)

    def at(point: str) -> Callable[[], None]:
        return functools.partial(reach, point)

    around(intake.KeptReader, "_store", before=at("peeked"))
    around(handover.Handover, "store", after=at("stored"))
    around(handover, "_checksum", before=at("saving"))  # the body is written, its header is not
    around(handover.Handover, "save", after=at("saved"))
    around(handover.Handover, "consume", after=at("consumed"))
    around(session.Session, "_conclude", before=at("handled"))
    around(handover.Handover, "reply", after=at("replied"))
    around(handover.Handover, "retain", after=at("removed"))
    around(store.Store, "commit", after=at("committed"))
    around(FleetStore, "commit", after=at("committed"))
    around(Tenancy, "begin", after=at("taken"))
    for mode in (Copying, Handing, Tickets):
        around(mode, "save", before=at("giving"), after=at("given"))
        around(mode, "load", before=at("loading"), after=at("loaded"))
    around(transfer._Job, "_run", before=at("moving"))
    # The end of the bytes, before the end of the transfer is reported; other uses stay as they are.
    own = types.SimpleNamespace(**vars(foreign))
    around(own, "close_here", after=at("moved"))
    vars(transfer)["foreign"] = own
    for name in ("_read", "_write"):
        around(transfer._Job, name, after=at("part"))
    around(transfer.StateTransfer, "check", before=at("checking"))
    around(handover.Handover, "open", before=at("opening"))
    around(session.Session, "restore", before=at("restoring"), after=at("restored"))
    reach("starting")
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
