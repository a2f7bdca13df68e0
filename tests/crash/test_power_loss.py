# SPDX-License-Identifier: Apache-2.0
"""Every state that a power cut can leave holds what was acknowledged."""

from __future__ import annotations

import itertools
import logging
import os
import random
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.crash.disk import Call, Disk, State, run_recorded
from tests.crash.workload import KEY, MARKS, record, steps
from tests.support.rig import make_image
from vhost_rpmb.errors import OperatorError, StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths

pytestmark = [pytest.mark.needs_ptrace, pytest.mark.usefixtures("untraced")]
STATES = int(os.environ.get("VHOST_RPMB_CRASH_STATES", "3000"))
MISSED = 3000  # states within which a missing sync shows
# Whether every sync of the workload fails in turn, and the states after each that does.
EVERY_SYNC = "VHOST_RPMB_EVERY_SYNC" in os.environ
SYNC_STATES = 300 if EVERY_SYNC else 100
# Otherwise these: 18, 26 and 75 are of first commits after a checkpoint in slices or half of one,
# 55 is of the end of a stop.
FAILING_SYNCS = (1, 18, 26, 55, 75, 82)
STAMP = "user.vhost-rpmb"


def keeps_stamps(folder: str) -> bool:
    """Whether a folder's files may have extended attributes (tmpfs: Linux 6.6 or later)."""
    try:
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            os.setxattr(file.fileno(), STAMP, b"x")
    except OSError:
        return False
    return True


MEMORY = "/dev/shm" if keeps_stamps("/dev/shm") else None

Expected = tuple[int, bytes | None, bytes, Replay]  # counter, key, image, replay record


def expectations() -> list[Expected]:
    """Give what the device holds before any step, and after each."""
    counter, key, image, replay = 0, None, bytearray(spec.CAPACITY_UNIT), NO_REPLAY
    states: list[Expected] = [(counter, key, bytes(image), replay)]
    for step in steps():
        if step.kind in ("key", "commit"):
            replay = record(step, counter)
        elif step.kind == "settled restart":
            replay = NO_REPLAY
        if step.kind == "key":
            key = KEY
        elif step.kind == "commit":
            counter += 1
            for address, data in step.blocks:
                image[address * spec.BLOCK_SIZE : (address + 1) * spec.BLOCK_SIZE] = data
        states.append((counter, key, bytes(image), replay))
    return states


@pytest.fixture(scope="module", params=["key file", "key in the state"])
def recording(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, bool, list[Call]]:
    """Record the workload once: its folder, whether there is a key file, and the calls."""
    folder = tmp_path_factory.mktemp("power").resolve()
    flash = make_image(folder / "flash.img")
    with_file = request.param == "key file"
    arguments = [str(flash), *([str(folder / "key")] if with_file else [])]
    log = tmp_path_factory.mktemp("log") / "strace"
    return folder, with_file, run_recorded("tests.crash.workload", folder, log, *arguments)


class _Loss(Exception):
    """A state does not hold what it must."""


def check(state: State, with_file: bool, done: int, begun: int, expected: list[Expected]) -> None:
    """Open a state as a fresh start would, and compare it with what may be there."""
    with tempfile.TemporaryDirectory(dir=MEMORY) as name:
        folder = Path(name)
        for file, content in state.items():
            (folder / file).write_bytes(content.data)
            if content.stamp is not None:
                os.setxattr(folder / file, STAMP, content.stamp)
        key_path = str(folder / "key") if with_file else None
        paths = Paths.resolve(str(folder / "flash.img"), key_path=key_path)
        for _ in range(2):  # the second start finds what the first one left
            try:
                store = open_store(paths)
            except OperatorError as error:
                raise _Loss(f"refused: {error}") from error
            try:
                found = (store.counter, store.key, bytes(store.image), store.replay)
                if any(store.damaged):
                    raise _Loss("a block is not what was stored")
                if found not in expected[done : begun + 1]:
                    raise _Loss(f"write counter {found[0]} after {done} of {begun} steps")
            finally:
                store.close()
        Path(paths.state).unlink()
        with pytest.raises(StateError, match="expected the state file of device"):
            open_store(paths)


def play(
    recording: tuple[Path, bool, list[Call]], count: int, ignored_syncs: str = ""
) -> Iterator[None]:
    """Check ``count`` states, spread over all moments of the record; stop at every one."""
    folder, with_file, calls = recording
    expected = expectations()
    source = random.Random(7)
    first, disk = Disk(folder), Disk(folder, ignored_syncs)
    for each in (first, disk):
        each.add("flash.img", bytes(spec.CAPACITY_UNIT))
    moments = sum(first.apply(call, MARKS) for call in calls)
    done = begun = 0
    budget = 0.0
    for call in calls:
        if disk.apply(call, MARKS):
            budget += count / moments
        for mark in disk.marks:
            word, number = mark.split()
            if word == "begin":
                begun = int(number) + 1
            elif word == "done":
                done = int(number) + 1
            else:
                begun = int(number)  # what was reported as failed must not come back
                budget += 10
        disk.marks.clear()
        if budget >= 2:
            for state in disk.states(source, int(budget)):
                check(state, with_file, done, begun, expected)
                budget -= 1
                yield
    assert done == len(expected) - 1


def test_no_state_that_power_loss_can_leave_loses_anything(
    recording: tuple[Path, bool, list[Call]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)
    checked = sum(1 for _ in play(recording, STATES // 2))
    assert checked > 0.9 * STATES / 2


@pytest.mark.parametrize("ignored", [".state-wal", "flash.img", "key.new", "/"])
def test_missing_sync_is_detected(
    recording: tuple[Path, bool, list[Call]], caplog: pytest.LogCaptureFixture, ignored: str
) -> None:
    """The check bites: without the sync of the log, image, key file or folder, it fails."""
    caplog.set_level(logging.CRITICAL)
    if ignored == "key.new" and not recording[1]:
        return
    with pytest.raises(_Loss):
        for _ in play(recording, MISSED, ignored):
            pass


@pytest.mark.parametrize("share", range(len(FAILING_SYNCS)))
@pytest.mark.timeout(3600)
def test_power_loss_after_a_failed_sync(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, share: int
) -> None:
    """Each sync fails in turn (a sample, unless told otherwise), later the power does."""
    caplog.set_level(logging.CRITICAL)
    log = tmp_path / "strace"
    first = 1 + share if EVERY_SYNC else FAILING_SYNCS[share]
    for number in itertools.count(first, len(FAILING_SYNCS)) if EVERY_SYNC else [first]:
        folder = (tmp_path / str(number)).resolve()
        folder.mkdir()
        flash = make_image(folder / "flash.img")
        arguments = (str(flash), str(folder / "key"))
        calls = run_recorded("tests.crash.workload", folder, log, *arguments, failing_sync=number)
        if all(call.result >= 0 for call in calls):
            assert number > first, "no sync failed"
            break  # the workload has no more of them
        assert sum(1 for _ in play((folder, True, calls), SYNC_STATES)) > 0.8 * SYNC_STATES
