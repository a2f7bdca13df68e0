# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vhost-rpmb-client``: assembles the verbs, prints their reports.

The verbs ``write-key``, ``read-counter``, ``write-block`` and ``read-block`` are those of
mmc-utils' ``rpmb``, on a daemon's socket. ``build_parser()`` works where only the standard library
is installed: the man page is made from it at build time.
"""

import argparse
import signal
from collections.abc import Sequence

from vhost_rpmb import __version__, process
from vhost_rpmb.arguments import Parser, path_argument
from vhost_rpmb.client.arguments import seconds
from vhost_rpmb.client.files import PROG, write_stdout
from vhost_rpmb.client.verbs import VERBS
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
_KICK_PATIENCE = 0.1  # seconds that a back-end can block a kick

_HINTS = {
    ("PROGRAM_KEY", spec.VIRTIO_RPMB_RES_WRITE_FAILURE): (
        "; a key is programmed once: the device has one already, or could not store this one"
    ),
    ("DATA_WRITE", spec.VIRTIO_RPMB_RES_COUNT_FAILURE): (
        "; another program wrote to the device at the same time: try again"
    ),
}
_NO_KEY_HINT = "; no key is programmed yet: use write-key"


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
        type=seconds,
        default=10.0,
        help="how long to wait for each answer of the daemon; default %(default)g",
    )
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, title="commands")
    for verb in VERBS:
        command = commands.add_parser(
            verb.__name__.rpartition(".")[2].replace("_", "-"),
            help=verb.HELP,
            description=f"{verb.HELP[0].upper()}{verb.HELP[1:]}.",
        )
        verb.add_arguments(command)
        command.set_defaults(run=verb.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command in ``argv`` (default: those of the process); return the exit status.

    0 after success, 1 for a failure of the device, the connection or the output, 2 for a wrong
    option or an input file that cannot be used.
    """
    process.reset_signals()
    _bound_kicks()
    try:
        arguments = build_parser().parse_args(argv)
        process.hide_memory()  # before a key is read
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
        return 130  # the status that a shell reports for SIGINT
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return 0


def _bound_kicks() -> None:
    """Interrupt a kick that the back-end blocks; all other calls continue after a signal."""
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
