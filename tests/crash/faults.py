# SPDX-License-Identifier: Apache-2.0
"""Make every file-system call of the store fail in turn: run as a program, under ``fiu-run -x``.

A device lives through starts, a key, writes, checkpoints and stops, each time in a child of its
own, in which the n-th call fails, or all from the n-th on until the disk heals two steps later. The
child is killed behind the step in which that happened, or goes on to its end. Then the device is
started on a sound disk, and has to hold what was acknowledged and nothing else.

``python -m tests.crash.faults CASES SEED``: a sample of that many cases, 0 for every one. Prints
what went wrong, and the number of cases; exit status 1 if anything did.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from tests.support.rig import make_image
from vhost_rpmb.errors import OperatorError, StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.store import Store
from vhost_rpmb.storage.paths import Paths

KEY = bytes(range(50, 82))
SYNCS = ("posix/io/sync/fsync", "posix/io/sync/fdatasync")
WRITES = ("posix/io/rw/pwrite", "posix/io/rw/write")
SHORT = tuple(f"{name}/reduce" for name in WRITES)
NAMES = ("posix/io/oc/open", "posix/io/dir/rename", "posix/io/dir/link", "posix/io/dir/unlink")
READS = ("posix/io/rw/pread", "posix/io/rw/read")
ALL = (*SYNCS, *WRITES, *NAMES, *READS, "posix/io/tnc/ftruncate")


class Fault(NamedTuple):
    """Which calls fail, with which errno, and whether until the disk heals or once."""

    points: tuple[str, ...]
    number: int
    lasts: bool


FAULTS = [
    *(Fault(ALL, number, lasts) for number in (errno.EIO, errno.ENOSPC) for lasts in (False, True)),
    Fault(SYNCS, errno.EIO, False),
    Fault(SYNCS, errno.EIO, True),
    Fault(SHORT, 100, False),
    Fault(WRITES, errno.ENOSPC, True),
]

_CALLBACK = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_char_p,
    ctypes.POINTER(ctypes.c_int),
    ctypes.POINTER(ctypes.c_void_p),
    ctypes.POINTER(ctypes.c_uint),
)


class Injector:
    """Counts the calls of a fault's points while ``active``; fails the n-th (0: none)."""

    def __init__(self, fault: Fault, position: int) -> None:
        self.calls: list[str] = []
        self.fired = False
        self.active = False
        self._fault = fault
        self._position = position
        self._callback = _CALLBACK(self._judge)  # has to live as long as it may be called
        library = ctypes.CDLL("libfiu.so.0")
        assert library.fiu_init(0) == 0
        for point in fault.points:
            assert not library.fiu_enable_external(point.encode(), 1, None, 0, self._callback)

    def _judge(self, name: bytes, _number: object, info: ctypes._Pointer, _flags: object) -> int:  # type: ignore[type-arg]
        if not self.active:
            return 0
        self.calls.append(name.decode())
        hit = len(self.calls) == self._position or (self._fault.lasts and self.fired)
        if hit:
            self.fired = True
            info[0] = self._fault.number
        return int(hit)


class Model(NamedTuple):
    """What a device has to hold."""

    counter: int = 0
    key: bytes | None = None
    image: bytes = bytes(spec.CAPACITY_UNIT)
    replay: Replay = NO_REPLAY

    def written(self, address: int, data: bytes) -> Model:
        start = address * spec.BLOCK_SIZE
        image = self.image[:start] + data + self.image[start + len(data) :]
        replay = Replay(1, self.counter.to_bytes(4, "big") + data[:32])
        return self._replace(counter=self.counter + 1, image=image, replay=replay)


class Outcome(NamedTuple):
    """What a child reports behind each step: what may be found, and whether its calls failed."""

    allowed: list[Model]
    fired: bool
    calls: list[str]  # that could fail, in order


def device_paths(folder: Path) -> Paths:
    return Paths.resolve(str(folder / "flash.img"), key_path=str(folder / "key"))


