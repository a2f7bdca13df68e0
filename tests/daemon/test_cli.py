# SPDX-License-Identifier: Apache-2.0
"""The command line: every option of ``vhost-user-rpmb``, and every way to get one wrong.

What goes wrong is shown on the real program: one clear line on stderr, the right exit status, no
traceback.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.daemon import SANDBOX
from vhost_rpmb import __version__
from vhost_rpmb.cli import build_parser, parse_options
from vhost_rpmb.daemon.server import Options
from vhost_rpmb.errors import UsageError
from vhost_rpmb.virtio.features import DEFAULT, OPTIONAL

KIB = 1024
MIB = 1024 * KIB
PROGRAM = [sys.executable, "-m", "vhost_rpmb", *SANDBOX]
TIMEOUT = 60  # seconds
CLEAN_ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "VHOST_RPMB_ENGINE"}

OPTIONS = [
    "--help",
    "--version",
    "--verbose",
    "--debug",
    "--socket-path",
    "--fd",
    "--socket-group",
    "--flash-path",
    "--store",
    "--device",
    "--take-over",
    "--key-path",
    "--key-set",
    "--initial-counter",
    "--print-capabilities",
    "--state-path",
    "--max-write-blocks",
    "--max-read-blocks",
    "--poll-us",
    "--virtio-features",
    "--strict",
    "--once",
    "--sandbox",
    "--inject",
    "--migration",
    "--incoming",
    "--fence-path",
    "--migration-key",
]


def run(
    *arguments: str,
    environment: dict[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    before: Callable[[], None] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the program to its end."""
    return subprocess.run(
        [*PROGRAM, *arguments],
        env=CLEAN_ENVIRONMENT | (environment or {}),
        pass_fds=pass_fds,
        preexec_fn=before,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )


def assert_refused(ended: subprocess.CompletedProcess[str], status: int, *fragments: str) -> None:
    """Assert that the program ended with one line on stderr that holds all `fragments`."""
    assert "Traceback" not in ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("vhost-user-rpmb: error: ")
    for fragment in fragments:
        assert fragment in lines[0]
    assert ended.stdout == ""
    assert ended.returncode == status


class Running:
    """A daemon that listens at `socket_path`; `ended` tells what it left behind."""

    def __init__(self, process: subprocess.Popen[str], socket_path: Path) -> None:
        self.process = process
        self.socket_path = socket_path
        self.returncode: int | None = None
        self.stderr = ""

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        """End the daemon with a signal."""
        self.process.send_signal(signal_number)
        self.wait()

    def wait(self) -> None:
        """Wait for the daemon's end and take up what it printed."""
        _, self.stderr = self.process.communicate(timeout=TIMEOUT)
        self.returncode = self.process.returncode
        assert "Traceback" not in self.stderr


