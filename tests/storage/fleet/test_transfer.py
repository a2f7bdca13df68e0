# SPDX-License-Identifier: Apache-2.0
"""A device moves between files and a store, through kills at every step and faults of the engine.

At no time do both homes start it, and a repetition of the command completes the move.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tests.storage.fleet.story import KEK, block
from tests.support.etcd import EtcdCluster
from tests.support.fake_engine import FOREVER, Cluster, FakeEngine, Fault, Kind
from tests.support.oracle import KEY
from tests.support.store import OTHER_KEY
from vhost_rpmb.errors import Fenced, OperatorError, StateError, UsageError
from vhost_rpmb.storage import transfer
from vhost_rpmb.storage.fleet.administration import create, describe
from vhost_rpmb.storage.fleet.engine import Engine
from vhost_rpmb.storage.fleet.layout import Keys, Owner
from vhost_rpmb.storage.fleet.opening import open_store
from vhost_rpmb.storage.fleet.ownership import boot_time
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.store import FleetStore
from vhost_rpmb.storage.fleet.verification import verify
from vhost_rpmb.storage.local import opening as local
from vhost_rpmb.storage.local import verification
from vhost_rpmb.storage.paths import Paths

SIZE = 128 * 1024
COUNTER = 3
# C functions that change files; a kill before each one is tested.
CHANGING = {
    *("execute", "executemany", "executescript", "fsync", "fdatasync", "write", "rename", "link"),
    *("unlink", "setxattr", "mknod"),
}


class Site:
    """A host with files of a device, and its access to a store."""

    def __init__(self, folder: Path, connect: Callable[[], Engine], prefix: bytes) -> None:
        self.folder = folder
        self.connect = connect
        self.keys = Keys(prefix, "vm-1")
        self.clock: Callable[[], float] = boot_time
        self.sleep: Callable[[float], None] = lambda _: None
        self.paths = Paths.resolve(str(folder / "flash"))
        self.witness = folder / "witness"
        self.witness.mkdir(exist_ok=True)

    def fill_files(self) -> None:
        Path(self.paths.flash).write_bytes(bytes(SIZE))
        store = local.open_store(self.paths)
        self._fill(store.commit)
        store.close()

    @staticmethod
    def _fill(commit: Callable[..., bool]) -> None:
        assert commit(0, [], KEY)
        assert commit(1, [(0, block(1)), (511, block(2))], None)
        assert commit(2, [(100, block(3))], None)
        assert commit(COUNTER, [(0, block(4))], None)

    def fill_store(self) -> None:
        create(self.requests(), self.keys, KEK, SIZE, "test")
        store = self.open()
        self._fill(store.commit)
        store.close()

    def requests(self) -> Requests:
        return Requests(self.connect(), sleep=self.sleep)

    def open(self) -> FleetStore:
        return open_store(
            self.requests(),
            self.keys,
            KEK,
            witness_folder=str(self.witness),
            clock=self.clock,
        )

    def import_(self) -> None:
        transfer.import_device(self.requests(), self.keys, KEK, self.paths, warn=refuse)

    def export(self) -> None:
        transfer.export_device(self.requests(), self.keys, self.paths, self.open)

    def in_files(self) -> bool:
        """Whether the files start."""
        if not os.path.exists(self.paths.state):
            assert not os.path.exists(self.paths.flash)
            return False
        try:
            report = verification.verify(self.paths, warn=refuse)
        except OperatorError as error:
            if not re.search("found one that moved|the image .* does not exist", str(error)):
                raise
            return False
        assert (report.counter, report.programmed, report.damaged) == (COUNTER, True, [])
        return True

    def in_store(self) -> bool:
        """Whether a daemon can take the device over."""
        found = self.requests().read([], [self.keys.owner]).found
        if self.keys.owner not in found:
            return False
        return Owner.unpack(found[self.keys.owner]).state == "active"

    def check_files(self) -> None:
        store = local.open_store(self.paths)
        assert (store.counter, store.key) == (COUNTER, KEY)
        check_blocks(store.image)
        store.close()

    def check_store(self) -> None:
        found = verify(self.requests(), self.keys, KEK)
        assert (found.counter, found.programmed) == (COUNTER, True)
        store = self.open()
        assert (store.counter, store.key) == (COUNTER, KEY)
        check_blocks(store.image)
        store.close()


def refuse(text: str) -> None:
    raise AssertionError(text)


def check_blocks(image: memoryview) -> None:
    blocks = {at // 256: bytes(image[at : at + 256]) for at in range(0, SIZE, 256)}
    assert {address: data[0] for address, data in blocks.items() if any(data)} == {
        0: 4, 100: 3, 511: 2
    }  # fmt: skip


def site_in_memory(folder: Path, cluster: Cluster) -> Site:
    site = Site(folder, cluster.connect, b"/test/")
    site.clock, site.sleep = lambda: cluster.now, cluster.sleep
    return site


@pytest.fixture(params=["import", "export"])
def move(request: pytest.FixtureRequest) -> str:
    direction = request.param
    assert isinstance(direction, str)
    return direction


def prepare(site: Site, move: str) -> None:
    site.fill_files() if move == "import" else site.fill_store()


def perform(site: Site, move: str) -> None:
    site.import_() if move == "import" else site.export()


def check_moved(site: Site, move: str) -> None:
    assert (site.in_files(), site.in_store()) == (move == "export", move == "import")
    if move == "import":
        site.check_store()
    else:
        site.check_files()


def check_one_home_at_most(site: Site, cluster: Cluster | None = None) -> None:
    assert not (site.in_files() and site.in_store()), "the device is active in two homes"


class Kept(FakeEngine):
    """An engine whose state a killed process leaves behind, and whose requests are steps."""

    path: Path
    step: Callable[[], None]

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        request = cluster.request

        def keep(apply: Callable[[], object], changes: bool) -> object:
            Kept.step()
            answer = request(apply, changes)
            if changes:
                self.keep()
                Kept.step()
            return answer

        cluster.request = keep  # type: ignore[method-assign]

    def keep(self) -> None:
        state = {name: self.cluster.__dict__[name] for name in KEPT}
        new = Kept.path.with_suffix(".new")
        new.write_bytes(pickle.dumps(state))
        new.replace(Kept.path)


KEPT = ("now", "revision", "data", "on_lease", "leases", "_granted")


def restored(path: Path) -> Cluster:
    cluster = Cluster()
    cluster.__dict__.update(pickle.loads(path.read_bytes()))
    return cluster


def kill_at(point: int, site: Site, cluster: Cluster, move: str, kept: Path) -> bool:
    """Perform a move in a process that is killed at a step; False: it ended before that step."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    try:
        left = point

        def step() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def trace(frame: FrameType, event: str, function: Any) -> None:
            here = "vhost_rpmb/storage" in frame.f_code.co_filename
            if here and event == "c_call" and function.__name__ in CHANGING:
                step()

        Kept.path, Kept.step = kept, staticmethod(step)
        cluster.engine = Kept
        sys.setprofile(trace)
        perform(site, move)
        sys.setprofile(None)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.long)])
