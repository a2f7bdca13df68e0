# SPDX-License-Identifier: Apache-2.0
"""One run in namespaces of its own: ``python -m tests.nemesis.run FOLDER SECONDS SEED [MUTANT]``.

Two hosts compete for each device. Prints a report in JSON; an answer that contradicts the store's
history ends it with a traceback.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.nemesis import network
from tests.nemesis.faults import DaemonFaults, MemberFaults, Nemesis
from tests.nemesis.guests import Guest
from tests.nemesis.history import ADDRESSES, BLOCK, History, check, walk
from tests.nemesis.network import Place
from tests.nemesis.store import Store
from tests.storage.fleet.story import KEK
from tests.support.fleet import Host
from vhost_rpmb.storage.fleet.administration import create, describe
from vhost_rpmb.storage.fleet.contents import load, open_device
from vhost_rpmb.storage.fleet.layout import Keys, Owner, after
from vhost_rpmb.storage.fleet.requests import Requests

PREFIX = b"/test/"
DEVICES = ("vm-1", "vm-2")
MIN_ACKNOWLEDGED = 50  # writes to each device
PATIENCE = 300.0  # seconds beyond the time of the run
# Of each mutant: the faults of members and of daemons, and the violations that these lead to.
MUTANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    "no-compares": (
        (),
        ("replaced",),
        "was replaced|have one number|expected commit|does not follow|is lost|acknowledged twice",
    ),
    "believes-a-read": (("leader_stopped",), (), "a write that failed was applied"),
    "reads-without-lease": ((), ("asleep_beyond_the_lease",), "a stale (read|counter)"),
    "takes-owners-for-dead": ((), ("asleep",), "a stale (read|counter)"),
}
MEMBER_FAULTS = (
    *("leader_killed", "leader_stopped", "leader_isolated", "leader_cut_one_way"),
    *("leader_on_a_slow_disk", "disk_fails", "member_killed", "member_stopped", "all_killed"),
    *("clock_jumps", "defragmented"),
)
DAEMON_FAULTS = (
    *("killed", "ended", "asleep", "asleep_beyond_the_lease", "isolated_beyond_the_lease"),
    "replaced_after_its_death",
)


def main() -> None:
    folder, seconds, seed = Path(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])
    mutant = sys.argv[4] if len(sys.argv) > 4 else None
    members, daemons, _ = MUTANTS.get(mutant or "", (MEMBER_FAULTS, DAEMON_FAULTS, ""))
    network.prepare()
    store = Store([Place(f"m{number}", number) for number in (1, 2, 3)], folder)
    places = [Place("a", 11), Place("b", 12)]
    hosts = [Host(folder / place.name, store, PREFIX.decode()) for place in places]
    histories, pairs = {}, []
    for device in DEVICES:
        create(Requests(store.connect()), Keys(PREFIX, device), KEK, 128 * 1024, "test")
        histories[device] = History()
        first, second = (
            Guest(place, host, device, histories[device], mutant)
            for place, host in zip(places, hosts, strict=True)
        )
        first.program()
        pairs.append((first, second))
    guests = [guest for pair in pairs for guest in pair]
    nemeses = [
        Nemesis(_methods(MemberFaults(store, random.Random(seed)), members), random.Random(seed)),
        Nemesis(_methods(DaemonFaults(pairs, random.Random(seed)), daemons), random.Random(seed)),
    ]
    for thread in (*guests, *nemeses):
        thread.start()
    time.sleep(seconds)
    end = time.monotonic() + PATIENCE
    while mutant is None and not _enough(store, histories):
        assert time.monotonic() < end, "the guests are not served"
        time.sleep(1)
    for nemesis in nemeses:
        nemesis.stop()
    for member in store.members:
        store.mend(member)
    store.leader()
    for guest in guests:
        guest.stop()
    for error in [*(guest.error for guest in guests), *(each.error for each in nemeses)]:
        if error is not None:
            raise error
    report = {device: _check(store, Keys(PREFIX, device), histories[device]) for device in DEVICES}
    logs = "".join(guest.log for guest in guests)
    assert "Traceback" not in logs, logs
    print(json.dumps({"faults": [n.done for n in nemeses], "devices": report}))
    store.close()


def _enough(store: Store, histories: dict[str, History]) -> bool:
    """Whether the run says something, which takes longer on a busy machine."""
    if any(history.acknowledged() < MIN_ACKNOWLEDGED for history in histories.values()):
        return False
    requests = Requests(store.connect())
    names = [Keys(PREFIX, device).owner for device in histories]
    owners = requests.read([], names).found.values()
    return sum(Owner.unpack(record).epoch for record in owners) > 2 * len(names)


def _methods(of: object, names: tuple[str, ...]) -> list[Callable[[], None]]:
    return [getattr(of, name) for name in names]


def _check(store: Store, keys: Keys, history: History) -> dict[str, int]:
    requests = Requests(store.connect())
    found = requests.read([], [keys.info, keys.head]).found
    device = open_device(keys, found.get(keys.info), found.get(keys.head), KEK)
    changes = [
        change
        for kind in (b"h/", b"l/")
        for change in store.changes(keys.prefix + kind, after(keys.prefix + kind))
        if change.key == keys.head or change.key.startswith(keys.log(device.info.life))
    ]
    commits = walk(changes, keys, device)
    check(history, commits)
    replayed = {address: bytes(BLOCK) for address in range(ADDRESSES)}
    for commit in commits:
        replayed.update(commit.blocks)
    memory = load(requests, keys, device).memory
    for address, data in replayed.items():
        assert memory[address * BLOCK : (address + 1) * BLOCK] == data, "the image is another one"
    return {
        "operations": len(history.operations),
        "acknowledged": history.acknowledged(),
        "commits": len(commits),
        "owners": describe(requests, keys, KEK).epoch,
    }


if __name__ == "__main__":
    main()