@contextmanager
def running(*arguments: str, socket_path: Path) -> Iterator[Running]:
    """Start the program with --socket-path, wait until it listens, and stop it in the end."""
    process = subprocess.Popen(
        [*PROGRAM, f"--socket-path={socket_path}", *arguments],
        env=CLEAN_ENVIRONMENT,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    daemon = Running(process, socket_path)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not is_live(socket_path):
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline, "the daemon does not listen"
            time.sleep(0.01)
        yield daemon
        if daemon.returncode is None:
            daemon.stop()
    finally:
        if process.returncode is None:
            process.kill()
            process.communicate()


def is_live(path: Path) -> bool:
    """Tell whether somebody accepts connections at a socket path."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError):
            return False
    return True


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """Return the path of an image of 128 KiB."""
    return make_image(tmp_path / "rpmb.img", 128 * KIB)


def make_image(path: Path, size: int) -> Path:
    """Make a sparse file of `size` bytes."""
    with path.open("wb") as file:
        file.truncate(size)
    return path


@pytest.fixture
def socket_path(tmp_path: Path) -> Path:
    """Return a path for the daemon's socket."""
    return tmp_path / "rpmb.sock"


# --- Options that print and end ---------------------------------------------------------------


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_names_every_option(option: str) -> None:
    ended = run(option)
    assert ended.returncode == 0
    assert ended.stderr == ""
    for name in OPTIONS:
        assert re.search(rf"^  (-\w.*, )?{name}\b", ended.stdout, re.MULTILINE), name


def test_parser_has_no_other_options() -> None:
    found = [name for action in build_parser()._actions for name in action.option_strings]
    assert sorted(found) == sorted([*OPTIONS, "-h", "-V", "-v"])


@pytest.mark.parametrize("option", ["-V", "--version"])
def test_version(option: str) -> None:
    ended = run(option)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout == f"vhost-user-rpmb {__version__}\n"


@pytest.mark.parametrize(
    "others",
    [
        [],
        ["--socket-path=/nowhere/sock", "--flash-path=/nowhere/image"],
        ["--no-such-option", "--fd=seven", "--initial-counter=-1"],
        ["--help"],
        ["surplus"],
    ],
    ids=" ".join,
)
def test_print_capabilities_ignores_the_other_options(others: list[str]) -> None:
    for arguments in (["--print-capabilities", *others], [*others, "--print-capabilities"]):
        ended = run(*arguments, environment={"VHOST_RPMB_ENGINE": "wrong"})
        assert (ended.returncode, ended.stderr) == (0, "")
        assert json.loads(ended.stdout) == {
            "type": "rpmb",
            "features": ["migration-shared", "migration-copy"],
        }


# --- Options that are right -------------------------------------------------------------------


def parse(*arguments: str, engine: str | None = None) -> Options:
    """Parse options together with the two that are always needed."""
    return parse_options(
        ["--flash-path=image", "--socket-path=sock", *arguments],
        {} if engine is None else {"VHOST_RPMB_ENGINE": engine},
    )


def test_defaults() -> None:
    assert parse()._asdict() == {
        "flash_path": "image",
        "store": None,
        "device": None,
        "take_over": "expired",
        "socket_path": "sock",
        "socket_group": None,
        "fd": None,
        "key_path": None,
        "key_set": False,
        "initial_counter": None,
        "state_path": None,
        "max_write_blocks": 32,
        "max_read_blocks": 255,
        "poll_us": 64,
        "virtio_features": DEFAULT,
        "strict": False,
        "once": False,
        "sandbox": True,
        "engine": "fast",
        "verbosity": 0,
        "inject": None,
        "migration": "off",
        "incoming": False,
        "fence_path": None,
        "migration_key": None,
    }


@pytest.mark.parametrize(
    ("option", "value", "field", "expected"),
    [
        ("--flash-path", "other image", "flash_path", "other image"),
        ("--socket-path", "other", "socket_path", "other"),
        ("--socket-group", "root", "socket_group", 0),
        ("--socket-group", "4294967294", "socket_group", 4294967294),
        ("--key-path", "key", "key_path", "key"),
        ("--state-path", "state", "state_path", "state"),
        ("--initial-counter", "0", "initial_counter", 0),
        ("--initial-counter", "4294967295", "initial_counter", 4294967295),
        ("--max-write-blocks", "1", "max_write_blocks", 1),
        ("--max-write-blocks", "255", "max_write_blocks", 255),
        ("--max-read-blocks", "0", "max_read_blocks", 0),
        ("--max-read-blocks", "255", "max_read_blocks", 255),
        ("--poll-us", "0", "poll_us", 0),
        ("--poll-us", "10000", "poll_us", 10000),
    ],
)
def test_option_with_a_value(option: str, value: str, field: str, expected: object) -> None:
    assert getattr(parse(f"{option}={value}"), field) == expected
    assert getattr(parse(option, value), field) == expected


def test_store() -> None:
    options = parse_options(
        ["--socket-path=sock", "--store=etcd:file", "--device=vm-1", "--take-over=never"], {}
    )
    assert options.flash_path is None
    assert (options.store, options.device, options.take_over) == ("etcd:file", "vm-1", "never")


def test_fd() -> None:
    for arguments in (["--fd=3"], ["--fd", "3"]):
        options = parse_options(["--flash-path=image", *arguments], {})
        assert (options.fd, options.socket_path) == (3, None)


def test_options_without_a_value() -> None:
    options = parse("--strict", "--once", "--key-path=key", "--key-set")
    assert (options.strict, options.once, options.key_set) == (True, True, True)


@pytest.mark.parametrize(("value", "sandbox"), [("on", True), ("off", False)])
def test_sandbox(value: str, sandbox: bool) -> None:
    assert parse(f"--sandbox={value}").sandbox is sandbox


@pytest.mark.parametrize(
    ("value", "removed", "added"),
    [
        ("-event-idx", {"event-idx"}, set()),
        ("-event-idx,-indirect-desc,-in-order", {"event-idx", "indirect-desc", "in-order"}, set()),
        ("+in-order", set(), {"in-order"}),
        ("in-order,-event-idx", {"event-idx"}, {"in-order"}),
        ("-in-order,+in-order,+event-idx", set(), {"in-order"}),  # the last one counts
    ],
)
def test_virtio_features(value: str, removed: set[str], added: set[str]) -> None:
    expected = DEFAULT & ~sum(OPTIONAL[name] for name in removed)
    expected |= sum(OPTIONAL[name] for name in added)
    assert parse(f"--virtio-features={value}").virtio_features == expected


@pytest.mark.parametrize(
    ("arguments", "verbosity"),
    [(["-v"], 1), (["--verbose"], 1), (["-vv"], 2), (["-v", "--verbose", "-v"], 3)],
    ids=str,
)
def test_verbose(arguments: list[str], verbosity: int) -> None:
    assert parse(*arguments).verbosity == verbosity


def test_debug_runs_the_pure_engine_with_debug_output() -> None:
    for engine in (None, "fast", "pure"):
        options = parse("--debug", engine=engine)
        assert (options.engine, options.verbosity) == ("pure", 3)


@pytest.mark.parametrize("engine", ["fast", "pure"])
def test_engine_by_environment(engine: str) -> None:
    assert parse(engine=engine).engine == engine


def test_value_that_looks_like_an_option_needs_the_equals_sign() -> None:
    assert parse("--key-path=--odd").key_path == "--odd"
    with pytest.raises(UsageError):
        parse("--key-path", "--odd")


# --- Options that are wrong -------------------------------------------------------------------

FLASH = "--flash-path=no-such-image"
SOCKET = "--socket-path=no-such-socket"


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        ([], ["--socket-path", "--fd"]),
        ([SOCKET], ["--flash-path"]),
        ([FLASH], ["--socket-path", "--fd"]),
        ([FLASH, SOCKET, "--fd=3"], ["--socket-path", "--fd", "not allowed"]),
        ([FLASH, SOCKET, "--no-such-option"], ["--no-such-option"]),
        ([FLASH, SOCKET, "--onc"], ["--onc"]),
        ([FLASH, SOCKET, "-x"], ["-x"]),
        ([FLASH, SOCKET, "surplus"], ["surplus"]),
        ([FLASH, SOCKET, "--strict=yes"], ["--strict", "yes"]),
        ([FLASH, SOCKET, "--key-set"], ["--key-set", "--key-path"]),
        ([FLASH, "--socket-path"], ["--socket-path", "expected one argument"]),
        ([FLASH, "--socket-path="], ["--socket-path", "expected a path"]),
        ([SOCKET, "--flash-path="], ["--flash-path", "expected a path"]),
        ([FLASH, SOCKET, "--key-path="], ["--key-path", "expected a path"]),
        ([FLASH, SOCKET, "--state-path="], ["--state-path", "expected a path"]),
        ([FLASH, SOCKET, "two\nlines"], ["two lines"]),
        ([FLASH, SOCKET, "--store=etcd:f"], ["--store", "--flash-path", "not allowed"]),
        ([SOCKET, "--store=etcd:f"], ["--store needs --device=NAME"]),
        ([FLASH, SOCKET, "--device=vm"], ["--device needs --store=etcd:CONFIG"]),
        ([SOCKET, "--store=etcd:f", "--device=vm", "--key-path=k"], ["--key-path is about files"]),
        ([SOCKET, "--store=etcd:f", "--device=vm", "--initial-counter=0"], ["--initial-counter"]),
        ([SOCKET, "--store=etcd:f", "--device=vm", "--state-path=s"], ["--state-path is about"]),
        ([FLASH, SOCKET, "--take-over=soon"], ["--take-over", "soon"]),
    ],
    ids=lambda value: " ".join(value) or "nothing",
)
def test_wrong_option(arguments: list[str], fragments: list[str]) -> None:
    assert_refused(run(*arguments), 2, *fragments, "see vhost-user-rpmb --help")


