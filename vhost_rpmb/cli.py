# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vhost-user-rpmb``: options in, validated ``Options`` out.

What can be told from the options alone is checked here; what needs a look at a file is checked
where the file is opened. Nothing heavy is imported before the options are known to be right, and
the man page is made from ``build_parser()`` at build time, when only the standard library is there.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from vhost_rpmb import __version__
from vhost_rpmb.arguments import Parser, path_argument
from vhost_rpmb.errors import OperatorError, UsageError
from vhost_rpmb.rpmb.spec import MAX_WRITE_COUNTER

if TYPE_CHECKING:
    from vhost_rpmb.daemon.server import Options

PROG = "vhost-user-rpmb"

DESCRIPTION = """\
Serve a virtio RPMB (replay protected memory block) device to a virtual machine over vhost-user.

A virtual machine monitor, such as QEMU, connects to the socket and hands over a virtqueue and the
guest's memory. What a guest writes is authenticated with a key that is programmed once and cannot
be read back, and protected against replay by a write counter that only ever goes up. An answer
that says success leaves only after data and counter are durable.

One daemon serves one image to one front-end at a time. It stays in the foreground, logs to
standard error, and ends cleanly on SIGTERM and SIGINT.
"""

ENGINE_VARIABLE = "VHOST_RPMB_ENGINE"
DEBUG_VERBOSITY = 3

MAX_FD = 0x7FFF_FFFF
MAX_BLOCKS = 255  # max_wr_cnt and max_rd_cnt have 8 bits
MAX_POLL_US = 10_000  # a signal may wait that long
MAX_GID = 0xFFFF_FFFE  # the next one means "unchanged"
MAX_DIGITS = 10  # of any number that an option takes

# vhost-user "Backend program conventions". QEMU's vhost-user.json has no type for this device;
# docs/decisions/0003-capabilities-type.md says why it is this one.
CAPABILITIES = {"type": "rpmb"}


