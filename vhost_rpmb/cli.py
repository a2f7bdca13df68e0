# SPDX-License-Identifier: Apache-2.0
"""The command line of ``vhost-user-rpmb``: parsed and validated into ``Options``.

Everything that the options alone decide is checked here; a file is checked where it is opened.
Modules that take time to import are imported after the options are validated, those for errors and
help when they are needed. The man page is made from ``build_parser()`` at build time, with nothing
but the standard library installed.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Mapping, Sequence

from vhost_rpmb import __version__
from vhost_rpmb.errors import OperatorError, UsageError
from vhost_rpmb.options import GROUPS, OPTIONS, parse
from vhost_rpmb.typed import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from typing import Any

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


# vhost-user "Backend program conventions". QEMU's vhost-user.json has no type for this device;
# docs/decisions/0003-capabilities-type.md explains the choice.
CAPABILITIES = {"type": "rpmb", "features": ["migration-shared", "migration-copy"]}


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command line; the man page is made from it."""
    # Imported lazily: a start with a correct command line does without.
    from vhost_rpmb.arguments import Parser, converted

    parser = Parser(prog=PROG, description=DESCRIPTION)
    parser.add_argument(
        "-V",
        "--version",
        action="version",
        version=f"{PROG} {__version__}",
        help="print the version and exit",
    )
    groups = {group: parser.add_mutually_exclusive_group(required=True) for group in GROUPS}
    for option in OPTIONS:
        add = groups[option.group].add_argument if option.group else parser.add_argument
        common: dict[str, Any] = {"default": option.default, "help": option.help}
        if option.short:
            add(option.short, option.name, action="count", **common)
        elif option.convert is None:
            add(option.name, action="store_true", **common)
        else:
            add(
                option.name,
                type=converted(option.convert),
                metavar=option.metavar,
                choices=option.choices or None,
                **common,
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
    values = parse(arguments) or vars(build_parser().parse_args(arguments))
    if values["key_set"] and values["key_path"] is None:
        raise UsageError(
            "--key-set needs --key-path=PATH, the file that holds the 32-byte key "
            f"(see {PROG} --help)"
        )
    if values["socket_group"] is not None and values["socket_path"] is None:
        raise UsageError(
            "--socket-group needs --socket-path=PATH, the socket that the daemon creates: set the "
            f"group of an inherited socket where it is created (see {PROG} --help)"
        )
    _check_home(values)
    _check_migration(values)
    values |= {
        "inject": _script(values, environment),
        "engine": _engine(values["debug"], environment),
        "sandbox": values["sandbox"] == "on",
        "verbosity": max(values["verbose"], DEBUG_VERBOSITY if values["debug"] else 0),
    }

    if "vhost_rpmb.daemon.server" not in sys.modules:
        # First: its imports leave 0.25 MiB of garbage, which the following ones use.
        import sqlite3  # noqa: F401

        gc.collect()
    from vhost_rpmb.daemon.server import Options

    return Options(**{name: values[name] for name in Options._fields})


def _check_home(values: Mapping[str, Any]) -> None:
    """Check the options about the home of the state. Raises UsageError."""
    if values["store"] is None:
        if values["device"] is not None:
            raise UsageError(f"--device needs --store=etcd:CONFIG (see {PROG} --help)")
        return
    if not values["device"]:
        raise UsageError(f"--store needs --device=NAME, the device to serve (see {PROG} --help)")
    for name in ("key_path", "state_path", "initial_counter"):
        if values[name] is not None:
            raise UsageError(
                f"--{name.replace('_', '-')} is about files: leave it out, or name the image with"
                f" --flash-path in place of --store (see {PROG} --help)"
            )


def _check_migration(values: Mapping[str, Any]) -> None:
    """Check the options about migration. Raises UsageError."""
    mode = values["migration"]
    if mode == "copy" and values["store"] is not None:
        raise UsageError(
            "--migration=copy is for files: expected --migration=shared for a device that hosts"
            f" share (see {PROG} --help)"
        )
    for name in ("fence_path", "migration_key"):
        if values[name] is not None and mode != "copy":
            raise UsageError(
                f"--{name.replace('_', '-')} needs --migration=copy (see {PROG} --help)"
            )
    if values["incoming"] and mode == "off":
        raise UsageError(f"--incoming needs --migration=shared or copy (see {PROG} --help)")
    if mode != "off" and values["inject"] is not None:
        raise UsageError(
            f"--inject is for tests: leave it out, or leave out --migration (see {PROG} --help)"
        )


def _script(values: Mapping[str, Any], environment: Mapping[str, str]) -> Script | None:
    """Return the script of --inject, which is refused with what is a sign of production."""
    if values["inject"] is None:
        return None
    if values["store"] is not None:
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
    if signs and not values["debug"]:
        raise UsageError(
            f"--inject is for tests: expected a start without a service manager, found {signs[0]} "
            "in the environment: remove --inject or, if this is a test, remove the variable or add "
            "--debug"
        )
    from vhost_rpmb.injection.script import load  # imported lazily: for tests only

    return load(values["inject"])


def _fail(message: str, status: int) -> int:
    from vhost_rpmb import log  # imported lazily: not needed for --help

    return log.fatal(PROG, message, status)


def _forget_wrapper() -> None:
    """Forget what pip's wrapper of this program has imported: the daemon uses that memory.

    The wrapper needs `re` for one line before `main` is called, and nothing here does.
    """
    wrapper = sys.modules["__main__"]
    if getattr(wrapper, "main", None) is not main or not hasattr(wrapper, "re"):
        return
    del wrapper.re
    for name in [*sys.modules]:
        if name.partition(".")[0] in ("re", "enum", "copyreg"):
            del sys.modules[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the daemon with the options in `argv` (default: the process's own).

    Returns the exit status: 0 after a clean end, 1 for an error of the device's state or of the
    machine, 2 for a wrong option or an unsuitable file, 3 if another daemon owns the device now or
    its store was restored from a backup.
    """
    arguments = sys.argv[1:] if argv is None else argv
    if "--print-capabilities" in arguments:
        import json

        print(json.dumps(CAPABILITIES))
        return 0
    gc.disable()  # objects made by imports live on; scanning them takes 5 % of the start
    _forget_wrapper()
    try:
        options = parse_options(arguments, os.environ)

        from vhost_rpmb import log
        from vhost_rpmb.daemon import server

        gc.freeze()  # what was imported stays: no collection looks at it again
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