@pytest.mark.parametrize(
    ("option", "low", "high"),
    [
        ("--fd", 0, 2147483647),
        ("--initial-counter", 0, 4294967295),
        ("--max-write-blocks", 1, 255),
        ("--max-read-blocks", 0, 255),
        ("--poll-us", 0, 10000),
    ],
)
def test_number_out_of_range(option: str, low: int, high: int) -> None:
    line = [FLASH] if option == "--fd" else [FLASH, SOCKET]
    for value in (str(low - 1), str(high + 1)):
        with pytest.raises(UsageError) as refused:
            parse_options([*line, f"{option}={value}"], {})
        assert f"{option}: expected a number {low} to {high}, found '{value}'" in str(refused.value)
    assert_refused(run(*line, f"{option}={high + 1}"), 2, option, str(low), str(high))


@pytest.mark.parametrize(
    "value", ["", "seven", "1.0", "0x10", "1_0", "+1", " 1", "1 ", "-0", "\u0661", "1" * 5000]
)
def test_value_that_is_not_a_number(value: str) -> None:
    with pytest.raises(UsageError, match="--initial-counter: expected a number 0 to 4294967295"):
        parse(f"--initial-counter={value}")


@pytest.mark.parametrize(
    ("value", "fragments"),
    [
        ("", ["found ''", "event-idx, in-order, indirect-desc"]),
        ("-event-idx,", ["found ''"]),
        ("event_idx", ["found 'event_idx'", "did you mean event-idx?"]),
        ("-inorder", ["found '-inorder'", "did you mean in-order?"]),
        ("-event-idx, -in-order", ["found ' -in-order'", "did you mean in-order?"]),
        ("--event-idx", ["found '--event-idx'", "did you mean event-idx?"]),
        ("ring-reset", ["found 'ring-reset'"]),
        ("-indirect-desc", ["in-order only together with indirect-desc", "-in-order"]),
        ("+in-order,-indirect-desc", ["in-order only together with indirect-desc", "-in-order"]),
    ],
)
def test_wrong_virtio_features(value: str, fragments: list[str]) -> None:
    ended = run(FLASH, SOCKET, f"--virtio-features={value}")
    assert_refused(ended, 2, "--virtio-features", *fragments)