def test_kill_at_each_step_leaves_one_home_and_a_move_that_continues(
    folder: Path, move: str, stride: int
) -> None:
    start = folder / "start"
    start.mkdir()
    cluster = Cluster()
    prepare(site_in_memory(start, cluster), move)
    (start / "kept").write_bytes(pickle.dumps({name: cluster.__dict__[name] for name in KEPT}))
    homes, point = set(), 0
    while True:
        work = folder / "work"
        shutil.copytree(start, work)
        kept = work / "kept"
        cluster = restored(kept)
        killed = kill_at(point, site_in_memory(work, cluster), cluster, move, kept)
        site = site_in_memory(work, restored(kept))
        homes.add((site.in_files(), site.in_store()))
        check_one_home_at_most(site)
        if not (move == "export" and site.in_files()):  # then only the command's end was missing
            perform(site, move)
        check_moved(site, move)
        shutil.rmtree(work)
        if not killed:
            break
        point += stride
    assert point > 30
    assert homes == {(True, False), (False, False), (False, True)}


def plans(count: Callable[[], Cluster]) -> Iterator[dict[int, Fault]]:
    """Each request of a move fails in each way that its client survives."""
    quiet = count()
    for number in range(quiet.count):
        for kind in (Kind.LOSE_REQUEST, Kind.LOSE_ANSWER):
            yield {number: Fault(kind)}
    for number in quiet.changes:
        for due in [*(each for each in quiet.changes if each > number), FOREVER]:
            yield {number: Fault(Kind.DELAY, due)}
            yield {number: Fault(Kind.DUPLICATE, due)}


