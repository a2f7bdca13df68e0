# SPDX-License-Identifier: Apache-2.0
"""A migration whose processes are killed at each step: exactly one host answers, with everything.

Each step is a call into the operating system or SQLite, or a note, on each side. A process that
follows opens the files again; on the source it has the note of the connection, as under a service
manager, or none, as without one. Then both hosts want to run the device, in either order.
"""

from __future__ import annotations

import mmap
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from tests.support.campaign import DIVISOR, sample
from tests.support.oracle import KEY
from tests.support.rig import make_image
from tests.support.store import A, B, in_killed_process
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import OperatorError
from vhost_rpmb.migration.copying import Copying
from vhost_rpmb.migration.fence import Fence
from vhost_rpmb.migration.handing import Handing
from vhost_rpmb.migration.note import NOTE_SIZE, Note
from vhost_rpmb.storage.interface import Possession
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.shared import SharedFiles
from vhost_rpmb.storage.local.store import Store
from vhost_rpmb.storage.paths import Paths

Mode = Copying | Handing
pytestmark = pytest.mark.usefixtures("untraced")


class World:
    """Two hosts, and what the front-end carries between them."""

    def __init__(self, folder: Path, engine: Engine, mode: str, *, kept: bool) -> None:
        self._engine = engine
        self._mode = mode
        self._kept = kept
        self.fence = folder / "fence"
        self.fence.mkdir()
        self.blob = folder / "blob"
        self.ended = folder / "ended"  # there as soon as a part has come to its end
        self._flash = {"source": make_image(folder / "source.img")}
        self._flash["destination"] = (
            make_image(folder / "destination.img") if mode == "copy" else self._flash["source"]
        )
        # Memory that outlives a process, as that of a connection which is kept.
        self._notes = {name: mmap.mmap(-1, NOTE_SIZE) for name in self._flash}
        with open_store_of(self._flash["source"]) as store:
            assert store.commit(1, [(3, A), (5, A)], KEY)
            assert store.commit(2, [(5, B)], None)

    @contextmanager
    def host(self, name: str) -> Iterator[Mode]:
        """The process of a host."""
        paths = Paths.resolve(str(self._flash[name]))
        incoming = name == "destination"
        note = Note(memoryview(self._notes[name]) if self._kept else None)
        with ExitStack() as stack:
            if self._mode == "shared":
                files = SharedFiles(paths, incoming=incoming)
                stack.callback(files.close)
                device = self._engine.RpmbDevice(files)
                yield Handing(files, device, note, incoming=incoming)
                return
            store = stack.enter_context(
                open_store_of(self._flash[name], waiting=True, vacant=incoming)
            )
            yield Copying(
                store,
                self._engine.RpmbDevice(store),
                note,
                fence=Fence(str(self.fence)),
                sealer=None,
                key_file=KEY,
                incoming=incoming,
            )

    def save(self) -> None:
        with self.host("source") as host:
            blob = host.save()
            new = self.blob.with_suffix(".new")
            new.write_bytes(blob)  # a front-end has all of it, or none
            new.rename(self.blob)
            host.sent(complete=True)
            self._end()

    def load(self) -> None:
        with self.host("destination") as host:
            host.load(self.blob.read_bytes())
            self._end()

    def arrive(self) -> None:
        """Load and start, in one process."""
        with self.host("destination") as host:
            host.load(self.blob.read_bytes())
            host.start()
            self._end()

    def resume(self) -> None:
        with self.host("source") as host:
            host.start()
            self._end()

    def _end(self) -> None:
        """End a part that was not killed before: the process ends without a clean end."""
        self.ended.touch()
        os.kill(os.getpid(), 9)

    def runs(self, name: str, stack: ExitStack) -> bool:
        """Whether a host runs the device when its front-end asks: then until the stack ends."""
        try:
            host = stack.enter_context(self.host(name))
        except OperatorError:
            return False
        if name == "destination" and self.blob.exists():
            with suppress(ValueError):  # what it has already
                host.load(self.blob.read_bytes())
        if host.start() != "":
            return False
        store: Store = host._store if isinstance(host, Copying) else host._files.store
        assert (store.counter, store.key) == (2, KEY)
        assert bytes(store.image[768:1536]) == A + bytes(256) + B
        return True


@contextmanager
def open_store_of(flash: Path, **options: bool) -> Iterator[Store]:
    store = open_store(Paths.resolve(str(flash)), **options)  # type: ignore[arg-type]
    try:
        yield store
    finally:
        store.close()


def noted(method: Callable[[Note, Possession], None]) -> Callable[[Note, Possession], None]:
    """A method of a note, and a step behind it: no call need follow before SQLite's commit."""

    def note(self: Note, possession: Possession) -> None:
        method(self, possession)
        sys.audit("os.note")

    return note


def kill_at(step: int, part: Callable[[], None]) -> None:
    """Run a part in a process that is killed at a step."""

    def work() -> None:
        steps = 0

        def count(event: str, _arguments: tuple[object, ...]) -> None:
            nonlocal steps
            if event.startswith(("os.", "sqlite3.", "open")):
                steps += 1
                if steps == step + 1:
                    os.kill(os.getpid(), 9)

        sys.addaudithook(count)
        for name in ("give", "arrive"):
            setattr(Note, name, noted(getattr(Note, name)))
        part()

    in_killed_process(work)


# What happened, part by part; the part that is killed at a step, and a number of steps that it does
# not reach in any mode.
STORIES: dict[str, tuple[list[str], str, int]] = {
    "save": ([], "save", 16),
    "load": (["save"], "load", 28),
    "start": (["save"], "arrive", 34),
    "start-later": (["save", "load"], "arrive", 28),
    "resume": (["save"], "resume", 28),
    "resume-after-load": (["save", "load"], "resume", 28),
}
CASES = [
    (story, step, order, kept)
    for story, (_, _, steps) in STORIES.items()
    for step in range(steps)
    for order in (("source", "destination"), ("destination", "source"))
    for kept in (True, False)
]


def happen(world: World, story: str, step: int) -> None:
    before, last, _ = STORIES[story]
    for part in before:
        in_killed_process(getattr(world, part))
    world.ended.unlink(missing_ok=True)
    kill_at(step, getattr(world, last))


@pytest.mark.parametrize("mode", ["copy", "shared"])
@pytest.mark.parametrize("story", STORIES)
def test_every_step_is_killed(tmp_path: Path, engine: Engine, mode: str, story: str) -> None:
    """A part has come to its end at the number of its last case."""
    world = World(tmp_path, engine, mode, kept=True)
    *_, steps = STORIES[story]
    happen(world, story, steps - 1)
    assert world.ended.exists()


@pytest.mark.parametrize("mode", ["copy", "shared"])
@pytest.mark.parametrize(
    ("story", "step", "order", "kept"),
    sample(CASES)[:: 1 if DIVISOR == 1 else 2],
    ids=lambda value: value[0] if isinstance(value, tuple) else str(value),
)
def test_one_host_answers_after_a_kill(
    tmp_path: Path,
    engine: Engine,
    mode: str,
    story: str,
    step: int,
    order: tuple[str, str],
    kept: bool,
) -> None:
    world = World(tmp_path, engine, mode, kept=kept)
    happen(world, story, step)
    with ExitStack() as stack:
        running = [name for name in order if world.runs(name, stack)]
    if not world.blob.exists() and kept:
        assert running == ["source"]  # what was not given away is not lost
    elif kept or world.blob.exists():
        assert len(running) == 1
    else:
        assert running in ([], ["source"])  # handed over, and by the operator's word taken back
    shutil.rmtree(tmp_path / "fence")
