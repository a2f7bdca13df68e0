# SPDX-License-Identifier: Apache-2.0
"""A device that moves between daemons which own it only while a ring runs, with every fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.storage.fleet.story import KEK, KEYS, LEASE, MemoryStory, State, block
from tests.support.campaign import sample
from tests.support.fake_engine import FOREVER, Cluster, Crash, Fault, Kind
from tests.support.oracle import KEY
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.rpmb.replay import Replay
from vhost_rpmb.storage.fleet import opening
from vhost_rpmb.storage.fleet.administration import accept, quarantine
from vhost_rpmb.storage.fleet.contents import Contents
from vhost_rpmb.storage.fleet.contents import State as Loaded
from vhost_rpmb.storage.fleet.opening import Opening
from vhost_rpmb.storage.fleet.tenancy import Tenancy
from vhost_rpmb.storage.interface import TakeOver

CRASHES = (Kind.CRASH_BEFORE, Kind.CRASH_AFTER)


def fold(daemon: Tenancy) -> None:
    """Make a checkpoint, although the log is short."""
    assert daemon._store is not None
    daemon._store.checkpoint()


class Moves(MemoryStory):
    """Two daemons, started once and again when they die; the model is that of a story."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        super().__init__(cluster, folder)
        self.daemons: dict[str, Tenancy] = {}

    def bury_daemon(self, name: str) -> None:
        """Let the process of a daemon be dead, if there is one."""
        if name in self.daemons and (store := self.daemons[name]._store) is not None:
            self.bury(store)

    def end(self) -> None:
        for name in self.daemons:
            self.bury_daemon(name)

    def opening(self) -> Opening:
        return Opening(self.requests(), KEYS, KEK, str(self.folder))

    def start(self, name: str, mode: TakeOver = "expired") -> Tenancy:
        """Start a daemon in place of one that is dead; again if it is refused or dies."""
        self.bury_daemon(name)
        for _ in range(10):
            try:
                made = Tenancy(
                    self.opening(), mode=mode, lease_seconds=LEASE, clock=lambda: self.cluster.now
                )
            except StateError as error:
                if "refused" not in str(error):
                    raise
            except Crash:
                pass
            else:
                self.daemons[name] = made
                return made
        raise AssertionError("the daemon cannot be started")

    def begin(self, name: str) -> Tenancy:
        """Let the ring of a daemon run; compare what it serves then with the model."""
        for _ in range(1000):
            daemon = self.daemons[name]
            try:
                if daemon.begin():
                    break
            except StateError as error:
                if "refused" not in str(error):
                    raise
                self.start(name)
            except Crash:
                self.start(name)
            self.cluster.sleep(0.05)
        else:
            raise AssertionError("the device cannot be owned")
        found = self.look(daemon)
        assert found in (self.state, self.doubtful), "the state is not the acknowledged one"
        self.state, self.doubtful = found, None
        return daemon

    @staticmethod
    def look(daemon: Tenancy) -> State:
        image = bytes(daemon.image)
        blocks = {at // 256: image[at : at + 256] for at in range(0, len(image), 256)}
        written = {at: data for at, data in blocks.items() if data != bytes(256)}
        return daemon.counter, daemon.key, written

    def write(
        self, name: str, *blocks: tuple[int, bytes], key: bytes | None = None, chains: int = 0
    ) -> None:
        counter = self.state[0] + (1 if blocks else 0)
        after = (counter, key or self.state[1], {**self.state[2], **dict(blocks)})
        try:
            done = self.daemons[name].commit(counter, list(blocks), key, Replay(chains))
        except Crash:
            self.doubtful = after
            self.start(name)
            self.begin(name)
            return
        if done:
            self.state = after
        assert self.look(self.daemons[name]) == self.state

    def do(self, name: str, step: Callable[[Tenancy], object]) -> None:
        try:
            step(self.daemons[name])
        except Crash:
            self.start(name)
            if step not in (Tenancy.end, Tenancy.close, Tenancy.refresh):
                self.begin(name)  # its ring runs

    def run(self) -> None:
        self.create()
        self.start("source")
        self.start("destination")
        self.begin("source")
        self.write("source", key=KEY)
        self.write("source", (0, block(1)), (511, block(2)))
        self.do("destination", Tenancy.refresh)
        self.write("source", (0, block(3)), chains=1)
        self.do("source", Tenancy.settle)
        self.do("source", Tenancy.end)
        self.begin("destination")  # the log goes on where it was refreshed
        self.write("destination", (1, block(4)), (70, block(5)))
        self.do("destination", Tenancy.end)
        self.begin("source")  # the move failed
        self.do("source", fold)
        self.write("source", (2, block(6)))
        self.do("source", Tenancy.end)
        self.begin("destination")  # the log does not reach back
        self.do("destination", Tenancy.renew)
        self.write("destination", (511, block(7)))
        self.do("destination", Tenancy.end)
        self.cluster.deliver()
        self.begin("destination")  # the guest restarts
        self.write("destination", (511, block(8)))
        self.do("destination", Tenancy.close)
        self.start("third")
        self.begin("third")


def plans(kind: Kind, folder: Path) -> Iterator[dict[int, Fault]]:
    quiet = Cluster()
    live(Moves(quiet, folder))
    if kind in (Kind.DELAY, Kind.DUPLICATE):
        late = [
            {number: Fault(kind, due)}
            for number in quiet.changes
            for due in [*(each for each in quiet.changes if each > number), FOREVER]
        ]
        yield from sample(late)  # all of a life without moves are in test_faults
    else:
        for number in range(quiet.count):
            yield {number: Fault(kind)}


def live(moves: Moves) -> None:
    try:
        moves.run()
    finally:
        moves.end()


def run_each(kind: Kind, folder: Path) -> None:
    for plan in plans(kind, folder):
        try:
            live(Moves(Cluster(plan), folder))
        except BaseException as error:
            error.add_note(f"the plan: {plan}")
            raise


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_moved_device_has_every_acknowledged_write(kind: Kind, folder: Path) -> None:
    run_each(kind, folder)


def test_destination_that_trusts_its_memory_is_found(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def trust(*arguments: object) -> Contents:
        known = arguments[-1]
        assert isinstance(known, Loaded)
        return known.contents

    monkeypatch.setattr(opening, "update", trust)
    with pytest.raises(AssertionError, match="not the acknowledged one"):
        live(Moves(Cluster(), folder))


@pytest.fixture
def moves(folder: Path) -> Iterator[Moves]:
    """A device with one write; the source owns it, the destination is started."""
    story = Moves(Cluster(), folder)
    story.create()
    story.start("source")
    story.begin("source")
    story.write("source", key=KEY)
    story.write("source", (0, block(1)))
    story.start("destination")
    yield story
    story.end()


def test_device_is_free_unless_a_ring_runs(moves: Moves) -> None:
    cluster = moves.cluster
    assert KEYS.alive in cluster.data
    moves.daemons["source"].end()
    assert KEYS.alive not in cluster.data
    before = dict(cluster.data)
    other = moves.start("third", "never")
    assert not other.owned
    assert cluster.data == before
    assert (other.name, len(other.image)) == (moves.daemons["source"].name, 128 * 1024)


def test_ring_waits_for_the_owner(moves: Moves, caplog: pytest.LogCaptureFixture) -> None:
    destination = moves.daemons["destination"]
    assert not destination.begin()
    assert not destination.begin()
    moves.daemons["source"].end()
    assert destination.begin()
    assert caplog.text.count("vm-1 is owned by process") == 1


def test_take_over_of_a_device_in_memory_reads_no_chunks(moves: Moves) -> None:
    moves.daemons["source"].end()
    before = moves.cluster.count
    assert moves.daemons["destination"].begin()
    assert moves.cluster.count - before == 2  # a lease, and one transaction


def test_hand_over_takes_four_requests(moves: Moves) -> None:
    """Of a device with a record that is not owed any more, to a daemon that had it in memory."""
    source, destination = (moves.daemons[name] for name in ("source", "destination"))
    moves.write("source", (0, block(2)), chains=1)
    source.settle()
    destination.refresh()
    before = moves.cluster.count
    source.end()
    assert moves.cluster.count - before == 1  # empties the record and frees the device
    assert destination.begin()
    assert moves.cluster.count - before == 4  # a lease, the transaction, and the new entry
    moves.cluster.sleep(LEASE)
    destination.renew()
    assert destination.commit(2, [(0, block(3))], None)


def test_ring_that_runs_again_takes_two_requests(moves: Moves) -> None:
    moves.daemons["source"].end()
    before = moves.cluster.count
    assert moves.daemons["source"].begin()
    assert moves.cluster.count - before == 2


def test_refresh_does_not_wait_for_an_outage(moves: Moves) -> None:
    """The front-end of a virtual machine that is about to arrive is served meanwhile."""
    cluster, destination = moves.cluster, moves.daemons["destination"]
    moves.write("source", (0, block(2)))
    for lost in (0, 1, 2):  # the records, then what is read of the log
        first = cluster.count + lost
        cluster.plan = {number: Fault(Kind.LOSE_REQUEST) for number in range(first, first + 100)}
        began = cluster.now
        destination.refresh()
        assert cluster.now - began < 0.1
        cluster.plan = {}
    moves.daemons["source"].end()
    moves.begin("destination")


def idle(daemon: Tenancy) -> None:
    """Let a daemon do its deferred work."""
    while daemon.checkpoint_due:
        assert daemon.checkpoint()


def test_witness_is_recorded_while_the_device_is_idle(moves: Moves, folder: Path) -> None:
    """A take-over and a release wait for no disk."""
    source = moves.daemons["source"]
    assert not list(folder.glob("*.json"))
    idle(source)
    (path,) = folder.glob("*.json")
    owned = path.read_text()
    moves.write("source", (0, block(2)))
    source.end()
    assert path.read_text() == owned
    idle(source)
    assert path.read_text() != owned
    source.begin()
    moves.write("source", (0, block(3)))
    before = path.read_text()
    source.close()
    assert path.read_text() != before


@pytest.mark.parametrize("mode", ["never", "now"])
def test_mode_is_that_of_the_first_take_over(moves: Moves, mode: TakeOver) -> None:
    moves.daemons["source"].end()
    moves.start("third", mode)
    moves.begin("third")
    moves.daemons["third"].end()
    moves.begin("source")
    assert not moves.daemons["third"].begin()


def test_now_takes_the_device_from_its_owner(moves: Moves) -> None:
    moves.start("third", "now")
    moves.begin("third")
    moves.write("third", (0, block(2)))
    with pytest.raises(Fenced):
        moves.daemons["source"].commit(2, [(0, block(3))], None)
    moves.daemons["source"].end()  # as at its end: the owner keeps the device
    moves.write("third", (0, block(4)))


def test_accepted_device_is_read_anew(moves: Moves) -> None:
    moves.daemons["source"].end()
    quarantine(moves.requests(), KEYS.prefix)
    with pytest.raises(Fenced, match="vm-1 is quarantined"):
        moves.daemons["destination"].begin()
    assert KEYS.alive not in moves.cluster.data
    accept(moves.requests(), KEYS, KEK)
    moves.begin("destination")


def test_settled_record_is_gone_although_no_ring_runs(moves: Moves) -> None:
    moves.write("source", (0, block(2)), chains=3)
    source = moves.daemons["source"]
    source.end()
    assert source.replay.chains == 3
    assert moves.begin("destination").replay.chains == 3
    moves.daemons["destination"].end()
    source.settle()  # a reset
    assert moves.begin("source").replay.chains == 0
