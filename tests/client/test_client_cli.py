# SPDX-License-Identifier: Apache-2.0
"""``vhost-rpmb-client`` as an operator runs it: output, one-line errors, exit status."""

import json
import os
import resource
import secrets
import signal
import socket
import stat
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support.daemon import is_asleep, spawned, until
from tests.support.fake_backend import Answer, FakeBackend
from tests.support.fake_backend import Device as FakeDevice
from tests.support.rig import make_image, write_key
from vhost_rpmb import __version__
from vhost_rpmb.client.cli import build_parser, main
from vhost_rpmb.client.files import write_file
from vhost_rpmb.driver.errors import ClientError
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths

PROGRAM = [sys.executable, "-m", "vhost_rpmb.client"]
TIMEOUT = 60  # seconds
KEY = b"the key bytes that nobody prints"
OTHER_KEY = bytes(32)
NOT_VERIFIED = "vhost-rpmb-client: warning: no KEYFILE given: answers are not authenticated\n"


def run(
    *arguments: str, given: bytes = b"", stdout: int = subprocess.PIPE, umask: int = 0o022
) -> subprocess.CompletedProcess[bytes]:
    """Run the client; no run may leak the key or show a traceback."""
    done = subprocess.run(
        [*PROGRAM, *arguments],
        input=given,
        stdout=stdout,
        stderr=subprocess.PIPE,
        umask=umask,
        timeout=TIMEOUT,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert KEY not in done.stderr + (done.stdout or b"")
    assert KEY.hex().encode() not in done.stderr + (done.stdout or b"")
    return done


def fails(done: subprocess.CompletedProcess[bytes], status: int, text: str) -> None:
    """Assert that a run ended with one line of error, and printed nothing."""
    lines = done.stderr.decode().replace(NOT_VERIFIED, "").splitlines()
    assert (done.returncode, len(lines)) == (status, 1), lines
    assert lines[0].startswith("vhost-rpmb-client: error: ")
    assert text in lines[0]
    assert not done.stdout


class Device:
    """A served device and the client's command line for it."""

    def __init__(self, served: Any, folder: Path) -> None:
        self.served = served
        self.folder = folder
        self.key_file = str(folder / "client.key")
        write_key(Path(self.key_file), KEY)

    def __call__(self, *arguments: str, **how: Any) -> subprocess.CompletedProcess[bytes]:
        return run(f"--socket-path={self.served.socket_path}", *arguments, **how)

    def succeeds(self, *arguments: str, **how: Any) -> bytes:
        done = self(*arguments, **how)
        assert (done.returncode, done.stderr) == (0, b"")
        assert isinstance(done.stdout, bytes)
        return done.stdout

    def file(self, name: str, data: bytes) -> str:
        write_key(self.folder / name, data)
        return str(self.folder / name)


@pytest.fixture
def device(daemon: Callable[..., Any], tmp_path: Path) -> Device:
    return Device(daemon(), tmp_path)


@pytest.fixture
def keyed(device: Device) -> Device:
    device.succeeds("write-key", device.key_file)
    return device


class TestCommands:
    def test_write_and_read_commands(self, device: Device) -> None:
        data = secrets.token_bytes(256)
        out = device.folder / "out"
        assert device.succeeds("write-key", device.key_file) == b""
        assert device.succeeds("read-counter", device.key_file) == b"Counter value: 0x00000000\n"
        data_file = device.file("data", data)
        assert device.succeeds("write-block", "0x1ff", data_file, device.key_file) == b""
        assert device.succeeds("read-counter", device.key_file) == b"Counter value: 0x00000001\n"
        assert device.succeeds("read-block", "511", "1", str(out), device.key_file) == b""
        assert out.read_bytes() == data

    def test_standard_input_and_output(self, device: Device) -> None:
        data = secrets.token_bytes(3 * 256)
        device.succeeds("write-key", "-", given=KEY)
        device.succeeds("write-block", "2", "-", device.key_file, given=data)
        data_file = device.file("data", data)
        device.succeeds("write-block", "5", data_file, "-", given=KEY)
        assert device.succeeds("read-block", "2", "6", "-", "-", given=KEY) == data * 2
        assert device.succeeds("read-counter", "-", given=KEY) == b"Counter value: 0x00000002\n"

    def test_without_a_key_the_answer_comes_with_a_warning(self, keyed: Device) -> None:
        done = keyed("read-counter")
        assert (done.returncode, done.stderr.decode()) == (0, NOT_VERIFIED)
        assert done.stdout == b"Counter value: 0x00000000\n"
        done = keyed("read-block", "0", "2", "-")
        assert (done.returncode, done.stderr.decode()) == (0, NOT_VERIFIED)
        assert done.stdout == bytes(512)

    def test_whole_device_is_read_in_pieces(self, keyed: Device) -> None:
        data = secrets.token_bytes(32 * 256)
        keyed.succeeds("write-block", "250", "-", keyed.key_file, given=data)
        found = keyed.succeeds("read-block", "0", "0x200", "-", keyed.key_file)
        assert found == bytes(250 * 256) + data + bytes(230 * 256)

    def test_last_counter_value_comes_with_a_warning(
        self, daemon: Callable[..., Any], tmp_path: Path
    ) -> None:
        device = Device(daemon(f"--initial-counter={spec.MAX_WRITE_COUNTER}"), tmp_path)
        device.succeeds("write-key", device.key_file)
        done = device("read-counter", device.key_file)
        assert done.returncode == 0
        assert done.stdout == b"Counter value: 0xffffffff\n"
        assert b"warning: the write counter has expired" in done.stderr
        fails(
            device("write-block", "0", "-", device.key_file, given=bytes(256)),
            1,
            "DATA_WRITE failed: WRITE_FAILURE, WRITE_COUNTER_EXPIRED (result 0x0085)",
        )

    def test_rest_of_a_long_key_file_is_ignored_with_a_warning(self, device: Device) -> None:
        done = device("write-key", "-", given=KEY + b"\n")
        assert done.returncode == 0
        assert done.stderr.decode() == (
            "vhost-rpmb-client: warning: standard input: expected a key of 32 bytes, "
            "found more: the rest is ignored\n"
        )
        device.succeeds("read-counter", device.key_file)

    def test_slices_of_standard_input_are_joined(self, keyed: Device) -> None:
        data = secrets.token_bytes(256)
        arguments = [f"--socket-path={keyed.served.socket_path}", "write-block", "0", "-"]
        with spawned(
            [*PROGRAM, *arguments, keyed.key_file], stdin=subprocess.PIPE, bufsize=0
        ) as client:
            assert client.stdin is not None
            for start in range(0, 256, 100):
                client.stdin.write(data[start : start + 100])
                time.sleep(0.05)
            client.stdin.close()
            assert client.wait(TIMEOUT) == 0
        assert keyed.succeeds("read-block", "0", "1", "-", keyed.key_file) == data


class TestOutputFile:
    def read(self, device: Device, out: Path, **how: Any) -> subprocess.CompletedProcess[bytes]:
        return device("read-block", "0", "2", str(out), device.key_file, **how)

    def test_new_output_file_is_private(self, keyed: Device) -> None:
        out = keyed.folder / "out"
        assert self.read(keyed, out, umask=0).returncode == 0
        assert stat.S_IMODE(out.stat().st_mode) == 0o600
        assert out.stat().st_size == 512

    def test_existing_output_file_keeps_links_and_mode(self, keyed: Device) -> None:
        (keyed.folder / "folder").mkdir()
        old = keyed.folder / "folder" / "old"
        old.write_bytes(b"x" * 10_000)
        old.chmod(0o640)
        link = keyed.folder / "link"
        link.symlink_to(old)
        assert self.read(keyed, link).returncode == 0
        assert link.is_symlink()
        assert old.read_bytes() == bytes(512)
        assert stat.S_IMODE(old.stat().st_mode) == 0o640

    def test_device_is_written_to(self, keyed: Device) -> None:
        assert self.read(keyed, Path("/dev/null")).returncode == 0
        assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
        fails(self.read(keyed, Path("/dev/full")), 1, "/dev/full: No space left on device")

    def test_failing_request_leaves_the_old_file(self, keyed: Device) -> None:
        old = keyed.folder / "old"
        old.write_bytes(b"precious")
        wrong = keyed.file("wrong.key", OTHER_KEY)
        fails(keyed("read-block", "0", "1", str(old), wrong), 1, "the device has another key")
        assert old.read_bytes() == b"precious"
        fails(keyed("read-block", "0", "1", str(keyed.folder / "new"), wrong), 1, "another key")
        assert not (keyed.folder / "new").exists()

    def test_failing_disk_leaves_the_old_file_and_nothing_else(self, tmp_path: Path) -> None:
        old = tmp_path / "old"
        old.write_bytes(b"precious")
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300, limits[1]))
        try:
            with pytest.raises(ClientError, match=f"{old}: File too large"):
                write_file(str(old), bytes(512))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert old.read_bytes() == b"precious"
        assert list(tmp_path.iterdir()) == [old]

    def test_file_as_folder_is_refused(self, keyed: Device) -> None:
        out = keyed.folder / "none" / "out"
        fails(self.read(keyed, out), 1, f"{out}: No such file or directory")
        fails(self.read(keyed, keyed.folder), 1, f"{keyed.folder}: Is a directory")


