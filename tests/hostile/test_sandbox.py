# SPDX-License-Identifier: Apache-2.0
"""What the process cannot do any more once it serves, and that it needs none of it."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.daemon import DaemonFactory, environment, spawned
from tests.support.oracle import KEY
from vhost_rpmb.driver.rpmb import RpmbClient

# Each is tried in a process that has given up what the daemon gives up, by the same function. Below
# each of the folders state, keys and run are files of others; the key is not programmed yet.
FORBIDDEN = {
    "opening another file": ("open('/etc/passwd')", errno.EACCES),
    "making a file elsewhere": ("open(outside + '/new', 'w')", errno.EACCES),
    "removing a file elsewhere": ("os.unlink(outside + '/file')", errno.EACCES),
    "listing another folder": ("os.listdir('/')", errno.EACCES),
    "listing its own folder": ("os.listdir(inside + '/state')", errno.EPERM),
    "reading beside the state": ("open(inside + '/state/other/file')", errno.EACCES),
    "writing beside the state": ("open(inside + '/state/other/file', 'r+b')", errno.EACCES),
    "truncating beside the state": ("os.truncate(inside + '/state/other/file', 0)", errno.EPERM),
    "a file with content beside the state": ("open(inside + '/state/new', 'w')", errno.EACCES),
    "reading beside the key": ("open(inside + '/keys/other/file')", errno.EACCES),
    "reading beside the socket": ("open(inside + '/run/other/file')", errno.EACCES),
    "writing beside the socket": ("open(inside + '/run/other/file', 'r+b')", errno.EACCES),
    "a file beside the socket": ("open(inside + '/run/other/new', 'w')", errno.EACCES),
    "an empty file beside the socket": ("os.mknod(inside + '/run/new', 0o600)", errno.EACCES),
    "renaming beside the socket": (
        "os.rename(inside + '/run/other/file', inside + '/run/other/new')",
        errno.EACCES,
    ),
    "opening the socket's folder": ("os.open(inside + '/run', os.O_RDONLY)", errno.EACCES),
    "a set-user-ID file": (
        "os.open(inside + '/keys/new', os.O_WRONLY | os.O_CREAT, 0o4755)",
        errno.EPERM,
    ),
    "a set-group-ID file": ("os.mknod(inside + '/state/new', 0o2600)", errno.EPERM),
    "a device": ("os.mknod(inside + '/state/new', 0o600 | stat.S_IFCHR, 0x103)", errno.EPERM),
    "the mode of an open file": ("os.fchmod(flash.fileno(), 0o4755)", errno.EPERM),
    "the mode of a file": ("os.chmod(inside + '/flash', 0o4755)", errno.EPERM),
    "the owner of an open file": ("os.fchown(flash.fileno(), 1, 1)", errno.EPERM),
    "a network socket": ("socket.socket(socket.AF_INET)", errno.EPERM),
    "a UNIX socket": ("socket.socket(socket.AF_UNIX)", errno.EPERM),
    "a datagram to another socket": (
        "datagrams.sendto(b'', os.path.relpath(inside + '/run/datagrams'))",
        errno.EPERM,
    ),
    "another program": ("os.execv('/bin/true', ['true'])", errno.EPERM),
    "another process": ("os.fork()", errno.EPERM),
    "a signal to another process": ("os.kill(os.getppid(), 0)", errno.EPERM),
    "signals from a descriptor": ("fcntl.fcntl(reader, fcntl.F_SETOWN, os.getppid())", errno.EPERM),
    "executable memory": ("mmap.mmap(-1, 4096, prot=mmap.PROT_EXEC)", errno.EPERM),
    "another identity": ("os.setuid(1)", errno.EPERM),
    "another root": ("os.chroot('/')", errno.EPERM),
}
ALLOWED = {
    "an empty file beside the state": "os.mknod(inside + '/state/new', 0o600)",
    "removing a file beside the state": "os.unlink(inside + '/state/file')",
    "syncing the state's folder": "os.fsync(os.open(inside + '/state', os.O_RDONLY))",
    "a new key file": (
        "os.rename(open(inside + '/keys/key.new', 'wb').name, inside + '/keys/key')"
    ),
    "removing the socket": "os.unlink(inside + '/run/socket')",
    "a pipe that came over the socket": "os.open(f'/proc/self/fd/{reader}', os.O_RDONLY)",
    "a thread": "_thread.start_new_thread(time.sleep, (0,))",
    "a signal to itself": "signal.raise_signal(signal.SIGCHLD)",
}


# A process of its own for each statement, as a copy of one that has imported all modules.
SERVER = """
import _thread, ctypes, errno, fcntl, json, mmap, os, signal, socket, stat, sys, time
from vhost_rpmb import libc, process
from vhost_rpmb.daemon import sandbox, server
from vhost_rpmb.storage.local.store import resources
from vhost_rpmb.storage.paths import Paths

