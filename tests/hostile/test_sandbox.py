# SPDX-License-Identifier: Apache-2.0
"""What the process cannot do any more once it serves, and that it needs none of it."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import DaemonFactory, environment
from tests.rig import KEY
from vhost_rpmb.client.rpmb import RpmbClient

# Each is tried in a process that has given up what the daemon gives up, by the same function.
FORBIDDEN = {
    "opening another file": ("open('/etc/passwd')", errno.EACCES),
    "making a file elsewhere": ("open({outside!r} + '/new', 'w')", errno.EACCES),
    "removing a file elsewhere": ("os.unlink({outside!r} + '/file')", errno.EACCES),
    "listing another folder": ("os.listdir('/')", errno.EACCES),
    "a network socket": ("socket.socket(socket.AF_INET)", errno.EPERM),
    "a UNIX socket": ("socket.socket(socket.AF_UNIX)", errno.EPERM),
    "another program": ("os.execv('/bin/true', ['true'])", errno.EPERM),
    "another process": ("os.fork()", errno.EPERM),
    "a signal to another process": ("os.kill(os.getppid(), 0)", errno.EPERM),
    "executable memory": ("mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC)", errno.EPERM),
    "another identity": ("os.setuid(1)", errno.EPERM),
    "another root": ("os.chroot('/')", errno.EPERM),
}
ALLOWED = {
    "the image again": "open({inside!r} + '/flash', 'r+b')",
    "a file beside the state": "os.unlink(open({inside!r} + '/state/new', 'w').name)",
    "a pipe that came over the socket": "os.open(f'/proc/self/fd/{{reader}}', os.O_RDONLY)",
    "a signal to itself": "signal.raise_signal(signal.SIGCHLD)",
}


def in_sandbox(tmp_path: Path, statement: str) -> str:
    """Try a statement in the sandbox; return the name of the error, or 'done'."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "state", outside):
        folder.mkdir(parents=True)
    for file in (inside / "flash", outside / "file"):
        file.touch()
    script = f"""
import errno, mmap, os, signal, socket
from vhost_rpmb import daemon, sandbox
from vhost_rpmb.paths import Paths
paths = Paths.resolve({str(inside / "flash")!r}, {str(inside / "state/s")!r})
reader, writer = os.pipe()
sandbox.hide_memory()
sandbox.enter(*daemon._needed(paths, None))
try:
    {statement.format(inside=str(inside), outside=str(outside))}
except OSError as error:
    print(errno.errorcode[error.errno])
else:
    print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not done.stderr, done.stderr
    return done.stdout.strip()


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("what", FORBIDDEN)
def test_forbidden(tmp_path: Path, what: str) -> None:
    statement, error = FORBIDDEN[what]
    assert in_sandbox(tmp_path, statement) == errno.errorcode[error]


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("what", ALLOWED)
def test_allowed(tmp_path: Path, what: str) -> None:
    assert in_sandbox(tmp_path, ALLOWED[what]) == "done"


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("key_file", [False, True])
def test_all_of_serving_works_inside(daemon: DaemonFactory, tmp_path: Path, key_file: bool) -> None:
    """Programming, writing, checkpoints, reconnecting, a clean stop, another start."""
    folder = tmp_path / "keys"
    folder.mkdir()
    options = [f"--key-path={folder / 'key'}"] if key_file else []
    running = daemon("--sandbox=on", *options)
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(KEY)
    found = status(running.process.pid)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    for number in range(3):
        with RpmbClient.connect(str(running.socket_path), KEY) as client:
            for address in range(0, 480, 32):
                client.write(address, bytes([number + 1]) * 256 * 32)
    with RpmbClient.connect(str(running.socket_path), KEY) as client:
        assert client.read(0, 1) == b"\3" * 256
        assert client.read_counter() == 45
    assert running.stop() == ""
    assert not running.socket_path.exists()
    assert not Path(f"{running.flash_path}.state-wal").exists()
    assert running.flash_path.read_bytes()[: 480 * 256] == b"\3" * 480 * 256
    running = daemon("--sandbox=on", *options)
    with RpmbClient.connect(str(running.socket_path), KEY) as client:
        assert client.read_counter() == 45


def test_off(daemon: DaemonFactory) -> None:
    running = daemon("--sandbox=off")
    found = status(running.process.pid)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("0", "0")


@pytest.mark.needs_sigsegv
def test_no_core_dump(flash: Path, tmp_path: Path) -> None:
    """Not even with a limit that would let it, and not from the sandbox turned off."""
    sock = tmp_path / "sock"
    arguments = [f"--flash-path={flash}", f"--socket-path={sock}", "-v", "--sandbox=off"]
    reader, writer = os.pipe()
    pid = os.posix_spawn(
        sys.executable,
        [sys.executable, "-m", "vhost_rpmb", *arguments],
        environment(),
        file_actions=[(os.POSIX_SPAWN_DUP2, writer, 2), (os.POSIX_SPAWN_CLOSE, reader)],
    )
    os.close(writer)
    assert b"listening" in os.read(reader, 1000)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        0                    0 " in limits
    os.kill(pid, signal.SIGSEGV)
    _, ended = os.waitpid(pid, 0)
    os.close(reader)
    assert os.WTERMSIG(ended) == signal.SIGSEGV
    assert not os.WCOREDUMP(ended)
