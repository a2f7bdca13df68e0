# SPDX-License-Identifier: Apache-2.0
"""The daemon as a real process behind a real socket: its socket, its front-ends, its end."""

import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.support.daemon import PATIENCE, SANDBOX, until
from vhost_rpmb.daemon import listener, server
from vhost_rpmb.daemon.eventloop import EventLoop, StopSignals
from vhost_rpmb.daemon.notify import Notifier
from vhost_rpmb.driver.errors import ClientError
from vhost_rpmb.driver.frontend import Frontend
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths
from vhost_rpmb.vhost_user import wire
from vhost_rpmb.vhost_user.wire import Request
from vhost_rpmb.virtio import spec as virtio

KEY = bytes(range(32))
GET_FEATURES = struct.pack("=III", Request.GET_FEATURES, wire.VERSION, 0)


class Process:
    """A started vhost-user-rpmb; what it says goes into a file."""

    def __init__(
        self, directory: Path, arguments: list[str], engine: str, pass_fds: tuple[int, ...] = ()
    ) -> None:
        self.flash = directory / "flash"
        if not self.flash.exists():
            self.flash.write_bytes(bytes(spec.CAPACITY_UNIT))
        self._log = directory / f"log-{time.monotonic_ns()}"
        with self._log.open("w") as log:
            self._popen = subprocess.Popen(
                [
                    *(sys.executable, "-m", "vhost_rpmb", f"--flash-path={self.flash}"),
                    *SANDBOX,
                    *arguments,
                ],
                env=os.environ | {"VHOST_RPMB_ENGINE": engine},
                stdout=log,
                stderr=log,
                pass_fds=pass_fds,
            )
        self.pid = self._popen.pid

    @property
    def said(self) -> str:
        return self._log.read_text()

    def ready(self, text: str = "listening on") -> "Process":
        """Wait until it says so (with -v)."""
        until(lambda: text in self.said or self._popen.poll() is not None)
        assert self._popen.poll() is None, self.said
        return self

    def send(self, number: int) -> None:
        self._popen.send_signal(number)

    def ended(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; return the exit status. It never ends with a traceback."""
        status = self._popen.wait(timeout)
        assert "Traceback" not in self.said
        return status

    def refused(self, *texts: str) -> None:
        """Check that it has ended with one line of error that holds these texts."""
        assert self.ended() == 2
        lines = self.said.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("vhost-user-rpmb: error: ")
        for text in texts:
            assert text in lines[0]

    def stop(self, number: int = signal.SIGTERM) -> None:
        """End it as an operator does; it has to end cleanly and at once."""
        self.send(number)
        assert self.ended() == 0, self.said

    def kill(self) -> None:
        self._popen.kill()
        self._popen.wait()

    def fds(self) -> int:
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Resident memory in KiB."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1])
        raise AssertionError("no VmRSS")


def listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        return not probe.connect_ex(str(path))


Launch = Callable[..., Process]


@pytest.fixture
def launch(tmp_path: Path) -> Iterator[Launch]:
    """Start daemons on one image, with the reference engine unless told otherwise."""
    started: list[Process] = []

    def launch(*arguments: str, engine: str = "pure", pass_fds: tuple[int, ...] = ()) -> Process:
        started.append(Process(tmp_path, list(arguments), engine, pass_fds))
        return started[-1]

    yield launch
    for process in started:
        process.kill()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "socket"


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.settimeout(PATIENCE)
    sock.connect(str(path))
    return sock


def set_limit(process: Process, fds: int) -> None:
    """Let a daemon have no descriptor from this number on."""
    _, hard = resource.prlimit(process.pid, resource.RLIMIT_NOFILE)
    resource.prlimit(process.pid, resource.RLIMIT_NOFILE, (fds, hard))


def greet(sock: socket.socket) -> int:
    """Ask a daemon for its features."""
    sock.sendall(GET_FEATURES)
    return wire.unpack_u64(sock.recv(100)[wire.HEADER_SIZE :])


OFFERED = (
    1 << virtio.VIRTIO_F_VERSION_1
    | 1 << virtio.VIRTIO_F_INDIRECT_DESC
    | 1 << virtio.VIRTIO_F_EVENT_IDX
    | wire.F_PROTOCOL_FEATURES
)


class TestServing:
    @pytest.fixture
    def running(self, launch: Launch, path: Path, engine: Engine) -> Process:
        return launch(f"--socket-path={path}", "-v", engine=engine.name).ready()

    def test_requests(self, running: Process, path: Path) -> None:
        with RpmbClient.connect(str(path)) as client:
            assert client.config == (1, 32, 255)
            client.program_key(KEY)
            assert client.write(3, b"x" * 256) == 1
        with RpmbClient.connect(str(path), KEY) as client:
            assert client.read(3, 1) == b"x" * 256
            assert client.read_counter() == 1
        running.stop()

    def test_next_front_end_after_a_front_end_that_vanished(
        self, running: Process, path: Path
    ) -> None:
        with RpmbClient.connect(str(path)) as client:
            client.program_key(KEY)
        for counter in range(5):
            client = RpmbClient.connect(str(path), KEY)
            client.submit(client.write_request(0, bytes(256), counter), spec.FRAME_SIZE)
            client.flush()
            client.answers()
            client._resources.close()  # without a farewell
        running.stop()

    @pytest.mark.memory
    def test_many_connections(self, running: Process, path: Path) -> None:
        fds = running.fds()
        with RpmbClient.connect(str(path)) as client:
            client.program_key(KEY)

        def visit(count: int) -> None:
            for number in range(count):
                if number % 10 == 0:
                    with RpmbClient.connect(str(path), KEY) as client:
                        assert client.read_counter() == 0
                else:
                    with connect(path) as sock:
                        assert greet(sock) == OFFERED

        visit(50)
        memory = running.memory()
        visit(400)
        until(lambda: running.fds() == fds)
        assert running.memory() - memory < 2048
        running.stop()

    def test_peers_that_break_the_protocol(self, running: Process, path: Path) -> None:
        fds = running.fds()
        eventfd = os.eventfd(0)
        attacks: list[tuple[bytes, list[int]]] = [
            (b"\0", []),
            (GET_FEATURES[:5], [eventfd] * 5),
            (os.urandom(4096), []),
            (GET_FEATURES + b"\1", [eventfd] * 200),
            (struct.pack("=III", Request.SET_MEM_TABLE, wire.VERSION, 0xFFFF_FFFF), [eventfd]),
            (struct.pack("=IIIQ", Request.SET_VRING_KICK, wire.VERSION, 8, 0), [eventfd]),
        ]
        for _ in range(10):
            for data, descriptors in attacks:
                with connect(path) as sock:
                    socket.send_fds(sock, [data], descriptors)
        os.close(eventfd)
        with connect(path) as sock:
            assert greet(sock) == OFFERED
        until(lambda: running.fds() == fds)
        assert running.said.count("broke the protocol") == 1  # of many: rate-limited
        running.stop()

    def test_one_front_end_at_a_time(self, running: Process, path: Path) -> None:
        with connect(path) as first, connect(path) as second, connect(path) as third:
            assert greet(first) == OFFERED
            second.sendall(GET_FEATURES)
            second.settimeout(0.2)
            with pytest.raises(TimeoutError):
                second.recv(100)
            third.close()  # gives up waiting
            first.close()
            second.settimeout(PATIENCE)
            assert len(second.recv(100)) == 20
        with connect(path) as sock:
            assert greet(sock) == OFFERED
        running.stop()

    def test_few_descriptors_are_enough(self, running: Process, path: Path) -> None:
        """One for a front-end, however many wait; those that a message brings are given back."""
        fds = running.fds()
        set_limit(running, fds + 2)
        with ExitStack() as stack:
            first, second, *_ = [stack.enter_context(connect(path)) for _ in range(30)]
            eventfd = os.eventfd(0)
            socket.send_fds(first, [GET_FEATURES], [eventfd] * 20)
            os.close(eventfd)
            assert first.recv(100) == b""
            assert greet(second) == OFFERED
        assert "GET_FEATURES: some of its file descriptors were lost" in running.said
        running.stop()

    def test_no_descriptor_for_a_front_end(self, running: Process, path: Path) -> None:
        set_limit(running, running.fds())
        with connect(path) as sock:
            until(lambda: "a front-end cannot be accepted: Too many open files" in running.said)
            set_limit(running, 100)
            assert greet(sock) == OFFERED
        assert running.said.count("cannot be accepted") == 1
        running.stop()

    def test_slow_peer_is_waited_for(self, running: Process, path: Path) -> None:
        with connect(path) as sock:
            for byte in GET_FEATURES:
                sock.sendall(bytes([byte]))
                time.sleep(0.01)
            assert len(sock.recv(100)) == 20
        running.stop()

    def test_image_is_brought_up_to_date_when_idle(self, running: Process, path: Path) -> None:
        with RpmbClient.connect(str(path)) as client:
            client.program_key(KEY)
            client.write(5, b"idle" * 64)
            until(lambda: running.flash.read_bytes()[5 * 256 :].startswith(b"idle" * 64))
        running.stop()

    def test_silent_without_v(self, launch: Launch, path: Path, engine: Engine) -> None:
        process = launch(f"--socket-path={path}", engine=engine.name)
        until(lambda: listens(path))
        with Frontend.connect(str(path)) as frontend:
            frontend.handshake()
        process.stop()
        assert process.said == ""

    def test_messages_are_logged_with_vv(self, launch: Launch, path: Path) -> None:
        process = launch(f"--socket-path={path}", "-vv").ready()
        with connect(path) as sock:
            greet(sock)
        process.stop()
        assert "debug: GET_FEATURES: flags 0x1, 0 bytes, 0 file descriptors" in process.said


class TestEnd:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_idle(self, launch: Launch, path: Path, number: int) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        process.stop(number)
        assert not path.exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_with_a_front_end(self, launch: Launch, path: Path, number: int) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        with connect(path) as sock, connect(path) as waiting:
            assert greet(sock) == OFFERED
            sock.sendall(GET_FEATURES[:7])
            process.stop(number)
            for end in (sock, waiting):
                with suppress(ConnectionError):  # a reset if something was not read yet
                    assert end.recv(100) == b""
        assert not path.exists()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_under_load(self, launch: Launch, path: Path, engine: Engine, number: int) -> None:
        process = launch(f"--socket-path={path}", "-v", engine=engine.name).ready()
        written = []

        def write() -> None:
            with suppress(ClientError), RpmbClient.connect(str(path)) as client:
                client.program_key(KEY)
                for counter in range(1_000_000):
                    written.append(client.write(counter % 8, bytes(256), counter))

        guest = threading.Thread(target=write)
        guest.start()
        until(lambda: len(written) > 20 or not guest.is_alive())
        process.stop(number)
        guest.join()
        process = launch(f"--socket-path={path}", "-v", engine=engine.name).ready()
        with RpmbClient.connect(str(path), KEY) as client:
            assert client.read_counter() in (len(written), len(written) + 1)
        process.stop()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_twice(self, launch: Launch, path: Path, number: int) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        for _ in range(5):
            process.send(number)
        assert process.ended() == 0

    @pytest.mark.parametrize("step", range(12))
    def test_during_the_start(self, launch: Launch, path: Path, step: int) -> None:
        """Before the daemon takes the signal over it has nothing open: it may just die."""
        process = launch(f"--socket-path={path}")
        time.sleep(0.03 * step)
        process.send(signal.SIGTERM)
        assert process.ended() in (0, -signal.SIGTERM)
        assert not path.exists()
        launch(f"--socket-path={path}", "-v").ready().stop()

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    def test_as_soon_as_state_is_open(self, launch: Launch, path: Path, number: int) -> None:
        process = launch(f"--socket-path={path}")
        until(Path(f"{process.flash}.state").exists)
        process.stop(number)
        assert not path.exists()

    def test_once(self, launch: Launch, path: Path) -> None:
        process = launch(f"--socket-path={path}", "--once", "-v").ready()
        with connect(path) as sock:
            assert greet(sock) == OFFERED
            assert path.exists()
        assert process.ended() == 0
        assert not path.exists()

    def test_once_with_a_front_end_that_breaks_the_protocol(
        self, launch: Launch, path: Path
    ) -> None:
        process = launch(f"--socket-path={path}", "--once", "-v").ready()
        with connect(path) as sock:
            sock.sendall(bytes(wire.HEADER_SIZE))
            assert sock.recv(1) == b""
        assert process.ended() == 0
        assert "broke the protocol: message 0: expected protocol version 1" in process.said


class RecordingLoop(EventLoop):
    """Counts the waits that ended without an event."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = 0

    def wait(self, timeout: float | None) -> bool:
        happened = super().wait(timeout)
        self.quiet += not happened and timeout != 0
        return happened


class TestCheckpoint:
    def test_one_idle_clock(self, engine: Engine, tmp_path: Path) -> None:
        """The second that passes in the engine's loop is not followed by another one here."""
        flash = tmp_path / "flash"
        flash.write_bytes(bytes(spec.CAPACITY_UNIT))
        path = str(tmp_path / "socket")
        quiet: list[int] = []

        def write() -> None:
            with RpmbClient.connect(path) as client:
                client.program_key(KEY)
                client.write(0, bytes(256), 0)
                until(lambda: not store.checkpoint_due)

        with ExitStack() as stack:
            store = open_store(Paths.resolve(str(flash)))
            stack.callback(store.close)
            loop = RecordingLoop()
            stack.callback(loop.close)
            checkpoint = store.checkpoint

            def observed() -> bool:
                quiet.append(loop.quiet)
                return checkpoint()

            store.checkpoint = observed  # type: ignore[method-assign]
            device = engine.RpmbDevice(store)
            sock = listener.listen(path, None, stack)
            daemon = server.Server(loop, sock, device, engine, once=True, poll_us=64)
            stack.callback(daemon.close)
            daemon.listen()
            notifier = Notifier({})
            stack.callback(notifier.close)
            stop = StopSignals(loop)
            stack.callback(stop.close)
            guest = threading.Thread(target=write)
            guest.start()
            status = server.Status(notifier, daemon, store, device)
            server.serve(loop, stop, daemon, store, status)
            guest.join()
            assert quiet
            assert not any(quiet)


class TestSocketPath:
    def test_mode(self, launch: Launch, path: Path) -> None:
        umask = os.umask(0)
        try:
            process = launch(f"--socket-path={path}", "-v").ready()
        finally:
            os.umask(umask)
        assert path.stat().st_mode & 0o777 == 0o600
        process.stop()

    def test_mode_from_the_first_moment(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        modes = []

        class Observed(socket.socket):
            def bind(self, address: object) -> None:
                super().bind(address)  # type: ignore[arg-type]
                modes.append(path.stat().st_mode & 0o777)

        umask = os.umask(0)
        try:
            monkeypatch.setattr(socket, "socket", Observed)
            with ExitStack() as stack:
                listener.listen(str(path), None, stack)
            assert os.umask(0) == 0
        finally:
            os.umask(umask)
        assert modes == [0o600]
        assert not path.exists()

    def test_stale_socket_is_replaced(self, launch: Launch, path: Path) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        process.kill()
        assert path.exists()
        process = launch(f"--socket-path={path}", "-v").ready()
        with connect(path) as sock:
            assert greet(sock) == OFFERED
        process.stop()

    @pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
    def test_live_socket_is_refused_and_left_in_peace(
        self, launch: Launch, path: Path, kind: socket.SocketKind
    ) -> None:
        with socket.socket(socket.AF_UNIX, kind) as other:
            other.bind(str(path))
            if kind == socket.SOCK_STREAM:
                other.listen()
            other.setblocking(False)
            launch(f"--socket-path={path}").refused(str(path), "another process is listening")
            with pytest.raises(BlockingIOError):
                other.accept() if kind == socket.SOCK_STREAM else other.recv(1)
        assert path.is_socket()

    def test_socket_of_another_daemon(self, launch: Launch, path: Path, tmp_path: Path) -> None:
        process = launch(f"--socket-path={path}", "--once", "-v").ready()
        other = tmp_path / "other"
        other.mkdir()
        second = Process(other, [f"--socket-path={path}"], "pure")
        second.refused(str(path), "another process is listening")
        with connect(path) as sock:  # the attempt did not count as its one front-end
            assert greet(sock) == OFFERED
        assert process.ended() == 0

    @pytest.mark.parametrize("kind", ["file", "directory", "link", "fifo"])
    def test_other_file_is_refused_and_left_alone(
        self, launch: Launch, path: Path, tmp_path: Path, kind: str
    ) -> None:
        if kind == "file":
            path.write_text("precious")
        elif kind == "directory":
            path.mkdir()
        elif kind == "link":
            path.symlink_to(tmp_path / "nowhere")
        else:
            os.mkfifo(path)
        before = path.lstat()
        launch(f"--socket-path={path}").refused(str(path), "another kind of file")
        assert os.path.samestat(path.lstat(), before)

    def test_path_that_is_too_long(self, launch: Launch, tmp_path: Path) -> None:
        length = 108 - len(os.fsencode(tmp_path)) - 1
        launch(f"--socket-path={tmp_path}/{'x' * length}").refused("at most 107 bytes, found 108")
        name = tmp_path / ("x" * (length - 1))
        launch(f"--socket-path={name}", "-v").ready().stop()

    def test_missing_directory(self, launch: Launch, tmp_path: Path) -> None:
        path = tmp_path / "missing" / "socket"
        launch(f"--socket-path={path}").refused(str(path), "No such file or directory")

    def test_socket_of_a_successor_is_not_removed(self, launch: Launch, path: Path) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
            process.stop()
            assert path.exists()

    def test_removed_already(self, launch: Launch, path: Path) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        path.unlink()
        process.stop()

    def test_nothing_is_left_when_the_state_cannot_be_opened(
        self, launch: Launch, path: Path
    ) -> None:
        process = launch(f"--socket-path={path}", "-v").ready()
        second = launch(f"--socket-path={path}.2")
        assert second.ended() == 1
        assert len(second.said.splitlines()) == 1
        assert not Path(f"{path}.2").exists()
        process.stop()


class TestInheritedSocket:
    def test_listening(self, launch: Launch, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            fd = listener.fileno()
            process = launch(f"--fd={fd}", "-v", pass_fds=(fd,))
            for _ in range(3):
                with connect(path) as sock:
                    assert greet(sock) == OFFERED
        process.stop()
        assert path.exists()  # not ours

    def test_listening_once(self, launch: Launch, path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(path))
            listener.listen()
            fd = listener.fileno()
            process = launch(f"--fd={fd}", "--once", pass_fds=(fd,))
            with connect(path) as sock:
                assert greet(sock) == OFFERED
            assert process.ended() == 0

    def test_connected(self, launch: Launch, engine: Engine) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with far:
            fd = far.fileno()
            process = launch(f"--fd={fd}", "-v", engine=engine.name, pass_fds=(fd,))
        with RpmbClient(Frontend(near)) as client:
            assert client.config == (1, 32, 255)
        assert process.ended() == 0

    def test_connected_and_stopped(self, launch: Launch) -> None:
        near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with near:
            with far:
                process = launch(f"--fd={far.fileno()}", pass_fds=(far.fileno(),))
            near.settimeout(PATIENCE)
            assert greet(near) == OFFERED
            process.stop()
            assert near.recv(1) == b""

    @pytest.mark.parametrize(
        ("family", "kind", "found"),
        [
            (socket.AF_UNIX, socket.SOCK_DGRAM, "another kind of socket"),
            (socket.AF_UNIX, socket.SOCK_SEQPACKET, "another kind of socket"),
            (socket.AF_INET, socket.SOCK_STREAM, "another kind of socket"),
            (socket.AF_UNIX, socket.SOCK_STREAM, "does neither"),
        ],
    )
    def test_wrong_socket(
        self, launch: Launch, family: socket.AddressFamily, kind: socket.SocketKind, found: str
    ) -> None:
        with socket.socket(family, kind) as sock:
            fd = sock.fileno()
            launch(f"--fd={fd}", pass_fds=(fd,)).refused(
                f"--fd={fd}", "listens or is connected", found
            )

    def test_file(self, launch: Launch, tmp_path: Path) -> None:
        with (tmp_path / "file").open("w") as file:
            fd = file.fileno()
            launch(f"--fd={fd}", pass_fds=(fd,)).refused("Socket operation on non-socket")

    def test_opened_with_o_path(self, launch: Launch, tmp_path: Path) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(str(tmp_path / "s"))
            fd = os.open(tmp_path / "s", os.O_PATH)
        launch(f"--fd={fd}", pass_fds=(fd,)).refused(f"--fd={fd}: expected", "with O_PATH")
        os.close(fd)

    @pytest.mark.parametrize("fd", [3, 7, 500, 2**31 - 1])
    def test_nothing_inherited(self, launch: Launch, fd: int) -> None:
        launch(f"--fd={fd}").refused(f"--fd={fd}: expected a UNIX stream socket")


class TestEventLoop:
    @pytest.fixture
    def loop(self) -> Iterator[EventLoop]:
        loop = EventLoop()
        yield loop
        loop.close()

    @pytest.fixture
    def eventfds(self) -> Iterator[list[int]]:
        fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(2)]
        yield fds
        wire.close_fds(fds)

    def test_timeout(self, loop: EventLoop) -> None:
        started = time.monotonic()
        assert not loop.wait(0.05)
        assert time.monotonic() - started >= 0.04

    def test_as_long_as_it_is_readable(self, loop: EventLoop, eventfds: list[int]) -> None:
        calls = []
        loop.add(eventfds[0], lambda: calls.append(1))
        os.eventfd_write(eventfds[0], 1)
        assert loop.wait(None)
        assert loop.wait(0)
        assert calls == [1, 1]

    def test_once_for_each_arrival(self, loop: EventLoop, eventfds: list[int]) -> None:
        calls = []
        loop.add(eventfds[0], lambda: calls.append(1), edge=True)
        for count in range(1, 5):
            os.eventfd_write(eventfds[0], 1)
            assert loop.wait(0)
            assert not loop.wait(0)
            assert len(calls) == count

    def test_handler_that_removes_another(self, loop: EventLoop, eventfds: list[int]) -> None:
        calls = []

        def remove(mine: int, other: int) -> None:
            calls.append(mine)
            loop.remove(other)

        first, second = eventfds
        loop.add(first, lambda: remove(first, second))
        loop.add(second, lambda: remove(second, first))
        for fd in eventfds:
            os.eventfd_write(fd, 1)
        assert loop.wait(0)
        assert len(calls) == 1

    def test_file_that_cannot_be_watched(self, loop: EventLoop, tmp_path: Path) -> None:
        with (tmp_path / "file").open("w") as file:
            with pytest.raises(PermissionError):
                loop.add(file.fileno(), lambda: None)
            with pytest.raises(KeyError):
                loop._handlers[file.fileno()]


class TestAdopt:
    def test_not_inherited_further(self) -> None:
        near, far = socket.socketpair()
        fd = os.dup(far.fileno())
        os.set_inheritable(fd, True)
        with near, far:
            sock, listening = listener.adopt(fd)
            with sock:
                assert not listening
                assert sock.fileno() == fd
                assert not sock.get_inheritable()

    def test_closed_when_it_is_of_no_use(self) -> None:
        with socket.socket(socket.AF_UNIX) as sock:
            fd = os.dup(sock.fileno())
        with pytest.raises(UsageError):
            listener.adopt(fd)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