def attempt(inside, outside, statement, programmed, landlock, store):
    paths = Paths.resolve(inside + "/flash", inside + "/state/s", inside + "/keys/key")
    flash = open(paths.flash, "r+b")
    reader, writer = os.pipe()
    os.chdir(inside)  # the path of a socket is short
    other = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    other.bind("run/datagrams")
    datagrams, _ = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    if not landlock:
        sandbox._restrict_files = lambda *_: None
    process.hide_memory()
    folders = server.folders(resources(paths, programmed), inside + "/run/socket")
    sandbox.enter(folders, descriptor_store=store)
    try:
        exec(statement, globals() | locals())
    except OSError as error:
        return errno.errorcode[error.errno]
    return "done"

for line in sys.stdin:
    child = os.fork()
    if not child:
        try:
            result = attempt(**json.loads(line))
        except BaseException as error:
            result = repr(error)
        os.write(1, result.encode() + b"\\n")
        os._exit(0)
    os.waitpid(child, 0)
"""

InSandbox = Callable[..., str]


@pytest.fixture(scope="module")
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SERVER]
    pipe = subprocess.PIPE
    with spawned(command, env=environment(), stdin=pipe, stdout=pipe, text=True) as process:
        yield process


@pytest.fixture
def in_sandbox(server: subprocess.Popen[str], tmp_path: Path) -> InSandbox:
    """Try a statement in the sandbox; return the name of the error, or 'done'.

    Without ``landlock``, in the sandbox as it is on a kernel that does not have that.
    """

    def attempt(
        statement: str, *, programmed: bool = False, landlock: bool = True, store: bool = False
    ) -> str:
        inside, outside = tmp_path / "inside", tmp_path / "outside"
        for folder in (inside, outside):
            shutil.rmtree(folder, ignore_errors=True)
        for name in ("state", "keys", "run"):
            (inside / name / "other").mkdir(parents=True)
            (inside / name / "other/file").touch()
        outside.mkdir()
        for file in ("inside/flash", "inside/state/file", "inside/run/socket", "outside/file"):
            (tmp_path / file).touch()
        task = {
            "inside": str(inside),
            "outside": str(outside),
            "statement": textwrap.dedent(statement),
            "programmed": programmed,
            "landlock": landlock,
            "store": store,
        }
        assert server.stdin
        assert server.stdout
        server.stdin.write(json.dumps(task) + "\n")
        server.stdin.flush()
        return server.stdout.readline().strip()

    return attempt


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("what", FORBIDDEN)
def test_sandbox_forbids(in_sandbox: InSandbox, what: str) -> None:
    statement, error = FORBIDDEN[what]
    assert in_sandbox(statement) == errno.errorcode[error]


@pytest.mark.needs_sandbox
@pytest.mark.parametrize(
    ("pid", "kind", "result"),
    [("getpid", 0, "done"), ("getppid", 0, "EPERM"), ("getpid", 1, "EPERM")],
)
def test_only_own_files_are_compared(
    in_sandbox: InSandbox, pid: str, kind: int, result: str
) -> None:
    statement = f"""
    libc._call("kcmp", os.getpid(), os.{pid}(), {kind}, 0, 1)
    """
    assert in_sandbox(statement, store=True) == result


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("what", FORBIDDEN)
def test_sandbox_with_a_descriptor_store_forbids(in_sandbox: InSandbox, what: str) -> None:
    statement, error = FORBIDDEN[what]
    assert in_sandbox(statement, store=True) == errno.errorcode[error]


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("what", ALLOWED)
def test_sandbox_allows(in_sandbox: InSandbox, what: str) -> None:
    assert in_sandbox(ALLOWED[what]) == "done"


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("what", ["a new key file", "removing a file"])
def test_key_folder_is_out_of_reach_once_a_key_is_programmed(
    in_sandbox: InSandbox, what: str
) -> None:
    statement = ALLOWED.get(what, "os.unlink(inside + '/keys/other/file')")
    assert in_sandbox(statement) == "done"
    assert in_sandbox(statement, programmed=True) == "EACCES"


@pytest.mark.needs_sandbox
def test_no_program_with_set_id_bits_can_be_left(in_sandbox: InSandbox, tmp_path: Path) -> None:
    """By no call that makes a file or changes its mode: raw, without the C library's checks."""
    attempts = """
    libc = ctypes.CDLL(None, use_errno=True)
    for path in (inside + "/keys/program", inside + "/state/program", inside + "/flash"):
        name = path.encode()
        for mode in (0o4755, 0o2755, 0o1755, 0o7777, 0xFFFF_0000 | 0o104755):
            for call in (
                lambda: libc.creat(name, mode),
                lambda: libc.open(name, os.O_RDWR | os.O_CREAT, mode),
                lambda: libc.openat(-100, name, os.O_RDWR | os.O_CREAT, mode),
                lambda: libc.mknod(name, stat.S_IFREG | mode, 0),
                lambda: libc.mknodat(-100, name, stat.S_IFREG | mode, 0),
                lambda: libc.mkdir(name, mode),
                lambda: libc.chmod(name, mode),
                lambda: libc.fchmodat(-100, name, mode, 0),
                lambda: libc.fchmod(flash.fileno(), mode),
            ):
                call()
"""
    assert in_sandbox(attempts) == "done"
    for path in tmp_path.rglob("*"):
        assert not path.stat().st_mode & 0o7000, path