def _number(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a decimal number from `low` to `high`."""

    def parse(text: str) -> int:
        # Not int() alone: it also takes signs, spaces, underscores and non-ASCII digits.
        digits = text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS
        if not (digits and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"expected a number {low} to {high}, found {text!r}")
        return int(text)

    return parse


def _group(text: str) -> int:
    """Return the ID of the group that has this name or, where none has it, this number."""
    import grp  # only here: most starts name no group

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) <= MAX_GID:
            return int(text)
    raise argparse.ArgumentTypeError(
        f"expected a group's name or number, found {text!r}: make it with groupadd or name another"
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the man page is made from it."""
    parser = Parser(
        prog=PROG,
        description=DESCRIPTION,
    )
    add = parser.add_argument
    add(
        "-V",
        "--version",
        action="version",
        version=f"{PROG} {__version__}",
        help="print the version and exit",
    )
    add("-v", "--verbose", action="count", default=0, help="more output; may be repeated")
    add("--debug", action="store_true", help="debug output, on the pure-Python engine")
    socket = parser.add_mutually_exclusive_group(required=True)
    socket.add_argument(
        "--socket-path",
        metavar="PATH",
        type=path_argument,
        help="listen on a UNIX stream socket at PATH; not with --fd",
    )
    socket.add_argument(
        "--fd",
        metavar="FDNUM",
        type=_number(0, MAX_FD),
        help="accept on an already listening UNIX socket inherited as FDNUM (one that is connected "
        "already is served, and its end ends the daemon); not with --socket-path",
    )
    add(
        "--socket-group",
        metavar="GROUP",
        type=_group,
        help="let this group, a name or a number, connect to the socket of --socket-path too: its "
        "mode is 0660 then; default: only the daemon's user, mode 0600",
    )
    add(
        "--flash-path",
        metavar="PATH",
        type=path_argument,
        required=True,
        help="the raw backing image: a multiple of 128 KiB, up to 32 MiB, of which the first "
        "16 MiB are served; required",
    )
    add(
        "--key-path",
        metavar="PATH",
        type=path_argument,
        help="the 32-byte key file; without --key-set, where a key programmed by the guest is "
        "kept; default: the key is kept in the state database",
    )
    add(
        "--key-set",
        action="store_true",
        help="the key in --key-path counts as programmed: the guest cannot program one",
    )
    add(
        "--initial-counter",
        metavar="N",
        type=_number(0, MAX_WRITE_COUNTER),
        help=f"start value of the write counter of a new device, 0 to {MAX_WRITE_COUNTER}; "
        "default 0; a stored counter always wins; required to make a new device of an image that "
        "holds data",
    )
    add(
        "--print-capabilities",
        action="store_true",
        help="print what this back-end can do as JSON (vhost-user back-end convention) and exit; "
        "other options are ignored",
    )
    add(
        "--state-path",
        metavar="PATH",
        type=path_argument,
        help="where the durable state is kept; default: the flash path, symbolic links resolved, "
        "with .state behind it",
    )
    add(
        "--max-write-blocks",
        metavar="N",
        type=_number(1, MAX_BLOCKS),
        default=32,
        help=f"blocks of 256 bytes that one write may have, 1 to {MAX_BLOCKS}; default %(default)s",
    )
    add(
        "--max-read-blocks",
        metavar="N",
        type=_number(0, MAX_BLOCKS),
        default=MAX_BLOCKS,
        help=f"blocks of 256 bytes that one read may have, 1 to {MAX_BLOCKS}, or 0 for no limit "
        "but the room for the answer, up to 2048; default %(default)s",
    )
    add(
        "--poll-us",
        metavar="N",
        type=_number(0, MAX_POLL_US),
        default=64,
        help="microseconds that the daemon may watch for the next request before it sleeps, 0 to "
        f"{MAX_POLL_US}; it watches only while requests come that fast; 0 turns it off; "
        "default %(default)s",
    )
    add(
        "--strict",
        action="store_true",
        help="answer by the letter of the virtio specification, although deployed software may "
        "not take it: a block count of 0 is a general failure everywhere, and an expired write "
        "counter is answered with the bare result 0x80",
    )
    add(
        "--once",
        action="store_true",
        help="end when the first front-end disconnects; otherwise the next one is served",
    )
    add(
        "--sandbox",
        metavar="on|off",
        choices=("on", "off"),
        default="on",
        help="off: keep what the daemon otherwise gives up before it serves anybody (other files, "
        "new sockets, other programs), to debug it; default %(default)s",
    )
    return parser


def _engine(debug: bool, environment: Mapping[str, str]) -> str:
    """Return the name of the engine that --debug and the environment ask for."""
    from vhost_rpmb.engine import ENGINES

    asked = environment.get(ENGINE_VARIABLE, ENGINES[0])
    if asked not in ENGINES:
        raise UsageError(
            f"environment variable {ENGINE_VARIABLE}: expected {' or '.join(ENGINES)}, "
            f"found {asked!r}"
        )
    return "pure" if debug else asked


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> "Options":
    """Return the options that `arguments` (without the program's name) stand for.

    Raises `UsageError` for a wrong one, and `SystemExit` after --help and --version.
    """
    namespace = build_parser().parse_args(arguments)
    if namespace.key_set and namespace.key_path is None:
        raise UsageError(
            "--key-set needs --key-path=PATH, the file that holds the 32-byte key "
            f"(see {PROG} --help)"
        )
    if namespace.socket_group is not None and namespace.socket_path is None:
        raise UsageError(
            "--socket-group needs --socket-path=PATH, the socket that the daemon makes: set the "
            f"group of an inherited socket where it is made (see {PROG} --help)"
        )
    engine = _engine(namespace.debug, environment)

    from vhost_rpmb.daemon.server import Options

    return Options(
        flash_path=namespace.flash_path,
        socket_path=namespace.socket_path,
        socket_group=namespace.socket_group,
        fd=namespace.fd,
        key_path=namespace.key_path,
        key_set=namespace.key_set,
        initial_counter=namespace.initial_counter,
        state_path=namespace.state_path,
        max_write_blocks=namespace.max_write_blocks,
        max_read_blocks=namespace.max_read_blocks,
        poll_us=namespace.poll_us,
        strict=namespace.strict,
        once=namespace.once,
        sandbox=namespace.sandbox == "on",
        engine=engine,
        verbosity=max(namespace.verbose, DEBUG_VERBOSITY if namespace.debug else 0),
    )


def _fail(message: str, status: int) -> int:
    """Print the one line that says why the daemon ends, and return the exit status."""
    from vhost_rpmb.daemon.notify import priority

    print(f"{priority(3)}{PROG}: error: {' '.join(message.splitlines())}", file=sys.stderr)
    return status


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the options in `argv` (default: the process's own).

    Returns the exit status: 0 after a clean end, 1 for what goes wrong with the device's state or
    the machine, 2 for a wrong option or a file that cannot serve its purpose.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "--print-capabilities" in arguments:
        import json

        print(json.dumps(CAPABILITIES))
        return 0
    gc.disable()  # what imports make stays; looking through it would take 5 % of the start
    try:
        options = parse_options(arguments, os.environ)

        from vhost_rpmb.daemon import server as daemon

        gc.enable()
        daemon.run(options)
    except OperatorError as error:
        return _fail(str(error), error.exit_status)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror or error}", OperatorError.exit_status)
    except KeyboardInterrupt:
        return 130  # before the daemon took over SIGINT: what a shell reports for it
    finally:
        gc.enable()
    return 0