@pytest.mark.parametrize("value", ["", "slow", "FAST"])
def test_unknown_engine(value: str) -> None:
    ended = run(FLASH, SOCKET, environment={"VHOST_RPMB_ENGINE": value})
    assert_refused(ended, 2, "VHOST_RPMB_ENGINE", "fast or pure", repr(value))


# --- The image --------------------------------------------------------------------------------


def test_image_that_does_not_exist(image: Path, socket_path: Path) -> None:
    image.unlink()
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
    assert_refused(ended, 2, str(image), "does not exist", "truncate -s 128K")
    assert not image.exists()


@pytest.mark.parametrize("size", [0, 1, 128 * KIB - 1, 128 * KIB + 256, 32 * MIB + 128 * KIB])
def test_image_of_a_wrong_size(size: int, image: Path, socket_path: Path) -> None:
    make_image(image, size)
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
    assert_refused(ended, 2, str(image), str(size), "128 KiB", "32 MiB", "truncate -s 128K")


def test_image_that_is_a_folder(tmp_path: Path, socket_path: Path) -> None:
    ended = run(f"--flash-path={tmp_path}", f"--socket-path={socket_path}")
    assert_refused(ended, 2, str(tmp_path))


@pytest.mark.parametrize("size", [128 * KIB, 16 * MIB])
def test_image_of_a_good_size(size: int, image: Path, socket_path: Path) -> None:
    make_image(image, size)
    with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
        daemon.stop()
    assert (daemon.returncode, daemon.stderr) == (0, "")


@pytest.mark.parametrize("size", [16 * MIB + 128 * KIB, 32 * MIB])
def test_image_above_16_mib_is_served_with_a_warning(
    size: int, image: Path, socket_path: Path
) -> None:
    make_image(image, size)
    with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
        daemon.stop()
    assert daemon.returncode == 0
    assert len(daemon.stderr.splitlines()) == 1
    assert "warning" in daemon.stderr
    assert "16 MiB" in daemon.stderr


def test_image_whose_size_is_not_the_recorded_one(image: Path, socket_path: Path) -> None:
    with running(f"--flash-path={image}", socket_path=socket_path):
        pass
    make_image(image, 256 * KIB)
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
    assert_refused(ended, 1, str(image), str(128 * KIB), str(256 * KIB))