def use(site: Site, move: str) -> None:
    """What happens to the device after its move: late requests of the move change nothing of it."""
    if move == "import":
        store = site.open()
        assert store.commit(COUNTER + 1, [(0, block(9))], None)
        assert store.checkpoint()
        assert store.commit(COUNTER + 2, [(0, block(4))], None)
        store.close()


def test_each_fault_of_the_engine_leaves_the_move_complete(folder: Path, move: str) -> None:
    start = folder / "start"
    start.mkdir()
    source = Cluster()
    prepare(site_in_memory(start, source), move)

    def run(plan: dict[int, Fault]) -> Cluster:
        work = folder / "work"
        shutil.copytree(start, work)
        cluster = Cluster(plan)
        cluster.__dict__.update(pickle.loads(pickle.dumps({n: getattr(source, n) for n in KEPT})))
        site = site_in_memory(work, cluster)
        perform(site, move)
        done = cluster.count
        use(site, move)
        cluster.deliver()
        cluster.plan.clear()
        cluster.now += 3600  # the end of leases whose end was not heard
        assert (site.in_files(), site.in_store()) == (move == "export", move == "import")
        if move == "import":
            check_blocks(site.open().image)
        else:
            site.check_files()
        shutil.rmtree(work)
        cluster.count = done
        return cluster

    for plan in plans(lambda: run({})):
        try:
            run(plan)
        except BaseException as error:
            error.add_note(f"the plan: {plan}")
            raise


@pytest.fixture
def site(folder: Path) -> Site:
    return site_in_memory(folder, Cluster())


