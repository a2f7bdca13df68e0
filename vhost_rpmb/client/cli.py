# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vhost-rpmb-client``: what is asked for, and how it is told.

The verbs ``write-key``, ``read-counter``, ``write-block`` and ``read-block`` are those of
mmc-utils' ``rpmb``, on a daemon's socket. ``build_parser()`` works where only the standard library
is there: the man page is made from it at build time.
"""

import argparse
import re
import signal
from collections.abc import Callable, Sequence

from vhost_rpmb import __version__, signals
from vhost_rpmb.arguments import Parser, path_argument
from vhost_rpmb.client import commands
from vhost_rpmb.client.files import PROG, write_stdout
from vhost_rpmb.driver.errors import ClientError, RpmbResultError
from vhost_rpmb.errors import OperatorError
from vhost_rpmb.rpmb import spec

DESCRIPTION = """\
Talk to the RPMB device that a vhost-user-rpmb daemon serves, without a virtual machine: program
its key, read its write counter, write and read blocks. Or create the image of a new device, and
report on and verify the files of a device whose daemon is not running.

The daemon serves one front-end at a time, so this works while no virtual machine is connected to
it. Addresses and counts are in blocks of 256 bytes, decimal or with 0x in front. A file named -
is standard input or output. Exit status: 0 if all went well, 1 for a failure of the device or of
the connection, 2 for a wrong option or an input file that cannot be used.
"""

FAILURE = 1
MAX_TIMEOUT = 86400.0  # seconds
_KICK_PATIENCE = 0.1  # seconds that a back-end can make a kick wait

_SIZE = re.compile(r"([1-9][0-9]{0,9})([KM]?)", re.ASCII)
_UNITS = {"": 1, "K": 1024, "M": 1024 * 1024}

_HINTS = {
    ("PROGRAM_KEY", spec.VIRTIO_RPMB_RES_WRITE_FAILURE): (
        "; a key is programmed once: the device has one already, or could not store this one"
    ),
    ("DATA_WRITE", spec.VIRTIO_RPMB_RES_COUNT_FAILURE): (
        "; another program wrote to the device at the same time: try again"
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


def _size(text: str) -> int:
    found = _SIZE.fullmatch(text)
    size = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < size <= spec.MAX_CAPACITY or size % spec.CAPACITY_UNIT:
        raise argparse.ArgumentTypeError(
            f"expected a multiple of 128K, from 128K to 16M, found {text!r}"
        )
    return size


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line, without side effects."""
    parser = Parser(prog=PROG, description=DESCRIPTION)
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
        help="the UNIX socket of the daemon; required by every command that uses a daemon",
    )
    parser.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=10.0,
        help="how long to wait for each answer of the daemon; default %(default)g",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    verbs = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")

    def command(
        name: str, run: Callable[[argparse.Namespace], commands.Result], text: str
    ) -> Parser:
        added = verbs.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        added.set_defaults(run=run)
        return added

    def key_file(added: Parser, text: str, optional: bool = False) -> None:
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
            type=_number(0, commands.MAX_BLOCKS - 1),
            help="the first block, counted from 0",
        )

    def data_file(added: Parser, most: str) -> None:
        added.add_argument(
            "data_file",
            metavar="DATAFILE",
            type=path_argument,
            help=f"the data, a multiple of 256 bytes up to {most}",
        )
        key_file(added, "the key, which authenticates requests and answers")

    def out_file(added: Parser) -> None:
        added.add_argument(
            "out_file", metavar="OUTFILE", type=path_argument, help="the file for the data"
        )
        key_file(added, "the key; without it, answers are not authenticated", True)

    def files(added: Parser, *, required: bool) -> None:
        for name, needed, text in (
            ("flash", required, "the raw backing image" + ("; required" if required else "")),
            (
                "state",
                False,
                "the state; default: the flash path, links resolved, with .state behind it",
            ),
            ("key", False, "the key file, to check that it holds the device's key"),
        ):
            added.add_argument(
                f"--{name}-path", metavar="PATH", type=path_argument, required=needed, help=text
            )

    added = command("create", commands.create, "create the sparse image of a new device")
    place = added.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "image", metavar="IMAGE", type=path_argument, nargs="?", help="the image; a new file"
    )
    place.add_argument(
        "--folder",
        metavar="DIR",
        type=path_argument,
        help=f"create a folder for the device, mode 0700, with {commands.IMAGE_NAME} in it",
    )
    added.add_argument(
        "--size",
        metavar="SIZE",
        type=_size,
        default="128K",
        help="a multiple of 128K, up to 16M; default %(default)s",
    )
    added.add_argument(
        "--random-key",
        metavar="PATH",
        type=path_argument,
        help="also create a key file with a random key, mode 0600",
    )

    added = command(
        "info", commands.info, "report on a device, through its daemon's socket or from its files"
    )
    files(added, required=False)
    key_file(added, "the key; without it, the write counter is not authenticated", True)

    added = command(
        "write-key", commands.write_key, "program the device's key, which is possible once"
    )
    key_file(added, "the key, 32 bytes")

    added = command("read-counter", commands.read_counter, "print the write counter")
    key_file(added, "the key; without it, the answer is not authenticated", True)

    added = command(
        "write-block", commands.write_block, "write blocks in one atomic, authenticated request"
    )
    address(added)
    data_file(added, "the device's limit for one write")

    added = command("read-block", commands.read, "read blocks into a file, which is replaced")
    address(added)
    added.add_argument(
        "count", metavar="COUNT", type=_number(1, commands.MAX_BLOCKS), help="how many blocks"
    )
    out_file(added)

    added = command("load", commands.load, "write a file's blocks, in as many requests as needed")
    added.add_argument(
        "--address",
        metavar="ADDRESS",
        type=_number(0, commands.MAX_BLOCKS - 1),
        default=0,
        help="the first block; default %(default)s",
    )
    data_file(added, "the device's capacity")

    added = command("dump", commands.read, "read the whole device, or a range of it, into a file")
    added.add_argument(
        "--address",
        metavar="ADDRESS",
        type=_number(0, commands.MAX_BLOCKS - 1),
        default=0,
        help="the first block; default %(default)s",
    )
    added.add_argument(
        "--count",
        metavar="COUNT",
        type=_number(1, commands.MAX_BLOCKS),
        help="how many blocks; default: all that follow",
    )
    out_file(added)

    added = command(
        "verify",
        commands.verify,
        "check the files of a device that is not running, and change nothing",
    )
    files(added, required=True)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: the process's own); return the exit status.

    0 after success, 1 for a failure of the device, the connection or the output, 2 for a wrong
    option or an input file that cannot be used.
    """
    signals.reset_inherited()
    _bound_kicks()
    try:
        arguments = build_parser().parse_args(argv)
        from vhost_rpmb.daemon import sandbox

        sandbox.hide_memory()  # before a key is read
        result = arguments.run(arguments)
        if arguments.json:
            import json

            write_stdout(json.dumps(result.values).encode() + b"\n")
        else:
            write_stdout("".join(f"{line}\n" for line in result.lines).encode())
        if result.error is not None:
            raise result.error
    except OperatorError as error:
        return _fail(str(error), error.exit_status)
    except RpmbResultError as error:
        return _fail(f"{error}{_hint(error)}", FAILURE)
    except ClientError as error:
        return _fail(str(error), FAILURE)
    except OSError as error:
        return _fail(f"cannot set up a front-end on this machine: {error.strerror}", FAILURE)
    except KeyboardInterrupt:
        return 130  # what a shell reports for a program ended by SIGINT
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


def _bound_kicks() -> None:
    """Interrupt a kick that the back-end makes wait; all other calls go on after a signal."""
    signal.signal(signal.SIGALRM, lambda _number, _frame: None)
    signal.setitimer(signal.ITIMER_REAL, _KICK_PATIENCE, _KICK_PATIENCE)


def _hint(error: RpmbResultError) -> str:
    status = error.result & ~spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    if status == spec.VIRTIO_RPMB_RES_NO_AUTH_KEY:
        return _NO_KEY_HINT
    return _HINTS.get((error.request, status), "")


def _fail(message: str, status: int) -> int:
    from vhost_rpmb import log  # imported lazily: not needed on success

    return log.fatal(PROG, message, status)
