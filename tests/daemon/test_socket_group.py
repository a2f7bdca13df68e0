# SPDX-License-Identifier: Apache-2.0
"""``--socket-group``: another user's front-end connects, and nobody beyond the group does."""

from __future__ import annotations

import errno
import os
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX, environment
from vhost_rpmb.cli import parse_options
from vhost_rpmb.errors import UsageError
from vhost_rpmb.testing import RunningDevice

GROUP, OTHER_GROUP = 61234, 61235
DAEMON_USER, USER = 61236, 61237

CONNECT = "import socket, sys; print(socket.socket(socket.AF_UNIX).connect_ex(sys.argv[1]))"


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that every user can enter, unlike tmp_path."""
    with tempfile.TemporaryDirectory() as path:
        Path(path).chmod(0o755)
        yield Path(path)


def as_user(uid: int, gid: int, groups: list[int]) -> list[str]:
    """The start of a command line that another user runs.

    It keeps the capability to read every file: Python may be out of reach of other users.
    """
    capabilities = "-all,+dac_read_search"
    return [
        *("setpriv", f"--reuid={uid}", f"--regid={gid}"),
        f"--groups={','.join(map(str, groups))}" if groups else "--clear-groups",
        *(f"--inh-caps={capabilities}", f"--ambient-caps={capabilities}"),
    ]


def connect(path: Path, groups: list[int], gid: int) -> int:
    """Connect as a user with these groups; return the error number."""
    command = [*as_user(USER, gid, groups), sys.executable, "-c", CONNECT, str(path)]
    return int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)


def become(device: RunningDevice, groups: list[int]) -> None:
    """Have the daemon run as a user with these groups, on files of that user."""
    for path in (device.folder, device.flash_path):
        os.chown(path, DAEMON_USER, DAEMON_USER)
    device.command_line[:0] = as_user(DAEMON_USER, DAEMON_USER, groups)
    device.environment = environment()  # that user cannot write the file of coverage


def mode_and_group(path: Path) -> tuple[int, int]:
    found = path.stat()
    return stat.S_IMODE(found.st_mode), found.st_gid


@pytest.mark.needs_root
def test_members_of_the_group_connect_and_nobody_else(folder: Path) -> None:
    with RunningDevice(folder, f"--socket-group={GROUP}", *SANDBOX) as device:
        assert mode_and_group(device.socket_path) == (0o660, GROUP)
        assert connect(device.socket_path, [GROUP], OTHER_GROUP) == 0
        assert connect(device.socket_path, [], GROUP) == 0
        assert connect(device.socket_path, [OTHER_GROUP], OTHER_GROUP) == errno.EACCES


@pytest.mark.needs_root
def test_without_the_option_the_group_cannot_connect(folder: Path) -> None:
    with RunningDevice(folder, *SANDBOX) as device:
        assert mode_and_group(device.socket_path) == (0o600, os.getegid())
        assert connect(device.socket_path, [], os.getegid()) == errno.EACCES


@pytest.mark.needs_root
def test_user_gives_the_socket_to_a_group_of_its_own(folder: Path) -> None:
    device = RunningDevice(folder, f"--socket-group={GROUP}", *SANDBOX)
    become(device, [GROUP])
    with device:
        assert mode_and_group(device.socket_path) == (0o660, GROUP)
        assert connect(device.socket_path, [GROUP], OTHER_GROUP) == 0
        assert connect(device.socket_path, [], OTHER_GROUP) == errno.EACCES


@pytest.mark.needs_root
def test_group_of_others_is_refused(folder: Path) -> None:
    device = RunningDevice(folder, f"--socket-group={GROUP}", *SANDBOX)
    become(device, [OTHER_GROUP])
    with pytest.raises(RuntimeError, match="does not start"):
        device.start()
    warning, line = device.log.splitlines()
    assert "a restart will end the connection: there is no descriptor store" in warning
    assert re.fullmatch(
        rf"vhost-user-rpmb: error: --socket-group={GROUP}: expected .*, found: "
        "Operation not permitted: name one of this user's groups, or start as root",
        line,
    )
    assert not device.socket_path.exists()


@pytest.mark.needs_root
def test_umask_does_not_matter(folder: Path) -> None:
    before = os.umask(0o027)
    try:
        with RunningDevice(folder, f"--socket-group={GROUP}", *SANDBOX) as device:
            assert mode_and_group(device.socket_path) == (0o660, GROUP)
    finally:
        os.umask(before)


@pytest.mark.needs_ptrace
def test_nobody_can_connect_before_mode_and_group_are_right(tmp_path: Path) -> None:
    """The socket is made with its mode, and listens after it has its group."""
    log = tmp_path / "strace"
    device = RunningDevice(tmp_path, f"--socket-group={os.getegid()}", "--sandbox=off")
    calls = "trace=umask,bind,chown,fchown,lchown,fchownat,chmod,fchmod,fchmodat,listen"
    # The daemon is killed when strace is, also if the start fails.
    device.command_line[:0] = [
        *("strace", "-f", "-qq", "-e", calls, "-o", str(log)),
        *("setpriv", "--pdeathsig=KILL"),
    ]
    device.start()
    device.kill()
    lines = [line.split(maxsplit=1)[1] for line in log.read_text().splitlines()]
    bound = next(number for number, line in enumerate(lines) if str(device.socket_path) in line)
    assert lines[bound - 1].startswith("umask(0117)")
    assert lines[bound].startswith("bind(")
    assert "chown" in lines[bound + 1]
    assert f", -1, {os.getegid()}" in lines[bound + 1]
    assert lines[bound + 2].startswith("listen(")


@pytest.mark.parametrize("group", ["no-such-group", "", "-1", "4294967295", "12345678901", "1.5"])
def test_unknown_group_is_refused(group: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(["--flash-path=f", "--socket-path=s", f"--socket-group={group}"], {})
    assert f"expected a group name or number, found {group!r}" in str(caught.value)


def test_group_is_only_for_a_socket_of_the_daemon() -> None:
    with pytest.raises(UsageError, match="--socket-group needs --socket-path=PATH"):
        parse_options(["--flash-path=f", "--fd=3", "--socket-group=0"], {})