class TestDeviceFailures:
    def test_second_key_is_refused(self, keyed: Device) -> None:
        fails(
            keyed("write-key", keyed.key_file),
            1,
            "PROGRAM_KEY failed: WRITE_FAILURE (result 0x0005); a key is programmed once",
        )
        fails(keyed("write-key", "-", given=OTHER_KEY), 1, "WRITE_FAILURE")
        keyed.succeeds("read-counter", keyed.key_file)

    def test_no_key_programmed(self, device: Device) -> None:
        for arguments in (
            ("read-counter", device.key_file),
            ("write-block", "0", device.file("data", bytes(256)), device.key_file),
            ("read-block", "0", "1", "-", device.key_file),
            ("read-counter",),
        ):
            fails(device(*arguments), 1, "NO_AUTH_KEY (result 0x0007); no key is programmed yet")

    def test_wrong_key_is_reported(self, keyed: Device) -> None:
        wrong = keyed.file("wrong.key", OTHER_KEY)
        for arguments in (
            ("read-counter", wrong),
            ("write-block", "0", keyed.file("data", bytes(256)), wrong),
        ):
            fails(keyed(*arguments), 1, "the MAC of the answer does not match the key")


class TestConnectionFailures:
    def test_missing_socket_is_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "none"
        fails(run(f"--socket-path={path}", "read-counter"), 1, f"{path}: No such file")

    def test_socket_without_a_listener_is_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "socket"
        with socket.socket(socket.AF_UNIX) as dead:
            dead.bind(str(path))
        fails(
            run(f"--socket-path={path}", "read-counter"), 1, "Connection refused; nothing listens"
        )

    def test_file_as_socket_is_reported(self, tmp_path: Path) -> None:
        path = tmp_path / "file"
        path.touch()
        fails(run(f"--socket-path={path}", "read-counter"), 1, "Connection refused")

    def test_socket_path_that_is_too_long_is_reported(self) -> None:
        fails(run(f"--socket-path={'x' * 200}", "read-counter"), 1, "too long")

    @pytest.mark.parametrize("verb", ["write-key", "read-counter"])
    def test_hanging_daemon_is_reported(self, keyed: Device, verb: str) -> None:
        keyed.served.send(signal.SIGSTOP)
        try:
            started = time.monotonic()
            fails(keyed("--timeout=0.5", verb, keyed.key_file), 1, "did not answer within 0.5 s")
            assert time.monotonic() - started > 0.5
        finally:
            keyed.served.send(signal.SIGCONT)

    def test_busy_daemon_is_reported(self, keyed: Device) -> None:
        with RpmbClient.connect(keyed.served.socket_path, KEY):
            fails(
                keyed("--timeout=0.5", "read-counter", keyed.key_file),
                1,
                "one front-end at a time: is a virtual machine connected to it?",
            )
        keyed.succeeds("read-counter", keyed.key_file)

    def test_disconnect_is_reported_by_the_client(self, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with spawned(
                [*PROGRAM, f"--socket-path={path}", "read-counter"], stderr=subprocess.PIPE
            ) as client:
                listener.accept()[0].close()
                _, errors = client.communicate(timeout=TIMEOUT)
        fails(
            subprocess.CompletedProcess([], client.returncode, b"", errors),
            1,
            "the back-end closed the connection",
        )

    @pytest.mark.parametrize("verb", [("read-counter",), ("read-block", "0", "1", "-")])
    def test_closed_output_pipe_is_an_error(self, keyed: Device, verb: tuple[str, ...]) -> None:
        reader, writer = os.pipe()
        os.close(reader)
        try:
            done = keyed(*verb, stdout=writer)
        finally:
            os.close(writer)
        fails(done, 1, "standard output: Broken pipe")

    def test_closed_standard_streams(self, keyed: Device) -> None:
        command = [*PROGRAM, f"--socket-path={keyed.served.socket_path}"]
        for redirect, arguments, status, text in (
            (">&-", ("read-counter", keyed.key_file), 1, "standard output is closed"),
            ("<&-", ("read-counter", "-"), 2, "standard input is closed"),
        ):
            done = subprocess.run(
                ["sh", "-c", f'exec "$@" {redirect}', "sh", *command, *arguments],
                capture_output=True,
                timeout=TIMEOUT,
                check=False,
            )
            fails(done, status, text)

    def test_machine_that_refuses_guest_memory(self, keyed: Device) -> None:
        done = subprocess.run(
            [
                # Coverage could not write what it measured, and would say so.
                *("sh", "-c", 'ulimit -f 0; COVERAGE_PROCESS_CONFIG= exec "$@"', "sh", *PROGRAM),
                f"--socket-path={keyed.served.socket_path}",
                *("read-counter", keyed.key_file),
            ],
            capture_output=True,
            timeout=TIMEOUT,
            check=False,
        )
        fails(done, 1, "cannot set up a front-end on this machine: File too large")

    def test_interrupt_ends_the_client_without_output(self, tmp_path: Path) -> None:
        path = str(tmp_path / "socket")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            with spawned(
                [*PROGRAM, f"--socket-path={path}", "write-key", "-"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            ) as client:
                assert client.stdin is not None
                client.stdin.write(KEY)
                client.stdin.close()
                client.stdin = None
                connection, _ = listener.accept()
                with connection:
                    assert connection.recv(12)
                    # It waits for the answer. A signal just before would be handled after the wait.
                    until(lambda: is_asleep(client.pid))
                    client.send_signal(signal.SIGINT)
                    assert client.communicate(timeout=TIMEOUT) == (b"", b"")
                assert client.returncode == 130


class TestUsage:
    """Everything that can be told without a device is refused before one is looked for."""

    @pytest.mark.parametrize(
        ("arguments", "text"),
        [
            ((), "COMMAND"),
            (("verify",), "--flash-path"),
            (("--socket-path=s",), "COMMAND"),
            (("read-counter",), "--socket-path"),
            (("--socket-path=", "read-counter"), "expected a path, found an empty string"),
            (("--socket-path=s", "erase"), "invalid choice: 'erase'"),
            (("--socket=s", "read-counter"), "unrecognized arguments: --socket=s"),
            (("--socket-path=s", "--wrong", "read-counter"), "unrecognized arguments: --wrong"),
            (("--socket-path=s", "--timeout=0", "read-counter"), "above 0 and up to 86400"),
            (("--socket-path=s", "--timeout=nan", "read-counter"), "found 'nan'"),
            (("--socket-path=s", "--timeout=soon", "read-counter"), "found 'soon'"),
            (("--socket-path=s", "write-key"), "KEYFILE"),
            (("--socket-path=s", "write-key", ""), "expected a path"),
            (("--socket-path=s", "write-key", "a", "b"), "unrecognized arguments: b"),
            (("--socket-path=s", "write-block", "0", "d"), "KEYFILE"),
            (("--socket-path=s", "write-block", "65536", "d", "k"), "0 to 65535, found '65536'"),
            (("--socket-path=s", "write-block", "0x10000", "d", "k"), "found '0x10000'"),
            (("--socket-path=s", "write-block", "010", "d", "k"), "found '010'"),
            (("--socket-path=s", "write-block", "1_0", "d", "k"), "found '1_0'"),
            (("--socket-path=s", "write-block", " 1", "d", "k"), "found ' 1'"),
            (("--socket-path=s", "write-block", "٣", "d", "k"), "found '٣'"),
            (("--socket-path=s", "write-block", "", "d", "k"), "found ''"),
            (("--socket-path=s", "write-block", "0", "-", "-"), "cannot both be standard input"),
            (("--socket-path=s", "read-block", "0", "0", "o"), "1 to 65536, found '0'"),
            (("--socket-path=s", "read-block", "0", "65537", "o"), "found '65537'"),
            (("--socket-path=s", "read-block", "0", "1"), "OUTFILE"),
        ],
    )
    def test_wrong_arguments(self, arguments: tuple[str, ...], text: str) -> None:
        fails(run(*arguments), 2, text)

    @pytest.mark.parametrize(("length", "found"), [(0, 0), (1, 1), (31, 31)])
    def test_short_key_is_refused(self, length: int, found: int) -> None:
        fails(
            run("--socket-path=s", "write-key", "-", given=KEY[:length]),
            2,
            f"standard input: expected a key of 32 bytes, found {found}",
        )

    @pytest.mark.parametrize(
        ("length", "found"),
        [(0, "0"), (1, "1"), (257, "257"), (255 * 256 + 1, "more than 65280")],
    )
    def test_data_other_than_whole_blocks_is_refused(self, length: int, found: str) -> None:
        fails(
            run("--socket-path=s", "write-block", "0", "-", "k", given=bytes(length)),
            2,
            f"standard input: expected a multiple of 256 bytes, up to 65280, found {found}",
        )

    def test_key_file_that_others_can_use_is_a_warning(self, device: Device) -> None:
        Path(device.key_file).chmod(0o644)
        done = device("write-key", device.key_file)
        assert done.returncode == 0
        (line,) = done.stderr.decode().splitlines()
        assert line.startswith("vhost-rpmb-client: warning: the key file ")
        assert f"(mode 0644): make it private with chmod 600 {device.key_file}" in line

    def test_fifos_without_another_end(self, device: Device) -> None:
        """They end with one line, after a while."""
        device.succeeds("write-key", device.key_file)
        fifos = [str(device.folder / name) for name in ("written", "read")]
        for fifo in fifos:
            os.mkfifo(fifo)
        with ThreadPoolExecutor() as pool:  # waits for both at once
            write = pool.submit(device, "write-key", fifos[0])
            read = pool.submit(device, "read-block", "0", "1", fifos[1], device.key_file)
        fails(write.result(), 2, "that writes into this FIFO, found none within 10 s")
        fails(read.result(), 1, "that reads from this FIFO, found none within 10 s")

    def test_fifos_whose_other_end_comes_later(self, device: Device) -> None:
        fifo = device.folder / "fifo"
        os.mkfifo(fifo)
        with spawned(
            [*PROGRAM, f"--socket-path={device.served.socket_path}", "write-key", str(fifo)]
        ) as program:
            fifo.write_bytes(KEY)  # waits for the program to open it
            assert program.wait(TIMEOUT) == 0
        with spawned(
            [
                *(*PROGRAM, f"--socket-path={device.served.socket_path}"),
                *("read-block", "0", "1", str(fifo), device.key_file),
            ]
        ) as program:
            assert fifo.read_bytes() == bytes(256)
            assert program.wait(TIMEOUT) == 0

    def test_input_files_that_cannot_be_read(self, tmp_path: Path) -> None:
        data = tmp_path / "data"
        data.write_bytes(bytes(256))
        none = str(tmp_path / "none")
        for arguments in (
            ("write-key", none),
            ("read-counter", none),
            ("write-block", "0", none, str(data)),
            ("write-block", "0", str(data), none),
            ("read-block", "0", "1", "-", none),
        ):
            fails(run("--socket-path=s", *arguments), 2, f"{none}: No such file or directory")
        fails(run("--socket-path=s", "write-key", str(tmp_path)), 2, "Is a directory")

    def test_blocks_beyond_the_device_are_refused(self, keyed: Device) -> None:
        fails(
            keyed("write-block", "0", "-", keyed.key_file, given=bytes(33 * 256)),
            2,
            "expected at most 32 blocks of 256 bytes, the device's limit for one write, found",
        )
        for arguments in (
            ("write-block", "512", keyed.file("data", bytes(256)), keyed.key_file),
            ("read-block", "511", "2", "-", keyed.key_file),
        ):
            fails(keyed(*arguments), 2, "expected block addresses below 512")
        assert keyed.succeeds("read-counter", keyed.key_file) == b"Counter value: 0x00000000\n"

    def test_help_and_version(self) -> None:
        done = run("--version")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout.decode() == f"vhost-rpmb-client {__version__}\n"
        done = run("--help")
        assert (done.returncode, done.stderr) == (0, b"")
        for word in ("--socket-path", "write-key", "read-counter", "write-block", "read-block"):
            assert word in done.stdout.decode()
        done = run("write-block", "--help")
        assert done.returncode == 0
        assert b"DATAFILE" in done.stdout

    def test_parser_needs_only_the_standard_library(self) -> None:
        script = (
            "import sys; from vhost_rpmb.client.cli import build_parser; build_parser();"
            "sys.exit(any(name.split('.')[0] == 'cryptography' for name in sys.modules))"
        )
        assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
        assert build_parser().prog == "vhost-rpmb-client"


class TestCreate:
    def test_create_makes_image_and_key(self, tmp_path: Path) -> None:
        image, key = tmp_path / "new.img", tmp_path / "new.key"
        done = run("create", str(image), "--size=1M", f"--random-key={key}")
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
        assert (image.stat().st_size, image.stat().st_blocks) == (1 << 20, 0)
        assert len(set(key.read_bytes())) > 8
        assert [stat.S_IMODE(path.stat().st_mode) for path in (image, key)] == [0o600, 0o600]
        assert len(key.read_bytes()) == 32
        open_store(Paths.resolve(str(image), key_path=str(key)), key_set=True).close()

    def test_default_size_of_a_new_image(self, tmp_path: Path) -> None:
        assert run("create", str(tmp_path / "new.img")).returncode == 0
        assert (tmp_path / "new.img").stat().st_size == spec.CAPACITY_UNIT

    @pytest.mark.parametrize("size", ["0", "100K", "17M", "128k", "-1", "0x20000", "1G", ""])
    def test_invalid_size_of_a_new_image_is_refused(self, size: str, tmp_path: Path) -> None:
        done = run("create", str(tmp_path / "new.img"), f"--size={size}")
        fails(done, 2, "expected a multiple of 128K, from 128K to 16M")
        assert not list(tmp_path.iterdir())

    def test_create_replaces_no_file_and_leaves_none_at_a_failure(self, tmp_path: Path) -> None:
        image, key = tmp_path / "new.img", tmp_path / "new.key"
        image.write_bytes(b"precious")
        fails(run("create", str(image), f"--random-key={key}"), 2, "new.img exists already")
        assert (image.read_bytes(), key.exists()) == (b"precious", False)
        key.write_bytes(b"secret")
        other = tmp_path / "other.img"
        fails(run("create", str(other), f"--random-key={key}"), 2, "new.key exists already")
        assert (key.read_bytes(), other.exists()) == (b"secret", False)
        fails(run("create", str(tmp_path / "no" / "new.img")), 2, "No such file or directory")

    def test_folder_for_the_device(self, tmp_path: Path) -> None:
        folder = tmp_path / "machines" / "vm1"
        key = folder / "vm1.key"
        done = run("--json", "create", f"--folder={folder}", "--size=1M", f"--random-key={key}")
        assert (done.returncode, done.stderr) == (0, b"")
        image = folder / "rpmb.img"
        assert json.loads(done.stdout) == {
            "image": str(image),
            "size": 1 << 20,
            "key_file": str(key),
        }
        assert sorted(folder.iterdir()) == [image, key]
        modes = [stat.S_IMODE(path.stat().st_mode) for path in (folder, image, key)]
        assert modes == [0o700, 0o600, 0o600]
        open_store(Paths.resolve(str(image), key_path=str(key)), key_set=True).close()

    def test_folder_is_private_and_new(self, tmp_path: Path) -> None:
        folder = tmp_path / "vm1"
        assert run("create", f"--folder={folder}", umask=0).returncode == 0
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        fails(run("create", f"--folder={folder}"), 2, f"{folder} exists already")
        assert [path.name for path in folder.iterdir()] == ["rpmb.img"]
        below = folder / "rpmb.img" / "vm2"
        fails(run("create", f"--folder={below}"), 2, f"cannot create {below}: File exists")

    def test_no_folder_is_left_behind(self, tmp_path: Path) -> None:
        key = tmp_path / "old.key"
        key.write_bytes(b"secret")
        done = run("create", f"--folder={tmp_path / 'vm1'}", f"--random-key={key}")
        fails(done, 2, "old.key exists already")
        assert list(tmp_path.iterdir()) == [key]

    @pytest.mark.parametrize("arguments", [(), ("rpmb.img", "--folder=vm1")])
    def test_folder_or_an_image(self, arguments: tuple[str, ...]) -> None:
        fails(run("create", *arguments), 2, "--folder")


class TestInfo:
    def test_info_about_a_running_device(self, device: Device) -> None:
        assert device.succeeds("info", device.key_file).decode().splitlines() == [
            "capacity: 131072 bytes, 512 blocks",
            "limits: 32 blocks per write, 255 per read",
            "key: not programmed",
        ]
        device.succeeds("write-key", device.key_file)
        lines = device.succeeds("info", device.key_file).decode().splitlines()
        assert lines[2:] == ["key: programmed", "write counter: 0x00000000"]
        lines = device.succeeds("info").decode().splitlines()
        assert lines[3] == "write counter: 0x00000000 (not authenticated: no KEYFILE given)"

    def test_files(self, tmp_path: Path) -> None:
        flash = make_image(tmp_path / "flash.img")
        open_store(Paths.resolve(str(flash))).close()
        done = run("info", f"--flash-path={flash}")
        assert (done.returncode, done.stderr) == (0, b"")
        assert done.stdout == run("verify", f"--flash-path={flash}").stdout

    @pytest.mark.parametrize("command", ["info", "verify"])
    def test_symbolic_link_leads_to_the_state_of_the_image(
        self, tmp_path: Path, command: str
    ) -> None:
        folder = tmp_path / "elsewhere"
        folder.mkdir()
        flash = make_image(folder / "flash.img")
        open_store(Paths.resolve(str(flash))).close()
        link = tmp_path / "link.img"
        link.symlink_to(flash)
        done = run(command, f"--flash-path={link}")
        assert (done.returncode, done.stderr) == (0, b"")
        assert f"{flash}.state, closed".encode() in done.stdout

    def test_info_options_that_exclude_each_other(self, tmp_path: Path) -> None:
        fails(run("info"), 2, "--flash-path=PATH is required")
        fails(run("info", "--flash-path=f", "KEYFILE"), 2, "KEYFILE needs --socket-path")


class TestDumpAndLoad:
    def test_dump_and_load_are_inverse(self, keyed: Device) -> None:
        """More blocks than one request takes; the counter goes up by one a request."""
        data = secrets.token_bytes(100 * 256)
        keyed.succeeds("load", "--address=5", keyed.file("data", data), keyed.key_file)
        assert keyed.succeeds("read-counter", keyed.key_file) == b"Counter value: 0x00000004\n"
        out = keyed.folder / "out"
        keyed.succeeds("dump", str(out), keyed.key_file)
        assert out.read_bytes() == bytes(5 * 256) + data + bytes(407 * 256)
        part = keyed.succeeds("dump", "--address=6", "--count=2", "-", keyed.key_file)
        assert part == data[256 : 3 * 256]

    def test_out_of_range(self, keyed: Device) -> None:
        data = keyed.file("data", bytes(2 * 256))
        for arguments in (
            ("load", "--address=511", data, keyed.key_file),
            ("dump", "--address=512", "-", keyed.key_file),
            ("dump", "--address=510", "--count=3", "-", keyed.key_file),
        ):
            fails(keyed(*arguments), 2, "expected block addresses below 512")
        fails(
            keyed("load", "-", keyed.key_file, given=bytes(65537 * 256)),
            2,
            "up to 16777216, found more than 16777216",
        )

    def test_interrupted_load_reports_its_progress(self, tmp_path: Path) -> None:
        key, data = tmp_path / "key", tmp_path / "data"
        write_key(key, KEY)
        data.write_bytes(bytes(100 * 256))
        path = str(tmp_path / "socket")

        def interrupt(_backend: FakeBackend, number: int, answer: Answer) -> None:
            if number == 3:  # the counter and two writes of 32 blocks came before
                answer.call, answer.step = False, 0
                until(lambda: is_asleep(client.pid))
                client.send_signal(signal.SIGINT)

        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            arguments = (f"--socket-path={path}", "load", str(data), str(key))
            with spawned([*PROGRAM, *arguments], stderr=subprocess.PIPE) as client:
                FakeBackend(FakeDevice(KEY), on_signed=interrupt).serve(listener.accept()[0])
                _, errors = client.communicate(timeout=TIMEOUT)
        assert client.returncode == 130
        assert errors == (
            b"vhost-rpmb-client: warning: 64 of 100 blocks were written, from address 0\n"
        )

    def test_progress_is_shown_on_a_terminal(self, keyed: Device) -> None:
        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, (24, 80))
        data = keyed.file("data", bytes(100 * 256))
        done = subprocess.run(
            [
                *PROGRAM,
                f"--socket-path={keyed.served.socket_path}",
                *("load", data, keyed.key_file),
            ],
            stderr=theirs,
            timeout=TIMEOUT,
        )
        os.set_blocking(ours, False)
        shown = b""
        with suppress(BlockingIOError):
            while part := os.read(ours, 4096):
                shown += part
        os.close(theirs)
        os.close(ours)
        assert done.returncode == 0
        assert b"/100" in shown


class TestJson:
    def test_json_output_of_every_command(self, device: Device) -> None:
        data = device.file("data", bytes(256))
        key, out = device.key_file, str(device.folder / "out")

        def told(*arguments: str) -> Any:
            return json.loads(device.succeeds("--json", *arguments))

        device_info = {
            "size": 131072,
            "blocks": 512,
            "max_write_blocks": 32,
            "max_read_blocks": 255,
            "key_programmed": False,
            "write_counter": None,
            "verified": False,
        }
        assert told("info", key) == device_info
        assert told("write-key", key) == {"key_programmed": True}
        assert told("info", key) == device_info | {
            "key_programmed": True,
            "write_counter": 0,
            "verified": True,
        }
        assert told("read-counter", key) == {"write_counter": 0, "verified": True}
        written = {"address": 3, "blocks": 1}
        assert told("write-block", "3", data, key) == written | {"write_counter": 1}
        assert told("load", "--address=3", data, key) == written | {"write_counter": 2}
        read = {"file": out, "verified": True}
        assert told("read-block", "3", "1", out, key) == written | read
        assert told("dump", out, key) == {"address": 0, "blocks": 512} | read
        image = str(device.folder / "new.img")
        assert told("create", image) == {"image": image, "size": 131072, "key_file": None}
        fails(device("--json", "dump", "-", key), 2, "--json and the data cannot both go")

    def test_files(self, tmp_path: Path) -> None:
        flash = make_image(tmp_path / "flash.img")
        store = open_store(Paths.resolve(str(flash)))
        store.commit(1, [(3, bytes([1]) * 256)], None)
        store.close()
        told = json.loads(run("--json", "verify", f"--flash-path={flash}").stdout)
        assert told == {
            "image": str(flash),
            "size": 131072,
            "blocks": 512,
            "state": f"{flash}.state",
            "closed": True,
            "key_programmed": False,
            "key_in_file": False,
            "write_counter": 1,
            "possession": "active",
            "generation": 0,
            "pending_blocks": [],
            "damaged_blocks": [],
            "problem": None,
        }
        with flash.open("r+b") as image:
            image.seek(3 * 256)
            image.write(b"x")
        done = run("--json", "info", f"--flash-path={flash}")
        assert done.returncode == 1
        told |= {"damaged_blocks": [3], "problem": "1 blocks are not what was stored"}
        assert json.loads(done.stdout) == told


class TestVerify:
    def verify(self, folder: Path, *options: str) -> subprocess.CompletedProcess[bytes]:
        return run("verify", f"--flash-path={folder / 'flash.img'}", *options)

    def test_verify_reports_an_intact_device(self, tmp_path: Path) -> None:
        store = open_store(Paths.resolve(str(make_image(tmp_path / "flash.img"))))
        store.commit(0, [], KEY)
        store.commit(0x2A, [(7, bytes([1]) * 256)], None)
        store.close()
        done = self.verify(tmp_path)
        assert (done.returncode, done.stderr) == (0, b"")
        lines = done.stdout.decode().splitlines()
        assert lines[0].endswith("flash.img, 512 blocks")
        assert lines[1].endswith("flash.img.state, closed")
        assert lines[2:] == [
            "write counter: 0x0000002a",
            "key: programmed, in the state file",
            "possession: the device is here, generation 0",
            "blocks pending in the state file: none",
            "damaged blocks: none",
        ]

    def test_verify_reports_damage(self, tmp_path: Path) -> None:
        flash = make_image(tmp_path / "flash.img")
        store = open_store(Paths.resolve(str(flash)))
        store.commit(1, [(number, bytes([1]) * 256) for number in range(100)], None)
        store.close()
        with flash.open("r+b") as image:
            for address in (3, *range(8, 16, 2), *range(40, 70, 4)):
                image.seek(address * 256)
                image.write(b"x")
        done = self.verify(tmp_path)
        assert done.returncode == 1
        assert b"damaged blocks: 13, address 3, 8, 10, 12, 14, 40, 44," in done.stdout
        assert done.stderr.decode().splitlines() == [
            "vhost-rpmb-client: error: 13 blocks are not what was stored"
        ]

    def test_device_in_use_or_without_files_is_reported(self, tmp_path: Path) -> None:
        fails(self.verify(tmp_path), 2, "flash.img does not exist")
        flash = make_image(tmp_path / "flash.img")
        fails(self.verify(tmp_path), 1, "flash.img.state does not exist")
        with closing(open_store(Paths.resolve(str(flash)))):
            fails(self.verify(tmp_path), 1, "in use by another process")


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["verfy"], "did you mean verify instead of verfy?"),
        (["verify", "--flsh-path=f"], "did you mean --flash-path instead of --flsh-path?"),
        (["--socket=s", "read-counter"], "did you mean --socket-path instead of --socket?"),
        (["--socket=s", "verify", "--flash-path=f"], "did you mean --socket-path instead of"),
        (["create", "i", "--randm-key=k"], "did you mean --random-key instead of --randm-key?"),
    ],
)
def test_error_suggests_the_nearest_word(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ["create", "image", "--key=k"],  # --key-path is an option of others
        ["create", "image", "--flash-path=f"],
        ["create", "image", "--jsn"],  # --json stands before the command
        ["--siz=1M", "create", "image"],  # --size stands behind it
        ["--json", "--key=k"],
    ],
)
def test_error_suggests_no_option_of_another_command(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert "did you mean" not in capsys.readouterr().err