def test_second_daemon_on_the_same_image(tmp_path: Path, image: Path, socket_path: Path) -> None:
    other_socket = f"--socket-path={tmp_path / 'other.sock'}"
    with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
        ended = run(f"--flash-path={image}", other_socket)
        assert_refused(ended, 1, "in use")
        state = f"--state-path={tmp_path / 'other.state'}"
        ended = run(f"--flash-path={image}", other_socket, state)
        assert_refused(ended, 1, str(image), "in use")
        assert is_live(daemon.socket_path)


def test_second_daemon_on_the_same_state(tmp_path: Path, image: Path, socket_path: Path) -> None:
    other = make_image(tmp_path / "other.img", 128 * KIB)
    with running(f"--flash-path={image}", socket_path=socket_path):
        ended = run(
            f"--flash-path={other}",
            f"--state-path={image}.state",
            f"--socket-path={tmp_path / 'other.sock'}",
        )
        assert_refused(ended, 1, f"{image}.state", "in use")


# --- The state --------------------------------------------------------------------------------


def test_state_file_that_is_empty(image: Path, socket_path: Path) -> None:
    Path(f"{image}.state").touch()
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
    assert_refused(ended, 1, f"{image}.state", "is empty")


def test_state_file_that_is_something_else(image: Path, socket_path: Path) -> None:
    Path(f"{image}.state").write_bytes(b"not a database at all" * 500)
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
    assert_refused(ended, 1, f"{image}.state")


def test_state_path_in_a_missing_folder(tmp_path: Path, image: Path, socket_path: Path) -> None:
    state = tmp_path / "missing" / "rpmb.state"
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}", f"--state-path={state}")
    assert_refused(ended, 2, str(state))


def test_state_path_is_used(tmp_path: Path, image: Path, socket_path: Path) -> None:
    state = tmp_path / "elsewhere.state"
    with running(f"--flash-path={image}", f"--state-path={state}", socket_path=socket_path):
        assert state.stat().st_mode & 0o777 == 0o600
    assert not Path(f"{image}.state").exists()


def test_initial_counter_of_a_device_that_has_one(image: Path, socket_path: Path) -> None:
    flash = f"--flash-path={image}"
    with running(flash, "--initial-counter=7", socket_path=socket_path) as daemon:
        daemon.stop()
    assert daemon.stderr == ""
    with running(flash, "--initial-counter=8", socket_path=socket_path) as daemon:
        daemon.stop()
    assert daemon.returncode == 0
    assert len(daemon.stderr.splitlines()) == 1
    for fragment in ("--initial-counter=8", "not applied", " 7"):
        assert fragment in daemon.stderr


def test_disk_that_takes_no_more(image: Path, socket_path: Path) -> None:
    def forbid_writing() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    ended = run(
        f"--flash-path={image}",
        f"--socket-path={socket_path}",
        # Coverage could not write what it measured, and would say so.
        environment={"COVERAGE_PROCESS_CONFIG": ""},
        before=forbid_writing,
    )
    assert_refused(ended, 1, str(image))
    # What was begun is not left behind: with room on the disk the same command works.
    with running(f"--flash-path={image}", socket_path=socket_path):
        pass


def test_no_more_file_descriptors(image: Path, socket_path: Path) -> None:
    def allow_five() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (5, 5))

    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}", before=allow_five)
    assert_refused(ended, 1, "Too many open files")


# --- The key ----------------------------------------------------------------------------------


@pytest.fixture
def key(tmp_path: Path) -> Path:
    """Return the path of a key file with 32 bytes."""
    path = tmp_path / "rpmb.key"
    path.write_bytes(bytes(range(32)))
    path.chmod(0o600)
    return path


@pytest.mark.parametrize("size", [0, 31])
def test_key_set_with_a_short_key(size: int, key: Path, image: Path, socket_path: Path) -> None:
    key.write_bytes(bytes(size))
    ended = run(
        f"--flash-path={image}", f"--socket-path={socket_path}", f"--key-path={key}", "--key-set"
    )
    assert_refused(ended, 2, str(key), f"{size} bytes", "32")


