# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vhost-user-rpmb``: parsed and validated into ``Options``.

Everything that the options alone decide is checked here; a file is checked where it is opened. The
parser has every default value. Modules that take time to import are imported after the options are
validated. The man page is made from ``build_parser()`` at build time, with nothing but the standard
library installed.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Callable, Mapping, Sequence

from vhost_rpmb import __version__
from vhost_rpmb.arguments import Parser, nearest, path_argument
from vhost_rpmb.errors import OperatorError, UsageError
from vhost_rpmb.rpmb.spec import MAX_WRITE_COUNTER
from vhost_rpmb.typed import TYPE_CHECKING
from vhost_rpmb.virtio import features

if TYPE_CHECKING:
    from vhost_rpmb.daemon.server import Options
    from vhost_rpmb.injection.script import Script

PROG = "vhost-user-rpmb"

DESCRIPTION = """\
Serve a virtio RPMB (replay protected memory block) device to a virtual machine over vhost-user.

A virtual machine monitor, such as QEMU, connects to the socket and hands over a virtqueue and the
guest's memory. Writes are authenticated with a key that is programmed once and cannot be read
back, and protected against replay by a write counter that only increases. A write is acknowledged
only after data and counter are durable.

One daemon serves one image to one front-end at a time. It stays in the foreground, logs to
standard error, and ends cleanly on SIGTERM and SIGINT.
"""

ENGINE_VARIABLE = "VHOST_RPMB_ENGINE"
DEBUG_VERBOSITY = 3
SERVICE_VARIABLES = ("INVOCATION_ID", "LISTEN_FDS")  # of a service manager

MAX_FD = 0x7FFF_FFFF
MAX_BLOCKS = 255  # max_wr_cnt and max_rd_cnt have 8 bits
MAX_POLL_US = 10_000  # the longest delay of a signal
MAX_GID = 0xFFFF_FFFE  # chown() takes the next number for "unchanged"
MAX_DIGITS = 10  # of a number

# vhost-user "Backend program conventions". QEMU's vhost-user.json has no type for this device;
# docs/decisions/0003-capabilities-type.md explains the choice.
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
    """Return the ID of the group with this name or, if there is none, with this number."""
    import grp  # imported lazily: few starts name a group

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) <= MAX_GID:
            return int(text)
    raise argparse.ArgumentTypeError(
        f"expected a group name or number, found {text!r}: create it with groupadd or name another"
    )