@pytest.mark.needs_sandbox
def test_no_descriptor_sends_signals_without_landlock(in_sandbox: InSandbox) -> None:
    """F_SETOWN, F_SETSIG and O_ASYNC would kill processes of the same user."""
    attack = """
    libc = ctypes.CDLL(None, use_errno=True)
    for command, value in (
        (fcntl.F_SETOWN, {pid}),
        (fcntl.F_SETSIG, signal.SIGKILL),
        (fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK),
        (fcntl.F_SETFL | 1 << 32, os.O_ASYNC | os.O_NONBLOCK),
    ):
        libc.syscall({fcntl}, reader, ctypes.c_long(command), ctypes.c_long(value))
    libc.ioctl(reader, 0x5452, ctypes.byref(ctypes.c_int(1)))  # FIOASYNC
    libc.ioctl(reader, 0x8901, ctypes.byref(ctypes.c_int({pid})))  # FIOSETOWN
    os.write(writer, b"x")
"""
    fcntl_number = {"x86_64": 72, "aarch64": 25}[os.uname().machine]
    with spawned(["sleep", "1000"]) as victim:
        statement = attack.format(pid=victim.pid, fcntl=fcntl_number)
        assert in_sandbox(statement, landlock=False) == "done"
        assert victim.poll() is None


@pytest.mark.needs_sandbox
def test_empty_log_replaces_the_one_that_sqlite_removes(flash: Path) -> None:
    """If the state cannot be marked as closed, SQLite removes its log all the same."""
    script = f"""
from vhost_rpmb.daemon import sandbox, server
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.storage.local.opening import open_store
paths = Paths.resolve({str(flash)!r})
store = open_store(paths)
sandbox.enter(server.folders(store.resources(), None))
store._database._close_connection()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment(), capture_output=True, text=True
    )
    assert not done.stderr, done.stderr
    log = Path(f"{flash}.state-wal")
    assert (log.stat().st_size, log.stat().st_mode & 0o7777) == (0, 0o600)


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


@pytest.mark.needs_sandbox
@pytest.mark.parametrize("key_file", [False, True])
def test_device_works_in_the_sandbox(daemon: DaemonFactory, tmp_path: Path, key_file: bool) -> None:
    """Programming, writing, checkpoints, reconnecting, a clean stop, another start."""
    folder = tmp_path / "keys"
    folder.mkdir()
    options = [f"--key-path={folder / 'key'}"] if key_file else []
    running = daemon("--sandbox=on", *options)
    with RpmbClient.connect(str(running.socket_path)) as client:
        client.program_key(KEY)
    found = status(running.pid)
    assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2")
    for number in range(3):
        with RpmbClient.connect(str(running.socket_path), KEY) as client:
            for address in range(0, 480, 32):
                client.write(address, bytes([number + 1]) * 256 * 32)
    with RpmbClient.connect(str(running.socket_path), KEY) as client:
        assert client.read(0, 1) == b"\3" * 256
        assert client.read_counter() == 45
    running.stop()
    (line,) = running.log.splitlines()
    assert "there is no descriptor store" in line
    assert not running.socket_path.exists()
    assert not Path(f"{running.flash_path}.state-wal").exists()
    assert running.flash_path.read_bytes()[: 480 * 256] == b"\3" * 480 * 256
    running = daemon("--sandbox=on", *options)
    with RpmbClient.connect(str(running.socket_path), KEY) as client:
        assert client.read_counter() == 45


def test_sandbox_can_be_turned_off(daemon: DaemonFactory) -> None:
    running = daemon("--sandbox=off")
    found = status(running.pid)
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
    with open(reader) as lines:
        assert any("listening" in line for line in lines)
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert "Max core file size        0                    0 " in limits
    os.kill(pid, signal.SIGSEGV)
    _, ended = os.waitpid(pid, 0)
    assert os.WTERMSIG(ended) == signal.SIGSEGV
    assert not os.WCOREDUMP(ended)