def test_key_set_with_a_long_key(key: Path, image: Path, socket_path: Path) -> None:
    key.write_bytes(bytes(33))
    with running(
        f"--flash-path={image}", f"--key-path={key}", "--key-set", socket_path=socket_path
    ) as daemon:
        daemon.stop()
    assert daemon.returncode == 0
    assert len(daemon.stderr.splitlines()) == 1
    for fragment in ("warning", str(key), "32 bytes", "ignored"):
        assert fragment in daemon.stderr


def test_key_set_with_a_missing_key(key: Path, image: Path, socket_path: Path) -> None:
    key.unlink()
    ended = run(
        f"--flash-path={image}", f"--socket-path={socket_path}", f"--key-path={key}", "--key-set"
    )
    assert_refused(ended, 2, str(key), "does not exist")
    assert not Path(f"{image}.state").exists()


def test_key_file_without_key_set_warns(key: Path, image: Path, socket_path: Path) -> None:
    with running(f"--flash-path={image}", f"--key-path={key}", socket_path=socket_path) as daemon:
        daemon.stop()
    assert daemon.returncode == 0
    assert len(daemon.stderr.splitlines()) == 1
    for fragment in ("warning", str(key), "--key-set"):
        assert fragment in daemon.stderr


@pytest.fixture
def programmed(key: Path, image: Path, socket_path: Path) -> list[str]:
    """Return the options of a device that was started with --key-set once, --key-set left out."""
    arguments = [f"--flash-path={image}", f"--key-path={key}"]
    with running(*arguments, "--key-set", socket_path=socket_path):
        pass
    return arguments


def test_device_started_with_key_set_stays_programmed(
    programmed: list[str], socket_path: Path
) -> None:
    # No warning that a guest's key would replace the one in the file: none can any more.
    for more in ([], ["--key-set"]):
        with running(*programmed, *more, socket_path=socket_path) as daemon:
            daemon.stop()
        assert (daemon.returncode, daemon.stderr) == (0, "")


def test_key_path_dropped_after_key_set(programmed: list[str], socket_path: Path) -> None:
    ended = run(programmed[0], f"--socket-path={socket_path}")
    assert_refused(ended, 1, "--key-path")


def test_key_file_lost_after_key_set(programmed: list[str], key: Path, socket_path: Path) -> None:
    key.unlink()
    for more in ([], ["--key-set"]):
        ended = run(*programmed, *more, f"--socket-path={socket_path}")
        assert_refused(ended, 1, str(key), "does not exist")


def test_key_file_too_short_after_key_set(
    programmed: list[str], key: Path, socket_path: Path
) -> None:
    key.write_bytes(key.read_bytes()[:31])
    for more in ([], ["--key-set"]):
        ended = run(*programmed, *more, f"--socket-path={socket_path}")
        assert_refused(ended, 1, str(key), "31 bytes")


def test_other_key_file_after_key_set(programmed: list[str], key: Path, socket_path: Path) -> None:
    key.write_bytes(bytes(32))
    for more in ([], ["--key-set"]):
        ended = run(*programmed, *more, f"--socket-path={socket_path}")
        assert_refused(ended, 1, str(key), "another key")


# --- The socket -------------------------------------------------------------------------------


def test_socket_is_private_and_removed_at_the_end(image: Path, socket_path: Path) -> None:
    for number in (signal.SIGTERM, signal.SIGINT):
        with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
            assert socket_path.stat().st_mode & 0o777 == 0o600
            daemon.stop(number)
        assert (daemon.returncode, daemon.stderr) == (0, "")
        assert not socket_path.exists()


def test_stale_socket_is_replaced(image: Path, socket_path: Path) -> None:
    with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
        daemon.stop(signal.SIGKILL)
    assert socket_path.is_socket()
    with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
        daemon.stop()
    assert (daemon.returncode, daemon.stderr) == (0, "")


def test_live_socket_is_refused(tmp_path: Path, image: Path, socket_path: Path) -> None:
    other = make_image(tmp_path / "other.img", 128 * KIB)
    with running(f"--flash-path={other}", socket_path=socket_path):
        ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
        assert_refused(ended, 2, str(socket_path))
        assert is_live(socket_path)