def _virtio_features(text: str) -> int:
    """Return the feature bits to offer: the default, changed by a list of +NAME and -NAME."""
    offered = features.DEFAULT
    for word in text.split(","):
        sign, name = (word[:1], word[1:]) if word[:1] in ("+", "-") else ("+", word)
        bit = features.OPTIONAL.get(name)
        if bit is None:
            near = nearest(name, features.OPTIONAL)
            raise argparse.ArgumentTypeError(
                f"expected +NAME or -NAME, separated by commas, with NAME one of "
                f"{', '.join(features.OPTIONAL)}, found {word!r}"
                + (f"; did you mean {near}?" if near else "")
            )
        offered = offered | bit if sign == "+" else offered & ~bit
    try:
        features.check(offered)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{error}: add +indirect-desc or -in-order") from None
    return offered


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the man page is made from it."""
    parser = Parser(prog=PROG, description=DESCRIPTION)
    add = parser.add_argument
    add(
        "-V",
        "--version",
        action="version",
        version=f"{PROG} {__version__}",
        help="print the version and exit",
    )
    add("-v", "--verbose", action="count", default=0, help="log more; may be repeated")
    add("--debug", action="store_true", help="log everything; use the pure-Python engine")
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
        help="accept on a listening UNIX socket inherited as FDNUM (a connected socket is served, "
        "and the daemon ends when it disconnects); not with --socket-path",
    )
    add(
        "--socket-group",
        metavar="GROUP",
        type=_group,
        help="group, a name or a number, that may also connect to the socket of --socket-path: the "
        "socket gets mode 0660; default: only the daemon's user, mode 0600",
    )
    home = parser.add_mutually_exclusive_group(required=True)
    home.add_argument(
        "--flash-path",
        metavar="PATH",
        type=path_argument,
        help="raw backing image: a multiple of 128 KiB, up to 32 MiB, of which the first 16 MiB "
        "are served; not with --store",
    )
    home.add_argument(
        "--store",
        metavar="etcd:CONFIG",
        type=path_argument,
        help="serve a device whose state hosts share: in etcd, as the TOML file CONFIG says; not "
        "with --flash-path and other options about files",
    )
    add("--device", metavar="NAME", help="the device in the store of --store; required with it")
    add(
        "--take-over",
        metavar="expired|now|never",
        choices=("expired", "now", "never"),
        default="expired",
        help="a device of --store that another daemon owns: expired: wait until that daemon has "
        "not renewed its lease; never: do not start; now: take it over at once, only if that "
        "daemon is known to be dead; default %(default)s",
    )
    add(
        "--key-path",
        metavar="PATH",
        type=path_argument,
        help="32-byte key file; without --key-set, the file that stores a key programmed by the "
        "guest; default: the key is stored in the state database",
    )
    add(
        "--key-set",
        action="store_true",
        help="use the key in --key-path as programmed: the guest cannot program one",
    )
    add(
        "--initial-counter",
        metavar="N",
        type=_number(0, MAX_WRITE_COUNTER),
        help=f"initial write counter of a new device, 0 to {MAX_WRITE_COUNTER}; default 0; ignored "
        "if a counter is stored; required to create a new device from an image that holds data",
    )
    add(
        "--print-capabilities",
        action="store_true",
        help="print the capabilities of this back-end as JSON (vhost-user back-end convention) and "
        "exit; other options are ignored",
    )
    add(
        "--state-path",
        metavar="PATH",
        type=path_argument,
        help="state database; default: the flash path, symbolic links resolved, with .state "
        "appended",
    )
    add(
        "--max-write-blocks",
        metavar="N",
        type=_number(1, MAX_BLOCKS),
        default=32,
        help=f"maximum number of 256-byte blocks in one write, 1 to {MAX_BLOCKS}; "
        "default %(default)s",
    )
    add(
        "--max-read-blocks",
        metavar="N",
        type=_number(0, MAX_BLOCKS),
        default=MAX_BLOCKS,
        help=f"maximum number of 256-byte blocks in one read, 1 to {MAX_BLOCKS}, or 0 for the room "
        "in the answer, up to 2048; default %(default)s",
    )
    add(
        "--poll-us",
        metavar="N",
        type=_number(0, MAX_POLL_US),
        default=64,
        help=f"maximum time of busy polling for the next request, 0 to {MAX_POLL_US} microseconds; "
        "the daemon polls only while requests arrive that fast; 0 disables polling; "
        "default %(default)s",
    )
    add(
        "--virtio-features",
        metavar="[+|-]NAME,...",
        type=_virtio_features,
        default=features.DEFAULT,
        help=f"virtio features to offer (+NAME, NAME) or not (-NAME), for tests and measurements: "
        f"{', '.join(features.OPTIONAL)}; in-order only together with indirect-desc; default: "
        + ",".join(
            f"{'+' if bit & features.DEFAULT else '-'}{name}"
            for name, bit in features.OPTIONAL.items()
        ),
    )
    add(
        "--strict",
        action="store_true",
        help="follow the letter of the virtio specification, which deployed software may reject: "
        "a block count of 0 is always a general failure, and an expired write counter is answered "
        "with the bare result 0x80",
    )
    add(
        "--once",
        action="store_true",
        help="end when the first front-end disconnects; default: serve the next one",
    )
    add(
        "--sandbox",
        metavar="on|off",
        choices=("on", "off"),
        default="on",
        help="off: keep access to other files, new sockets and other programs, for debugging; on: "
        "give it up before the first front-end is served; default %(default)s",
    )
    add(
        "--inject",
        metavar="FILE",
        type=path_argument,
        help="inject faults, for tests of firmware: the TOML file FILE has rules about failing, "
        "late, lost and corrupted answers; not with --store, and under a service manager only with "
        "--debug",
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


def parse_options(arguments: Sequence[str], environment: Mapping[str, str]) -> Options:
    """Return the options in `arguments` (without the program's name), validated.

    Each field of `Options` is the value that the parser stores under the same name. Raises
    `UsageError` for a wrong option, and `SystemExit` after --help and --version.
    """
    namespace = build_parser().parse_args(arguments)
    if namespace.key_set and namespace.key_path is None:
        raise UsageError(
            "--key-set needs --key-path=PATH, the file that holds the 32-byte key "
            f"(see {PROG} --help)"
        )
    if namespace.socket_group is not None and namespace.socket_path is None:
        raise UsageError(
            "--socket-group needs --socket-path=PATH, the socket that the daemon creates: set the "
            f"group of an inherited socket where it is created (see {PROG} --help)"
        )
    _check_home(namespace)
    values = vars(namespace) | {
        "inject": _script(namespace, environment),
        "engine": _engine(namespace.debug, environment),
        "sandbox": namespace.sandbox == "on",
        "verbosity": max(namespace.verbose, DEBUG_VERBOSITY if namespace.debug else 0),
    }

    from vhost_rpmb.daemon.server import Options

    return Options(**{name: values[name] for name in Options._fields})


def _check_home(namespace: argparse.Namespace) -> None:
    """Check the options about the home of the state. Raises UsageError."""
    if namespace.store is None:
        if namespace.device is not None:
            raise UsageError(f"--device needs --store=etcd:CONFIG (see {PROG} --help)")
        return
    if not namespace.device:
        raise UsageError(f"--store needs --device=NAME, the device to serve (see {PROG} --help)")
    for name in ("key_path", "state_path", "initial_counter"):
        if getattr(namespace, name) is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is about files: leave it out, or name the image with"
                f" --flash-path in place of --store (see {PROG} --help)"
            )


def _script(namespace: argparse.Namespace, environment: Mapping[str, str]) -> Script | None:
    """Return the script of --inject, which is refused with what is a sign of production."""
    if namespace.inject is None:
        return None
    if namespace.store is not None:
        raise UsageError(
            "--inject is for tests, not for a device that hosts share: leave it out, or name an "
            f"image with --flash-path in place of --store (see {PROG} --help)"
        )
    if environment.get("FDSTORE"):
        raise UsageError(
            "--inject is for tests: expected no descriptor store of a service manager, found "
            "FDSTORE in the environment: remove --inject or set FileDescriptorStoreMax=0"
        )
    signs = [name for name in SERVICE_VARIABLES if environment.get(name)]
    # A test suite that waits for the start has an abstract socket, as RunningDevice.
    if environment.get("NOTIFY_SOCKET", "@")[:1] != "@":
        signs.append("NOTIFY_SOCKET")
    if signs and not namespace.debug:
        raise UsageError(
            f"--inject is for tests: expected a start without a service manager, found {signs[0]} "
            "in the environment: remove --inject or, if this is a test, remove the variable or add "
            "--debug"
        )
    from vhost_rpmb.injection.script import load  # imported lazily: for tests only

    return load(namespace.inject)


def _fail(message: str, status: int) -> int:
    from vhost_rpmb import log  # imported lazily: not needed for --help

    return log.fatal(PROG, message, status)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the options in `argv` (default: the process's own).

    Returns the exit status: 0 after a clean end, 1 for an error of the device's state or of the
    machine, 2 for a wrong option or an unsuitable file, 3 if another daemon owns the device now.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "--print-capabilities" in arguments:
        import json

        print(json.dumps(CAPABILITIES))
        return 0
    gc.disable()  # objects made by imports live on; scanning them takes 5 % of the start
    try:
        options = parse_options(arguments, os.environ)

        from vhost_rpmb import log
        from vhost_rpmb.daemon import server

        gc.enable()
        log.configure(PROG, options.verbosity)
        server.run(options)
    except OperatorError as error:
        return _fail(str(error), error.exit_status)
    except OSError as error:
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{error.strerror or error}", OperatorError.exit_status)
    except KeyboardInterrupt:
        return 130  # before the daemon handles SIGINT: the status that a shell reports for it
    finally:
        gc.enable()
    return 0
