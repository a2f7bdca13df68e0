# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vhost-rpmb-client``: mmc-utils' ``rpmb`` verbs on a daemon's socket.

And ``verify``, which needs no daemon: it checks the files of a device that is not running.

The client itself is imported only after the options are known to be right: the parser has to work
where only the standard library is there.
"""

import argparse
import os
import re
import stat
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from vhost_rpmb import __version__, spec
from vhost_rpmb.arguments import Parser, path_argument
from vhost_rpmb.client.errors import ClientError, RpmbResultError
from vhost_rpmb.errors import OperatorError, StateError, UsageError

if TYPE_CHECKING:
    from vhost_rpmb.client.rpmb import RpmbClient

PROG = "vhost-rpmb-client"

DESCRIPTION = """\
Talk to the RPMB device that a vhost-user-rpmb daemon serves, without a virtual machine: program
its key, read its write counter, write and read blocks. Or verify the files of a device whose daemon
does not run.

The daemon serves one front-end at a time, so this works while no virtual machine is connected to
it. Addresses and counts are in blocks of 256 bytes, decimal or with 0x in front. A file named -
is standard input or output. Exit status: 0 if all went well, 1 for a failure of the device or of
the connection, 2 for a wrong option or an input file that cannot be used.
"""

STANDARD_STREAM = "-"
FAILURE = 1
MAX_TIMEOUT = 86400.0  # seconds
MAX_WRITE_BLOCKS = 255  # max_wr_cnt has 8 bits
MAX_BLOCKS = 1 << 16  # an address has 16 bits

_HINTS = {
    ("PROGRAM_KEY", spec.VIRTIO_RPMB_RES_WRITE_FAILURE): (
        "; a device takes a key only once: it has one, or could not store this one"
    ),
    ("DATA_WRITE", spec.VIRTIO_RPMB_RES_COUNT_FAILURE): (
        "; somebody else wrote to the device at the same time: try again"
    ),
}
_NO_KEY_HINT = "; no key is programmed yet: use write-key"


def _number(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a number from ``low`` to ``high``, decimal or hexadecimal."""

    def parse(text: str) -> int:
        # A leading zero is refused: mmc-utils takes it for octal, people do not.
        if re.fullmatch(r"0|[1-9][0-9]*|0[xX][0-9a-fA-F]+", text, re.ASCII):
            number = int(text, 0)
            if low <= number <= high:
                return number
        raise argparse.ArgumentTypeError(f"expected a number {low} to {high}, found {text!r}")

    return parse


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds <= MAX_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds above 0 and up to {MAX_TIMEOUT:g}, found {text!r}"
        )
    return seconds


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, without side effects."""
    parser = Parser(
        prog=PROG,
        description=DESCRIPTION,
    )
    parser.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"{PROG} {__version__}",
        help="print the version and exit",
    )
    parser.add_argument(
        "--socket-path",
        metavar="PATH",
        type=path_argument,
        help="the UNIX socket of the daemon; required for all but verify",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="how long to wait for an answer of the daemon; default %(default)g",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(name: str, run: Callable[[argparse.Namespace], None], text: str) -> Parser:
        added = commands.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    def key_file(added: Parser, text: str, *, optional: bool = False) -> None:
        added.add_argument(
            "key_file",
            metavar="KEYFILE",
            type=path_argument,
            nargs="?" if optional else None,
            help=text,
        )

    def address(added: Parser) -> None:
        added.add_argument(
            "address",
            metavar="ADDRESS",
            type=_number(0, MAX_BLOCKS - 1),
            help="the first block, counted from 0",
        )

    added = command("write-key", _write_key, "program the device's key, which works only once")
    key_file(added, "the key, 32 bytes")

    added = command("read-counter", _read_counter, "print the write counter")
    key_file(
        added, "the key, to verify the answer; without it the answer is believed", optional=True
    )

    added = command(
        "write-block", _write_block, "write blocks in one atomic, authenticated request"
    )
    address(added)
    added.add_argument(
        "data_file",
        metavar="DATAFILE",
        type=path_argument,
        help="the data, a multiple of 256 bytes up to what the device takes in one write",
    )
    key_file(added, "the key, to authenticate the request and to verify the answer")

    added = command("read-block", _read_block, "read blocks into a file, which is replaced")
    address(added)
    added.add_argument(
        "count", metavar="COUNT", type=_number(1, MAX_BLOCKS), help="how many blocks"
    )
    added.add_argument(
        "out_file", metavar="OUTFILE", type=path_argument, help="where to put the data"
    )
    key_file(
        added, "the key, to verify the answer; without it the answer is believed", optional=True
    )

    added = command(
        "verify", _verify, "check the files of a device that is not running, and change nothing"
    )
    for name, needed, text in (
        ("flash", True, "the raw backing image; required"),
        ("state", False, "where the state is kept; default: the flash path with .state behind it"),
        ("key", False, "the key file, to check that it holds the device's key"),
    ):
        added.add_argument(
            f"--{name}-path", metavar="PATH", type=path_argument, required=needed, help=text
        )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own); return the exit status.

    0 after success, 1 for a failure of the device, the connection or the output, 2 for a wrong
    option or an input file that cannot be used.
    """
    try:
        arguments = build_parser().parse_args(argv)
        arguments.run(arguments)
    except OperatorError as error:
        return _fail(str(error), error.exit_status)
    except RpmbResultError as error:
        return _fail(f"{error}{_hint(error)}", FAILURE)
    except ClientError as error:
        return _fail(str(error), FAILURE)
    except OSError as error:
        return _fail(f"cannot play a virtual machine here: {error.strerror}", FAILURE)
    except KeyboardInterrupt:
        return 130  # what a shell reports for a program ended by SIGINT
    return 0


