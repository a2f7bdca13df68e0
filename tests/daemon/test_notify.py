# SPDX-License-Identifier: Apache-2.0
"""What a service manager sees: socket activation, notifications, priorities, installed files."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, SANDBOX, spawned, until
from tests.support.oracle import KEY
from vhost_rpmb import cli
from vhost_rpmb.daemon.notify import Notifier
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request

SHARE = Path(__file__).parents[2] / "share"


class Manager:
    """A service manager's end of the notify socket."""

    def __init__(self, address: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.settimeout(PATIENCE)
        self._socket.bind(address)

    def close(self) -> None:
        self._socket.close()

    def hears(self) -> dict[str, str]:
        """The next notification, by variable."""
        lines = self._socket.recv(4096).decode().split("\n")
        return dict(line.split("=", 1) for line in lines)

    def hears_status(self, pattern: str) -> None:
        """Wait until the status is one that matches."""
        ends = time.monotonic() + PATIENCE
        while not re.fullmatch(pattern, status := self.hears().get("STATUS", "")):
            assert time.monotonic() < ends, status


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    manager = Manager(str(tmp_path / "notify"))
    yield manager
    manager.close()


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path, flash: Path, engine: Engine) -> Iterator[Launch]:
    """Start the daemon behind a socket that it inherits as descriptor 3."""
    started = []

    def launch(**variables: str) -> subprocess.Popen[str]:
        variables |= {"VHOST_RPMB_ENGINE": engine.name}
        # All of it: coverage is measured in the daemon too, and sanitizers have their own. The
        # variables are only for the daemon: systemd 262's activator notifies a manager itself.
        names = [name for name in os.environ if name.isidentifier() and name not in variables]
        process = subprocess.Popen(
            [
                "systemd-socket-activate",
                f"--listen={tmp_path / 'activated'}",
                *(f"--setenv={name}" for name in names),
                *(f"--setenv={name}={value}" for name, value in variables.items()),
                *(sys.executable, "-m", "vhost_rpmb", "--fd=3", f"--flash-path={flash}"),
                *SANDBOX,
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        until(lambda: listens(tmp_path / "activated") or process.poll() is not None)
        assert process.poll() is None, process.communicate()[1]
        return process

    yield launch
    for process in started:
        process.kill()
        process.communicate()


def listens(path: Path) -> bool:
    """Whether a socket listens; without a connection, which would start the daemon."""
    accepts = 1 << 16  # __SO_ACCEPTCON
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        _, _, _, flags, _, _, _, *name = line.split(maxsplit=7)
        if name == [str(path)] and int(flags, 16) & accepts:
            return True
    return False


def connect(path: Path) -> RpmbClient:
    return RpmbClient.connect(str(path), key=KEY, timeout=PATIENCE)


def test_activation_and_notifications(launch: Launch, manager: Manager, tmp_path: Path) -> None:
    process = launch(NOTIFY_SOCKET=str(tmp_path / "notify"))
    with connect(tmp_path / "activated") as client:
        assert manager.hears() == {
            "READY": "1",
            "STATUS": "waiting for a front-end; write counter 0; 0 requests served",
        }
        manager.hears_status("front-end connected; write counter 0; 0 requests served")
        client.program_key(KEY)
        client.write(0, bytes(256), 0)
        client.write(0, bytes(256), 1)
        manager.hears_status("front-end connected; write counter 2; 3 requests served")
    manager.hears_status("waiting for a front-end; write counter 2; 3 requests served")
    process.send_signal(signal.SIGTERM)
    assert manager.hears() == {"STOPPING": "1"}
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors


def test_missing_notify_socket_is_ignored(launch: Launch, tmp_path: Path) -> None:
    """A notify socket that nobody has any more does not keep the daemon from serving."""
    launch(NOTIFY_SOCKET=str(tmp_path / "nobody"))
    with connect(tmp_path / "activated") as client:
        assert client.config.capacity == 1


@pytest.mark.parametrize("name", ["\0vhost-rpmb-test-{}", "{}/notify"])
def test_notify_socket_may_be_a_path_or_abstract(name: str, tmp_path: Path) -> None:
    """A path, or an abstract name, which the variable writes with an @."""
    address = name.format(os.getpid() if name[0] == "\0" else tmp_path)
    manager = Manager(address)
    environment = {"NOTIFY_SOCKET": address.replace("\0", "@")}
    notifier = Notifier(environment)
    notifier.send("READY=1", "STATUS=a b")
    assert manager.hears() == {"READY": "1", "STATUS": "a b"}
    assert not environment
    manager.close()
    notifier.send("STOPPING=1")
    notifier.close()
    assert not notifier.active


def test_no_descriptor_for_the_manager(tmp_path: Path) -> None:
    """A service that cannot tell anybody still serves."""
    program = (
        "import resource; from vhost_rpmb.daemon.notify import Notifier;"
        "limits = resource.getrlimit(resource.RLIMIT_NOFILE);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]));"
        f"notifier = Notifier({{'NOTIFY_SOCKET': {str(tmp_path / 'notify')!r}}});"
        "notifier.send('READY=1'); print(notifier.active);"
        "resource.setrlimit(resource.RLIMIT_NOFILE, limits)"  # for what measures coverage
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


@pytest.mark.parametrize("journal", [True, False])
def test_lines_for_the_journal_have_their_priority(journal: bool, tmp_path: Path) -> None:
    """Errors of the command line and of the start; elsewhere than in the journal there is none."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 33 * 1024 * 1024)
    stream = tmp_path / "stream"
    for options, text in (
        (["--flash"], "error: "),
        ([f"--flash-path={image}", "--socket-path=s", "--key-set"], "error: --key-set needs"),
        ([f"--flash-path={image}", "--socket-path=s"], "error: the image"),
    ):
        with stream.open("w") as file:
            status = os.fstat(file.fileno())
            inode = status.st_ino if journal else status.st_ino + 1
            done = subprocess.run(
                [sys.executable, "-m", "vhost_rpmb", *options],
                env=os.environ | {"JOURNAL_STREAM": f"{status.st_dev}:{inode}"},
                stderr=file,
            )
        assert done.returncode == 2
        prefix = "<3>" if journal else ""
        assert stream.read_text().startswith(f"{prefix}vhost-user-rpmb: {text}")


def test_warnings_for_the_journal_have_their_priority(
    engine: Engine, flash: Path, tmp_path: Path
) -> None:
    stream = tmp_path / "stream"
    ours, theirs = socket.socketpair()
    with stream.open("w") as file, ours, theirs:
        status = os.fstat(file.fileno())
        command = [
            *(sys.executable, "-m", "vhost_rpmb", "-vv", f"--flash-path={flash}", *SANDBOX),
            *("--initial-counter=5", f"--fd={theirs.fileno()}"),
        ]
        variables = os.environ | {
            "VHOST_RPMB_ENGINE": engine.name,
            "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}",
        }
        fds = [theirs.fileno()]
        with spawned(command, env=variables, stderr=file, pass_fds=fds) as process:
            theirs.close()
            ours.send(struct.pack("=III", Request.GET_FEATURES, wire.VERSION, 0))
            ours.send(bytes(12))  # protocol version 0
            assert process.wait(PATIENCE) == 0
    lines = stream.read_text().splitlines()
    assert any(re.match(r"<6>vhost-user-rpmb: info: front-end connected", line) for line in lines)
    assert any(re.match(r"<7>vhost-user-rpmb: debug: GET_FEATURES", line) for line in lines)
    assert any(re.match(r"<4>vhost-user-rpmb: warning: .*protocol", line) for line in lines)
    assert all(re.match(r"<[3467]>vhost-user-rpmb: ", line) for line in lines)


def test_description_for_management_software() -> None:
    """It keeps the rules of VhostUserBackend in QEMU's docs/interop/vhost-user.json."""
    description = json.loads((SHARE / "50-vhost-user-rpmb.json").read_text())
    assert set(description) - {"tags"} == {"description", "type", "binary"}
    assert all(isinstance(value, str) for value in description.values())
    assert description["type"] == cli.CAPABILITIES["type"]
    binary = Path(description["binary"])
    assert binary.is_absolute()
    assert binary.name == cli.PROG