class Life:
    """The steps of a device, each with its truth checked."""

    def __init__(self, folder: Path, fault: Fault, position: int) -> None:
        self._paths = device_paths(folder)
        self._injector = Injector(fault, position)
        self._lasts = fault.lasts
        self._store: Store | None = None
        self._since = 0  # steps since the first failure
        self.model = Model()
        self.doubt: list[Model] = []  # reported as failed while the disk took nothing any more

    def run(self, report: Callable[[Outcome], None], kill: bool) -> None:
        source = random.Random(3)
        steps: list[Callable[[], bool]] = [self.start, self.program]
        for number, count in enumerate((1, 3, 0, 1, 32, -1, 1, 0, 2, 40, -2, 2, -3)):
            address, data = source.randrange(40), source.randbytes(max(count, 1) * spec.BLOCK_SIZE)
            if count > 0:
                data = bytes(len(data)) if number == 6 else data
                steps.append(lambda address=address, data=data: self.write(address, data))  # type: ignore[misc]
            elif count == 0:
                steps.append(self.checkpoint)
            elif count == -2:
                steps += [self.slice] * 2
            elif count == -3:
                steps.append(self.slices)
            else:
                steps += [self.stop, self.start]
        steps.append(self.stop)
        for step in steps:
            done = self.attempt(step)
            injector = self._injector
            report(Outcome([self.model, *self.doubt], injector.fired, injector.calls))
            if injector.fired and kill:
                os.kill(os.getpid(), signal.SIGKILL)
            while not done:  # a driver tries again, an operator starts again
                assert injector.fired, "a step failed on a sound disk"
                done = self.attempt(step)
                report(Outcome([self.model, *self.doubt], injector.fired, injector.calls))

    def attempt(self, step: Callable[[], bool]) -> bool:
        injector = self._injector
        injector.active = self._since < 3
        healed = self._since >= 3 or (injector.fired and not self._lasts)
        try:
            done = step()
        finally:
            injector.active = False
        self._since += injector.fired
        assert done or not healed, f"{step} failed although the disk is sound again"
        return done

    def start(self) -> bool:
        try:
            self._store = open_store(self._paths, warn=lambda _: None)
        except OperatorError as error:
            refusal = str(error)
        else:
            refusal = ""
        assert "\n" not in refusal
        if refusal:
            return False
        self.check()
        return True

    def stop(self) -> bool:
        assert self._store is not None
        if self.model.counter % 2:  # else answers are owed
            self._store.settle()
            # A failing disk may keep the record.
            self.doubt = [self.model._replace(replay=NO_REPLAY)]
        self._store.close()
        return True

    def program(self) -> bool:
        return self.commit(self.model._replace(key=KEY, replay=Replay(1, b"", True)), [])

    def write(self, address: int, data: bytes) -> bool:
        size = spec.BLOCK_SIZE
        blocks = [(address + n, data[n * size :][:size]) for n in range(len(data) // size)]
        return self.commit(self.model.written(address, data), blocks)

    def commit(self, after: Model, blocks: list[tuple[int, bytes]]) -> bool:
        assert self._store is not None
        done = self._store.commit(
            after.counter, blocks, None if blocks else after.key, after.replay
        )
        if done:
            self.model, self.doubt = after, []
        elif self._lasts:
            self.doubt = [after]
        self.check()
        return done

    def checkpoint(self) -> bool:
        assert self._store is not None
        done = self._store.checkpoint()
        self.check()
        return done

    def slice(self) -> bool:
        """A part of a checkpoint."""
        assert self._store is not None
        done = self._store.checkpoint_slice()
        self.check()
        return done is not False

    def slices(self) -> bool:
        """The parts that are left."""
        assert self._store is not None
        while (done := self._store.checkpoint_slice()) is None:
            self.check()
        self.check()
        return done

    def check(self) -> None:
        """What is served is the truth, whatever failed."""
        store = self._store
        assert store is not None
        found = Model(store.counter, store.key, bytes(store.image), store.replay)
        if found in self.doubt:  # after a restart: the disk had taken it
            self.model, self.doubt = found, []
        assert found == self.model, f"counter {found.counter} instead of {self.model.counter}"
        damaged = sum(store.damaged)
        # What could not be read at the start is damaged for that run.
        assert not damaged, f"{damaged} blocks are damaged"


def run_case(folder: Path, fault: Fault, position: int, kill: bool) -> Outcome:
    """Let a child live with a fault; check what it left. Return its last report."""
    make_image(folder / "flash.img")
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        status = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "wb") as pipe:

                def report(outcome: Outcome) -> None:
                    pickle.dump(outcome, pipe)
                    pipe.flush()

                Life(folder, fault, position).run(report, kill)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    last = Outcome([Model()], False, [])
    with os.fdopen(reader, "rb") as reports, suppress(EOFError):
        while True:
            last = pickle.load(reports)
    _, status = os.waitpid(child, 0)
    assert status in (0, signal.SIGKILL), "the child failed"
    for _ in range(2):
        store = open_store(device_paths(folder), warn=lambda _: None)
        try:
            found = Model(store.counter, store.key, bytes(store.image), store.replay)
            assert found in last.allowed, f"counter {found.counter}, not {last.allowed[0].counter}"
            assert not any(store.damaged), "a block is damaged"
        finally:
            store.close()
    Path(device_paths(folder).state).unlink()
    refusal = ""
    try:
        open_store(device_paths(folder), warn=lambda _: None).close()
    except StateError as error:
        refusal = str(error)
    assert "expected the state file of device" in refusal, "a lost state file was made anew"
    return last


def main(count: int, seed: int) -> int:
    logging.getLogger("vhost_rpmb").setLevel(logging.CRITICAL)
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    # By fault and call: a sample takes from each in turn, since most calls only warm the log.
    groups: dict[object, list[tuple[Fault, int, bool]]] = {}
    for fault in FAULTS:
        with tempfile.TemporaryDirectory(dir=memory) as name:
            calls = run_case(Path(name), fault, 0, False).calls
        assert len(calls) > 20, f"{fault} has only {len(calls)} calls"
        for (position, call), kill in itertools.product(enumerate(calls, 1), (False, True)):
            groups.setdefault((fault, call), []).append((fault, position, kill))
    for group in groups.values():
        random.Random(seed).shuffle(group)
    turns = itertools.zip_longest(*groups.values())
    cases = [case for turn in turns for case in turn if case]
    cases = cases[: count or len(cases)]
    wrong = fired = 0
    for fault, position, kill in cases:
        folder = Path(tempfile.mkdtemp(dir=memory))
        try:
            fired += run_case(folder, fault, position, kill).fired
        except (AssertionError, OperatorError) as error:
            wrong += 1
            print(f"call {position} of {fault}, kill={kill}: {error}", flush=True)
        finally:
            shutil.rmtree(folder)
    print(f"{len(cases)} cases, in {fired} of them calls failed, {wrong} went wrong")
    return bool(wrong)


if __name__ == "__main__":
    status = main(int(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    os._exit(status)  # the library does not survive the end of its callback
