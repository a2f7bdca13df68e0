# SPDX-License-Identifier: Apache-2.0
"""The offline check."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.rig import make_image, write_key
from tests.support.store import (
    OTHER_KEY,
    Open,
    backup,
    in_killed_process,
    snapshot,
    state_of,
    write_and_crash,
)
from vhost_rpmb.errors import StateError
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.local.verification import verify
from vhost_rpmb.storage.paths import Paths


def test_verify_reports_and_changes_nothing(written: Path, tmp_path: Path) -> None:
    write_and_crash(written)
    with written.open("r+b") as image:
        for address in (9, 30, 31):  # 9 waits in the state file, so nothing is lost there
            image.seek(address * 256)
            image.write(os.urandom(256))
    before = snapshot(tmp_path)
    report = verify(Paths.resolve(str(written)))
    assert snapshot(tmp_path) == before
    assert (report.counter, report.pending, report.damaged) == (13, [9], [30, 31])
    assert (report.clean, report.programmed, report.disagreement) == (False, False, "")


def test_verify_reports_an_exchanged_image_and_all_its_damage(
    written: Path, tmp_path: Path
) -> None:
    written.write_bytes(backup(written, 1).read_bytes())
    before = snapshot(tmp_path)
    report = verify(Paths.resolve(str(written)))
    assert "earlier time" in report.disagreement
    assert report.damaged == list(range(49))
    assert report.clean
    assert snapshot(tmp_path) == before


def test_verify_checks_a_given_key_file(opened: Open, flash: Path, key_path: Path) -> None:
    report = verify(Paths.resolve(str(flash)))
    assert (report.programmed, report.key_in_file) == (True, True)
    assert verify(Paths.resolve(str(flash), key_path=str(key_path))).programmed
    write_key(key_path, OTHER_KEY)
    with pytest.raises(StateError, match="another key"):
        verify(Paths.resolve(str(flash), key_path=str(key_path)))


@pytest.mark.parametrize("check", [verify, open_store])
def test_verify_and_start_write_no_copy_of_the_state(
    written: Path, tmp_path: Path, check: Callable[[Paths], object]
) -> None:
    """So none can survive a SIGKILL: nothing is created but the files of the device."""
    write_and_crash(written)
    created: list[str] = []

    def note(event: str, arguments: tuple[object, ...]) -> None:
        flags = arguments[2] if event == "open" else os.O_CREAT
        if event in ("os.mkdir", "tempfile.mkstemp", "tempfile.mkdtemp", "shutil.copyfile"):
            created.append(str(arguments[0]))
        elif event == "open" and isinstance(flags, int) and flags & os.O_CREAT:
            created.append(os.fsdecode(arguments[0]))  # type: ignore[arg-type]

    def work() -> None:
        sys.addaudithook(note)
        result = check(Paths.resolve(str(written)))
        (tmp_path / "created").write_text("\n".join(created))
        del result

    in_killed_process(work)
    assert (tmp_path / "created").read_text() == ""


def test_verify_refuses_a_device_in_use_or_without_state(opened: Open, flash: Path) -> None:
    with pytest.raises(StateError, match="does not exist"):
        verify(Paths.resolve(str(flash)))

    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        _store = open_store(Paths.resolve(str(flash)))
        os.write(writer, b"1")
        signal.pause()
    try:
        os.read(reader, 1)
        with pytest.raises(StateError, match=r"image .* in use"):
            verify(Paths.resolve(str(flash)))
        other = make_image(flash.with_name("other"))
        with pytest.raises(StateError, match=r"state file .* in use"):
            verify(Paths.resolve(str(other), state_path=str(state_of(flash))))
    finally:
        os.kill(pid, 9)
        os.waitpid(pid, 0)