@pytest.mark.etcd
def test_device_moves_to_etcd_and_back_through_kills(
    etcd: EtcdCluster, folder: Path, prefix: bytes
) -> None:
    """A process is killed at growing distances from its start, until it ends before that."""
    site = Site(folder, etcd.connect, prefix)
    site.fill_files()
    for move in ("import", "export"):
        if move == "export":
            shutil.rmtree(folder)
            site = Site(make(folder), etcd.connect, prefix)
        point = 0
        while kill_real_at(point, site, move):
            check_one_home_at_most(site)
            point += 1
        check_moved(site, move)
        assert point > 3


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def kill_real_at(point: int, site: Site, move: str) -> bool:
    """Perform a move in a process that is killed before its n-th request; False: it ended."""
    child = os.fork()
    if child:
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL)
        return status != 0
    try:
        left = point
        connect = site.connect

        def counted() -> Engine:
            engine = connect()
            exchange = engine._exchange  # type: ignore[attr-defined]

            def request(*arguments: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                return exchange(*arguments)

            engine._exchange = request  # type: ignore[attr-defined]
            return engine

        site.connect = counted
        perform(site, move)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def test_device_with_damaged_blocks_is_not_imported(site: Site) -> None:
    site.fill_files()
    with open(site.paths.flash, "r+b") as file:
        file.seek(100 * 256)
        file.write(b"x")
    with pytest.raises(StateError, match="found others at address 100: restore it"):
        site.import_()
    assert not site.in_store()


def test_imported_files_refuse_a_start_and_an_export(site: Site) -> None:
    site.fill_files()
    site.import_()
    site.import_()
    with pytest.raises(StateError, match=r"flash.state: expected one that is here, found one that"):
        local.open_store(site.paths)
    with pytest.raises(UsageError, match="expected the import of vm-1 to be repeated, found an ex"):
        site.export()


def test_taken_name_leaves_the_files_usable(site: Site) -> None:
    site.fill_files()
    create(site.requests(), site.keys, KEK, SIZE, "test")
    with pytest.raises(StateError, match="vm-1 exists already: choose another name"):
        site.import_()
    site.check_files()
    site.keys = Keys(site.keys.prefix, "vm-2")
    site.import_()
    site.check_store()


def test_import_is_not_continued_in_another_store(site: Site, folder: Path) -> None:
    site.fill_files()
    cluster = Cluster()
    stopped = site_in_memory(folder, cluster)
    cluster.plan = {4: Fault(Kind.REFUSE)}
    with pytest.raises(StateError, match="refused to change vm-1: as planned: repeat"):
        stopped.import_()
    with pytest.raises(StateError, match=r"expected the store '/test/ .* of the first attempt"):
        site.import_()
    stopped.import_()
    stopped.check_store()


def test_exported_device_is_refused_by_daemons_and_imported_again(site: Site) -> None:
    site.fill_store()
    site.export()
    assert describe(site.requests(), site.keys, KEK).state == "exported"
    for action in (site.open, lambda: verify(site.requests(), site.keys, KEK)):
        with pytest.raises(StateError, match="vm-1 is exported: use it where it is now"):
            action()
    with pytest.raises(StateError, match="exists already"):
        create(site.requests(), site.keys, KEK, SIZE, "test")
    site.check_files()
    site.import_()
    assert not site.in_files()
    site.check_store()


def test_other_device_of_an_earlier_time_does_not_take_an_exported_name(
    site: Site, folder: Path
) -> None:
    site.fill_store()
    site.export()
    older = site_in_memory(make(folder / "older"), Cluster())
    older.connect = site.connect
    Path(older.paths.flash).write_bytes(bytes(SIZE))
    with pytest.raises(StateError, match="exported with write counter 3, found 0: choose another"):
        older.import_()
    local.open_store(older.paths).close()


def test_export_leaves_no_contents_in_the_store(site: Site) -> None:
    site.fill_store()
    store = site.open()
    assert store.checkpoint()
    store.close()
    site.export()
    keys = {key for key, _ in site.requests().pages(b"/", b"0", 100)}
    kinds = {key.removeprefix(site.keys.prefix)[:1] for key in keys}
    assert kinds == set(map(bytes, zip(b"ohi")))  # and the incarnation


def test_export_replaces_no_files(site: Site) -> None:
    site.fill_store()
    Path(site.paths.flash).write_bytes(b"x")
    with pytest.raises(UsageError, match="flash exists already: choose another path, or remove it"):
        site.export()
    assert site.in_store()


def test_owner_of_an_exported_device_is_fenced(site: Site) -> None:
    site.fill_store()
    store = site.open()
    cluster = site.requests().engine.cluster  # type: ignore[attr-defined]
    cluster.sleep(60)
    site.export()
    with pytest.raises(Fenced):
        store.commit(COUNTER + 1, [(0, block(9))], None)
    site.check_files()


def test_key_in_a_key_file_is_imported(site: Site, folder: Path) -> None:
    site.paths = Paths.resolve(site.paths.flash, None, str(folder / "key"))
    site.fill_files()
    site.import_()
    site.check_store()


def test_wrong_key_file_is_refused(site: Site, folder: Path) -> None:
    site.paths = Paths.resolve(site.paths.flash, None, str(folder / "key"))
    site.fill_files()
    (folder / "key").write_bytes(OTHER_KEY)
    with pytest.raises(StateError, match="holds another key than"):
        site.import_()
    assert not site.in_store()


def test_verification_finds_a_damaged_device(site: Site) -> None:
    site.fill_store()
    cluster = site.requests().engine.cluster  # type: ignore[attr-defined]
    name = max(key for key in cluster.data if b"/l/" in key)
    cluster.data[name] = cluster.data[name][:-1] + b"x"
    with pytest.raises(StateError, match="restore the store"):
        verify(site.requests(), site.keys, KEK)


def test_device_is_verified_while_it_is_written(site: Site) -> None:
    """Each commit comes in the middle of a verification; there is a pause at last."""
    site.fill_store()
    store = site.open()
    cluster = site.requests().engine.cluster  # type: ignore[attr-defined]
    numbers = iter(range(COUNTER + 1, COUNTER + 6))
    request = cluster.request

    def interrupted(apply: Callable[[], object], changes: bool) -> object:
        answer = request(apply, changes)
        if cluster.count % 5 == 0 and (number := next(numbers, None)):
            cluster.request = request
            assert store.commit(number, [(1, block(number))], None)
            cluster.request = interrupted
        return answer

    cluster.request = interrupted
    found = verify(site.requests(), site.keys, KEK)
    assert next(numbers, None) is None or found.counter > COUNTER
    cluster.request = request
    assert verify(site.requests(), site.keys, KEK).counter == store.counter