def _write_key(arguments: argparse.Namespace) -> None:
    key = _read_key(arguments.key_file)
    with _connect(arguments, None) as client:
        client.program_key(key)


def _read_counter(arguments: argparse.Namespace) -> None:
    with _connect(arguments, _read_optional_key(arguments.key_file)) as client:
        counter = client.read_counter()
    _write_stdout(f"Counter value: 0x{counter:08x}\n".encode())
    if counter == spec.MAX_WRITE_COUNTER:
        _say("warning: the write counter has expired: no more writes are possible")


def _write_block(arguments: argparse.Namespace) -> None:
    if arguments.data_file == arguments.key_file == STANDARD_STREAM:
        raise UsageError("DATAFILE and KEYFILE cannot both be standard input")
    data = _read_data(arguments.data_file)
    key = _read_key(arguments.key_file)
    count = len(data) // spec.BLOCK_SIZE
    with _connect(arguments, key) as client:
        limit = client.config.max_wr_cnt or MAX_WRITE_BLOCKS
        if count > limit:
            raise UsageError(
                f"{_name(arguments.data_file)}: expected at most {limit} blocks of "
                f"{spec.BLOCK_SIZE} bytes, which the device takes in one write, found {count}"
            )
        _check_range(client, arguments.address, count)
        client.write(arguments.address, data)


def _read_block(arguments: argparse.Namespace) -> None:
    with _connect(arguments, _read_optional_key(arguments.key_file)) as client:
        _check_range(client, arguments.address, arguments.count)
        data = client.read(arguments.address, arguments.count)
    if arguments.out_file == STANDARD_STREAM:
        _write_stdout(data)
    else:
        _write_file(arguments.out_file, data)


def _verify(arguments: argparse.Namespace) -> None:
    from vhost_rpmb.store import verify

    report = verify(
        arguments.flash_path,
        state_path=arguments.state_path,
        key_path=arguments.key_path,
        warn=lambda text: _say(f"warning: {text}"),
    )
    where = "in a key file" if report.key_in_file else "in the state file"
    lines = [
        f"image: {arguments.flash_path}, {report.blocks} blocks",
        f"state: {report.state_path}, {'closed' if report.clean else 'not closed'}",
        f"write counter: 0x{report.counter:08x}",
        f"key: {f'programmed, {where}' if report.programmed else 'not programmed'}",
        f"blocks that wait in the state file: {_addresses(report.pending)}",
        f"damaged blocks: {_addresses(report.damaged)}",
    ]
    _write_stdout("".join(f"{line}\n" for line in lines).encode())
    if report.disagreement:
        raise StateError(report.disagreement)
    if report.damaged:
        raise StateError(f"{len(report.damaged)} blocks are not what was stored")


def _addresses(blocks: list[int]) -> str:
    """Write block addresses for people."""
    from vhost_rpmb.image import ranges

    return f"{len(blocks)}, address {ranges(blocks, None)}" if blocks else "none"


