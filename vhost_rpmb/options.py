# SPDX-License-Identifier: Apache-2.0
"""The options of ``vhost-user-rpmb`` as a table: names, values, defaults and help.

`vhost_rpmb.cli` makes the argument parser of it. `parse` reads a correct command line without that:
`argparse` and the modules that it imports take 1 MiB of memory in each daemon, and 6 ms of a start.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from vhost_rpmb.rpmb.spec import MAX_WRITE_COUNTER
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple
from vhost_rpmb.values import MAX_DIGITS, WrongValue, number, path
from vhost_rpmb.virtio import features

if TYPE_CHECKING:
    from typing import Any

__all__ = ["GROUPS", "OPTIONS", "Option", "parse"]

MAX_FD = 0x7FFF_FFFF
MAX_BLOCKS = 255  # max_wr_cnt and max_rd_cnt have 8 bits
MAX_POLL_US = 10_000  # the longest delay of a signal
MAX_GID = 0xFFFF_FFFE  # chown() takes the next number for "unchanged"


class Option(NamedTuple):
    """One option. Exactly one of those with the same ``group`` is given."""

    name: str
    help: str
    convert: Callable[[str], object] | None = None  # of its value; None: a flag
    default: object = None
    metavar: str | None = None
    choices: tuple[str, ...] = ()
    group: str = ""
    short: str = ""  # another name, of a flag that counts

    @property
    def field(self) -> str:
        """The name under which its value is stored."""
        return self.name.removeprefix("--").replace("-", "_")


def _flag(name: str, help: str) -> Option:
    """Return an option without a value."""
    return Option(name, help, default=False)


def _group(text: str) -> int:
    """Return the ID of the group with this name or, if there is none, with this number."""
    import grp  # imported lazily: few starts name a group

    try:
        return grp.getgrnam(text).gr_gid
    except KeyError:
        if text.isascii() and text.isdigit() and len(text) <= MAX_DIGITS and int(text) <= MAX_GID:
            return int(text)
    raise WrongValue(
        f"expected a group name or number, found {text!r}: create it with groupadd or name another"
    )


def _virtio_features(text: str) -> int:
    """Return the feature bits to offer: the default, changed by a list of +NAME and -NAME."""
    offered = features.DEFAULT
    for word in text.split(","):
        sign, name = (word[:1], word[1:]) if word[:1] in ("+", "-") else ("+", word)
        bit = features.OPTIONAL.get(name)
        if bit is None:
            from vhost_rpmb.arguments import nearest  # imported lazily: for an error

            near = nearest(name, features.OPTIONAL)
            raise WrongValue(
                f"expected +NAME or -NAME, separated by commas, with NAME one of "
                f"{', '.join(features.OPTIONAL)}, found {word!r}"
                + (f"; did you mean {near}?" if near else "")
            )
        offered = offered | bit if sign == "+" else offered & ~bit
    try:
        features.check(offered)
    except ValueError as error:
        raise WrongValue(f"{error}: add +indirect-desc or -in-order") from None
    return offered


OPTIONS = (
    Option("--verbose", short="-v", default=0, help="log more; may be repeated"),
    _flag("--debug", help="log everything; use the pure-Python engine"),
    Option(
        "--socket-path",
        group="socket",
        metavar="PATH",
        convert=path,
        help="listen on a UNIX stream socket at PATH; not with --fd",
    ),
    Option(
        "--fd",
        group="socket",
        metavar="FDNUM",
        convert=number(0, MAX_FD),
        help="accept on a listening UNIX socket inherited as FDNUM (a connected socket is served, "
        "and the daemon ends when it disconnects); not with --socket-path",
    ),
    Option(
        "--socket-group",
        metavar="GROUP",
        convert=_group,
        help="group, a name or a number, that may also connect to the socket of --socket-path: the "
        "socket gets mode 0660; default: only the daemon's user, mode 0600",
    ),
    Option(
        "--flash-path",
        group="home",
        metavar="PATH",
        convert=path,
        help="raw backing image: a multiple of 128 KiB, up to 32 MiB, of which the first 16 MiB "
        "are served; not with --store",
    ),
    Option(
        "--store",
        group="home",
        metavar="etcd:CONFIG",
        convert=path,
        help="serve a device whose state hosts share: in etcd, as the TOML file CONFIG says; not "
        "with --flash-path and other options about files",
    ),
    Option(
        "--device",
        convert=str,
        metavar="NAME",
        help="the device in the store of --store; required with it",
    ),
    Option(
        "--take-over",
        metavar="expired|now|never",
        convert=str,
        choices=("expired", "now", "never"),
        default="expired",
        help="a device of --store that another daemon owns: expired: wait until that daemon has "
        "not renewed its lease; never: do not start; now: take it over at once, only if that "
        "daemon is known to be dead; default %(default)s",
    ),
    Option(
        "--key-path",
        metavar="PATH",
        convert=path,
        help="32-byte key file; without --key-set, the file that stores a key programmed by the "
        "guest; default: the key is stored in the state database",
    ),
    _flag(
        "--key-set",
        help="use the key in --key-path as programmed: the guest cannot program one",
    ),
    Option(
        "--initial-counter",
        metavar="N",
        convert=number(0, MAX_WRITE_COUNTER),
        help=f"initial write counter of a new device, 0 to {MAX_WRITE_COUNTER}; default 0; ignored "
        "if a counter is stored; required to create a new device from an image that holds data",
    ),
    _flag(
        "--print-capabilities",
        help="print the capabilities of this back-end as JSON (vhost-user back-end convention) and "
        "exit; other options are ignored",
    ),
    Option(
        "--state-path",
        metavar="PATH",
        convert=path,
        help="state database; default: the flash path, symbolic links resolved, with .state "
        "appended",
    ),
    Option(
        "--max-write-blocks",
        metavar="N",
        convert=number(1, MAX_BLOCKS),
        default=32,
        help=f"maximum number of 256-byte blocks in one write, 1 to {MAX_BLOCKS}; "
        "default %(default)s",
    ),
    Option(
        "--max-read-blocks",
        metavar="N",
        convert=number(0, MAX_BLOCKS),
        default=MAX_BLOCKS,
        help=f"maximum number of 256-byte blocks in one read, 1 to {MAX_BLOCKS}, or 0 for the room "
        "in the answer, up to 2048; default %(default)s",
    ),
    Option(
        "--poll-us",
        metavar="N",
        convert=number(0, MAX_POLL_US),
        default=64,
        help=f"maximum time of busy polling for the next request, 0 to {MAX_POLL_US} microseconds; "
        "the daemon polls only while requests arrive that fast; 0 disables polling; "
        "default %(default)s",
    ),
    Option(
        "--virtio-features",
        metavar="[+|-]NAME,...",
        convert=_virtio_features,
        default=features.DEFAULT,
        help=f"virtio features to offer (+NAME, NAME) or not (-NAME), for tests and measurements: "
        f"{', '.join(features.OPTIONAL)}; in-order only together with indirect-desc; default: "
        + ",".join(
            f"{'+' if bit & features.DEFAULT else '-'}{name}"
            for name, bit in features.OPTIONAL.items()
        ),
    ),
    _flag(
        "--strict",
        help="follow the letter of the virtio specification, which deployed software may reject: "
        "a block count of 0 is always a general failure, and an expired write counter is answered "
        "with the bare result 0x80",
    ),
    _flag(
        "--once",
        help="end when the first front-end disconnects; default: serve the next one",
    ),
    Option(
        "--sandbox",
        metavar="on|off",
        convert=str,
        choices=("on", "off"),
        default="on",
        help="off: keep access to other files, new sockets and other programs, for debugging; on: "
        "give it up before the first front-end is served; default %(default)s",
    ),
    Option(
        "--migration",
        metavar="off|shared|copy",
        convert=str,
        choices=("off", "shared", "copy"),
        default="off",
        help="hand the device to the host that a virtual machine moves to: shared: both hosts see "
        "its files, or its store; copy: its state travels with the virtual machine; off: the "
        "front-end is not told that the device can move; default %(default)s",
    ),
    _flag(
        "--incoming",
        help="the device arrives from another host: serve nothing before; only with --migration",
    ),
    Option(
        "--fence-path",
        metavar="FOLDER",
        convert=path,
        help="a folder that all hosts see, where a host claims a device that moved: required to "
        "take it back after a failed migration; only with --migration=copy",
    ),
    Option(
        "--migration-key",
        metavar="PATH",
        convert=path,
        help="32-byte key file that both hosts have: the device's key travels sealed with it; "
        "default: only a fingerprint travels, and the other host has the key; only with "
        "--migration=copy",
    ),
    Option(
        "--inject",
        metavar="FILE",
        convert=path,
        help="inject faults, for tests of firmware: the TOML file FILE has rules about failing, "
        "late, lost and corrupted answers; not with --store, and under a service manager only with "
        "--debug",
    ),
)

GROUPS = tuple({option.group: None for option in OPTIONS if option.group})
_BY_NAME = {name: option for option in OPTIONS for name in (option.name, option.short) if name}


def parse(arguments: Sequence[str]) -> dict[str, Any] | None:
    """Return the values by field; None for what only the argument parser understands.

    That is a wrong command line, so that errors have one home, and options that print and exit.
    """
    values: dict[str, Any] = {option.field: option.default for option in OPTIONS}
    given: dict[str, set[str]] = {group: set() for group in GROUPS}
    words = iter(arguments)
    for word in words:
        name, equals, text = word.partition("=")
        option = _BY_NAME.get(name)
        if option is None or (equals and option.convert is None):
            return None
        if option.convert is None:
            values[option.field] = values[option.field] + 1 if option.short else True
            continue
        if not equals:
            text = next(words, "-")
            if text.startswith("-"):  # missing, or an option
                return None
        if option.choices and text not in option.choices:
            return None
        try:
            values[option.field] = option.convert(text)
        except WrongValue:
            return None
        if option.group:
            given[option.group].add(name)
    return values if all(len(names) == 1 for names in given.values()) else None