@pytest.mark.parametrize("kind", ["file", "folder", "dangling link"])
def test_anything_else_at_the_socket_path_is_refused(
    kind: str, tmp_path: Path, image: Path, socket_path: Path
) -> None:
    if kind == "file":
        socket_path.write_text("precious")
    elif kind == "folder":
        socket_path.mkdir()
    else:
        socket_path.symlink_to(tmp_path / "nothing")
    before = socket_path.lstat()
    ended = run(f"--flash-path={image}", f"--socket-path={socket_path}")
    assert_refused(ended, 2, str(socket_path))
    assert socket_path.lstat().st_ino == before.st_ino


def test_socket_path_in_a_missing_folder(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "missing" / "rpmb.sock"
    ended = run(f"--flash-path={image}", f"--socket-path={path}")
    assert_refused(ended, 2, str(path))


def test_socket_path_that_is_too_long(tmp_path: Path, image: Path) -> None:
    path = tmp_path / ("s" * 120)  # a UNIX socket's path has at most 107 bytes
    ended = run(f"--flash-path={image}", f"--socket-path={path}")
    assert_refused(ended, 2, str(path))


# --- The inherited file descriptor ------------------------------------------------------------


def test_fd_that_is_not_open(image: Path) -> None:
    ended = run(f"--flash-path={image}", "--fd=99")
    assert_refused(ended, 2, "99")


def test_fd_that_is_not_a_socket(image: Path) -> None:
    with image.open("rb") as file:
        fd = file.fileno()
        ended = run(f"--flash-path={image}", f"--fd={fd}", pass_fds=[fd])
    assert_refused(ended, 2, str(fd))


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        (socket.AF_INET, socket.SOCK_STREAM),
        (socket.AF_UNIX, socket.SOCK_DGRAM),
        (socket.AF_UNIX, socket.SOCK_STREAM),  # neither listening nor connected
    ],
    ids=["TCP", "datagram", "idle"],
)
def test_fd_that_is_another_socket(
    family: socket.AddressFamily, kind: socket.SocketKind, image: Path
) -> None:
    with socket.socket(family, kind) as wrong:
        fd = wrong.fileno()
        ended = run(f"--flash-path={image}", f"--fd={fd}", pass_fds=[fd])
    assert_refused(ended, 2, str(fd))


# --- How the daemon ends ----------------------------------------------------------------------


def test_once_ends_with_the_first_front_end(image: Path, socket_path: Path) -> None:
    with running(f"--flash-path={image}", "--once", socket_path=socket_path) as daemon:
        daemon.wait()  # is_live() was the first front-end
    assert daemon.returncode == 0
    assert not socket_path.exists()


def test_without_once_the_next_front_end_is_served(image: Path, socket_path: Path) -> None:
    with running(f"--flash-path={image}", socket_path=socket_path) as daemon:
        for _ in range(3):
            assert is_live(socket_path)
        daemon.stop()
    assert daemon.returncode == 0


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["--flash-pth=f", "--socket-path=s"], "did you mean --flash-path instead of --flash-pth?"),
        (["--flash-path=f", "--scoket-path", "s"], "did you mean --socket-path instead of"),
        (["--flash-path=f", "--socket-path=s", "--sandbox=of"], "did you mean off instead of of?"),
    ],
)
def test_error_suggests_the_nearest_word(arguments: list[str], hint: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(arguments, {})
    assert hint in str(caught.value)


def test_error_suggests_nothing_where_nothing_is_near() -> None:
    with pytest.raises(UsageError) as caught:
        parse_options(["--flash-path=f", "--socket-path=s", "--zzz"], {})
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--incoming"], "--incoming needs --migration=shared or copy"),
        (["--fence-path=f"], "--fence-path needs --migration=copy"),
        (["--fence-path=f", "--migration=shared"], "--fence-path needs --migration=copy"),
        (["--migration-key=k", "--migration=shared"], "--migration-key needs --migration=copy"),
        (["--migration=copy", "--inject=f"], "--inject is for tests"),
        (["--migration=both"], "--migration"),
    ],
    ids=" ".join,
)
def test_options_of_migration_belong_together(arguments: list[str], text: str) -> None:
    with pytest.raises(UsageError, match=text):
        parse(*arguments)


def test_copy_is_for_files() -> None:
    arguments = ["--socket-path=s", "--store=etcd:c", "--device=d", "--migration=copy"]
    with pytest.raises(UsageError, match="--migration=copy is for files"):
        parse_options(arguments, {})