def _connect(arguments: argparse.Namespace, key: bytes | None) -> "RpmbClient":
    from vhost_rpmb.client.rpmb import RpmbClient

    if arguments.socket_path is None:
        raise UsageError(f"--socket-path=PATH is required (see {PROG} --help)")
    return RpmbClient.connect(arguments.socket_path, key, timeout=arguments.timeout)


def _check_range(client: "RpmbClient", address: int, count: int) -> None:
    if address + count > client.config.blocks:
        raise UsageError(
            f"blocks {address} to {address + count - 1} are asked for, but the device's last block "
            f"is {client.config.blocks - 1}"
        )


def _read_key(path: str) -> bytes:
    key = _read_input(path, spec.KEY_SIZE + 1)
    if len(key) < spec.KEY_SIZE:
        raise UsageError(
            f"{_name(path)}: expected a key of {spec.KEY_SIZE} bytes, found {len(key)}"
        )
    if len(key) > spec.KEY_SIZE:
        _say(
            f"warning: {_name(path)}: a key has {spec.KEY_SIZE} bytes, what follows them is ignored"
        )
    return key[: spec.KEY_SIZE]


def _read_optional_key(path: str | None) -> bytes | None:
    if path is None:
        _say("warning: no KEYFILE given: the answer is not verified")
        return None
    return _read_key(path)


def _read_data(path: str) -> bytes:
    most = MAX_WRITE_BLOCKS * spec.BLOCK_SIZE
    data = _read_input(path, most + 1)
    if not data or len(data) % spec.BLOCK_SIZE:
        found = f"more than {most}" if len(data) > most else str(len(data))
        raise UsageError(
            f"{_name(path)}: expected a multiple of {spec.BLOCK_SIZE} bytes, up to {most}, found "
            f"{found}"
        )
    return data


def _read_input(path: str, most: int) -> bytes:
    """Read at most ``most`` bytes of an input file."""
    try:
        if path != STANDARD_STREAM:
            with open(path, "rb", buffering=0) as file:
                return _read_up_to(file.fileno(), most)
        if sys.stdin is None:
            raise UsageError("standard input is closed")
        return _read_up_to(sys.stdin.fileno(), most)
    except OSError as error:
        raise UsageError(f"{_name(path)}: {error.strerror}") from None


def _read_up_to(fd: int, most: int) -> bytes:
    data = b""
    while len(data) < most and (part := os.read(fd, most - len(data))):
        data += part
    return data


def _write_stdout(data: bytes) -> None:
    if sys.stdout is None:
        raise ClientError("standard output is closed")
    try:
        _write_all(sys.stdout.fileno(), data)
    except OSError as error:
        raise ClientError(f"standard output: {error.strerror}") from None


def _write_file(path: str, data: bytes) -> None:
    """Put ``data`` into a file that has all of it or, after a failure, what it had before."""
    path = os.path.realpath(path)
    try:
        try:
            mode = os.stat(path).st_mode
        except FileNotFoundError:
            mode = stat.S_IFREG | stat.S_IRUSR | stat.S_IWUSR
        if not stat.S_ISREG(mode):  # a device or a FIFO cannot be replaced
            with open(path, "wb", buffering=0) as file:
                _write_all(file.fileno(), data)
            return
        fd, new = tempfile.mkstemp(dir=os.path.dirname(path), prefix=".vhost-rpmb-client-")
        try:
            try:
                _write_all(fd, data)
                os.fchmod(fd, stat.S_IMODE(mode))
            finally:
                os.close(fd)
            os.replace(new, path)
        except BaseException:
            os.unlink(new)
            raise
    except OSError as error:
        raise ClientError(f"{path}: {error.strerror}") from None


def _write_all(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data) :]


def _name(path: str) -> str:
    return "standard input" if path == STANDARD_STREAM else path


def _hint(error: RpmbResultError) -> str:
    status = error.result & ~spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    if status == spec.VIRTIO_RPMB_RES_NO_AUTH_KEY:
        return _NO_KEY_HINT
    return _HINTS.get((error.request, status), "")


def _fail(message: str, status: int) -> int:
    _say(f"error: {' '.join(message.splitlines())}")
    return status


def _say(text: str) -> None:
    with suppress(OSError):  # nobody is left to tell
        print(f"{PROG}: {text}", file=sys.stderr)
