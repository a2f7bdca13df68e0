# SPDX-License-Identifier: Apache-2.0
"""A host is lost, with a virtual machine on it: ``python -m tests.nemesis.host_loss FOLDER``.

In namespaces of its own: three members of etcd, and two hosts with QEMU, whose guests use ``mmc``.
"""

from __future__ import annotations

import signal
import sys
import time
from pathlib import Path

from tests.e2e.kit import AMD64, Kit, make_kit
from tests.e2e.vm import VirtualMachine, succeed
from tests.nemesis import network
from tests.nemesis.guests import Guest
from tests.nemesis.history import History
from tests.nemesis.network import Place
from tests.nemesis.store import Store
from tests.storage.fleet.story import KEK
from tests.support.fleet import Host
from tests.support.oracle import KEY
from vhost_rpmb.storage.fleet.administration import create
from vhost_rpmb.storage.fleet.layout import Keys
from vhost_rpmb.storage.fleet.requests import Requests

PREFIX, DEVICE = b"/test/", "vm-1"
WRITTEN = {3: b"a" * 256, 7: b"b" * 256}
AFTER = b"c" * 256
TIMEOUT = 300.0


class Machine:
    """The virtual machine, on one of the hosts."""

    def __init__(self, kit: Kit, place: Place, host: Host) -> None:
        self.place = place
        self.daemon = Guest(place, host, DEVICE, History(), None)
        self.daemon.start_daemon()
        self.daemon.until_listening()
        self.vm = VirtualMachine(kit, host.folder / f"{DEVICE}.sock")
        self.vm.put_file("key", KEY)

    def write(self, address: int, data: bytes, *, wait: bool = True) -> None:
        """Write a block; without ``wait`` there may be no answer."""
        self.vm.put_file("data", data)
        end = "" if wait else "> /dev/null 2>&1 &"
        succeed(self.vm, f"mmc rpmb write-block /dev/rpmb0 {address} data key {end}")

    def read(self, address: int) -> bytes:
        succeed(self.vm, f"rm -f out; mmc rpmb read-block /dev/rpmb0 {address} 1 out key")
        return self.vm.get_file("out")

    def die(self) -> None:
        """The end of its host."""
        self.place.isolate()
        self.daemon.signal(signal.SIGKILL)
        self.vm.close()


def main() -> None:
    folder = Path(sys.argv[1])
    kit = make_kit(AMD64)
    network.prepare()
    store = Store([Place(f"m{number}", number) for number in (1, 2, 3)], folder)
    places = [Place("a", 11), Place("b", 12)]
    hosts = [Host(folder / place.name, store, PREFIX.decode()) for place in places]
    create(Requests(store.connect()), Keys(PREFIX, DEVICE), KEK, 128 * 1024, "test")

    first = Machine(kit, places[0], hosts[0])
    succeed(first.vm, "mmc rpmb write-key /dev/rpmb0 key")
    for address, data in WRITTEN.items():
        first.write(address, data)
    first.place.isolate()  # nobody can tell that from its death

    second = Machine(kit, places[1], hosts[1])
    for address, data in WRITTEN.items():
        assert second.read(address) == data
    second.write(3, AFTER)

    first.place.join()
    first.write(3, b"d" * 256, wait=False)
    end = time.monotonic() + TIMEOUT
    while first.daemon.status() is None:
        assert time.monotonic() < end, "the old host is not fenced"
        time.sleep(0.1)
    assert first.daemon.status() == 3, first.daemon.log
    assert second.read(3) == AFTER
    first.vm.close()

    second.die()
    third = Machine(kit, places[0], hosts[0])
    assert third.read(3) == AFTER
    assert third.read(7) == WRITTEN[7]
    third.write(7, AFTER)
    third.vm.close()
    store.close()
    print("survived")


if __name__ == "__main__":
    main()
