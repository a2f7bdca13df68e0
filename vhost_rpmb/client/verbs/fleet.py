# SPDX-License-Identifier: Apache-2.0
"""``fleet``: the devices of a store that hosts share, also while daemons serve them."""

import argparse
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING, NamedTuple

from vhost_rpmb.arguments import path_argument
from vhost_rpmb.client.arguments import add_device_files, add_size
from vhost_rpmb.client.device import progress
from vhost_rpmb.client.files import warn
from vhost_rpmb.client.result import Result
from vhost_rpmb.errors import StateError

if TYPE_CHECKING:
    from vhost_rpmb.storage.fleet.config import Config
    from vhost_rpmb.storage.fleet.layout import Owner
    from vhost_rpmb.storage.fleet.requests import Requests

HELP = "create, list, verify and move devices in a store that hosts share"

_Action = Callable[["Config", "Requests", argparse.Namespace], Result]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of the verb, each with its arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, title="actions")
    for name, (action, text, add_more) in _ACTIONS.items():
        command = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument(
            "config", metavar="CONFIG", type=path_argument, help="the configuration of the store"
        )
        for add in add_more:
            add(command)
        command.set_defaults(action=action)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("device", metavar="DEVICE", help="the name of the device")


def _add_optional_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "device", metavar="DEVICE", nargs="?", help="the name of a device; default: all devices"
    )


def _add_files(parser: argparse.ArgumentParser) -> None:
    add_device_files(parser, required=True)


def _add_new_files(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--flash-path",
        metavar="PATH",
        type=path_argument,
        required=True,
        help="the image, a new file; required",
    )
    parser.add_argument(
        "--state-path",
        metavar="PATH",
        type=path_argument,
        help=(
            "the state, a new file; default: the flash path, links resolved, with .state behind it"
        ),
    )


def _add_take_over(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--take-over",
        choices=("expired", "now", "never"),
        default="expired",
        help=(
            "with a daemon that owns the device: wait for the end of its lease, take the device at"
            " once (only if that daemon is dead), or refuse; default %(default)s"
        ),
    )


def run(arguments: argparse.Namespace) -> Result:
    """Connect to the store and do the work of the action."""
    # Imported lazily: the man page is made where only the standard library is installed.
    from vhost_rpmb.storage.fleet.config import load
    from vhost_rpmb.storage.fleet.requests import Requests

    config = load(arguments.config)
    action: _Action = arguments.action
    with closing(config.connect()) as engine:
        return action(config, Requests(engine), arguments)


def _create(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import create
    from vhost_rpmb.storage.fleet.layout import Keys

    keys = Keys(config.prefix, arguments.device)
    create(requests, keys, config.key_encryption_key(), arguments.size, "created")
    return Result({"device": arguments.device, "size": arguments.size})


def _list(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import list_devices

    found = [each._asdict() for each in list_devices(requests, config.prefix)]
    lines = [f"{each['device']}: write counter {each['counter']}, {_owner(each)}" for each in found]
    return Result({"devices": found}, lines)


def _info(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import describe
    from vhost_rpmb.storage.fleet.layout import Keys

    keys = Keys(config.prefix, arguments.device)
    found = describe(requests, keys, config.key_encryption_key())._asdict()
    return Result(
        found,
        [
            f"device:        {found['device']}",
            f"size:          {found['size']} bytes",
            f"write counter: {found['counter']}",
            f"key:           {'programmed' if found['programmed'] else 'not programmed'}",
            f"owner:         {_owner(found)}",
            f"quarantined:   {'yes' if found['quarantined'] else 'no'}",
        ],
    )


def _owner(fields: dict[str, object]) -> str:
    if fields["state"] != "active":
        return str(fields["state"])
    if not fields["alive"]:
        return "no running daemon"
    return f"process {fields['pid']} on host {fields['host']}"


def _verify(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import list_devices
    from vhost_rpmb.storage.fleet.layout import Keys
    from vhost_rpmb.storage.fleet.verification import verify

    kek = config.key_encryption_key()
    if arguments.device is not None:
        names = [arguments.device]
    else:
        listed = list_devices(requests, config.prefix)
        names = [each.device for each in listed if each.state == "active"]
    reports: list[dict[str, object]] = []
    lines: list[str] = []
    problems: list[StateError] = []
    with progress(len(names), "devices") as advance:
        for name in names:
            try:
                found = verify(requests, Keys(config.prefix, name), kek)
            except StateError as problem:
                problems.append(problem)
                reports.append({"device": name, "problem": str(problem)})
            else:
                reports.append(found._asdict() | {"problem": None})
                lines.append(f"{name}: write counter {found.counter}, {found.chunks} chunks")
            advance(1)
    error = None
    if len(names) == 1 and problems:
        error = problems[0]
    elif problems:
        lines += map(str, problems)
        error = StateError(f"{len(problems)} of {len(names)} devices cannot be verified")
    return Result({"devices": reports}, lines, error)


def _import(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.layout import Keys
    from vhost_rpmb.storage.paths import Paths
    from vhost_rpmb.storage.transfer import import_device

    paths = Paths.resolve(arguments.flash_path, arguments.state_path, arguments.key_path)
    keys, kek = Keys(config.prefix, arguments.device), config.key_encryption_key()
    found = import_device(requests, keys, kek, paths, warn=warn, progress=progress)
    return Result({"device": arguments.device, "size": found})


def _export(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.layout import Keys
    from vhost_rpmb.storage.fleet.opening import open_store
    from vhost_rpmb.storage.fleet.store import FleetStore
    from vhost_rpmb.storage.paths import Paths
    from vhost_rpmb.storage.transfer import export_device

    paths = Paths.resolve(arguments.flash_path, arguments.state_path)
    keys, kek = Keys(config.prefix, arguments.device), config.key_encryption_key()

    def take() -> FleetStore:
        return open_store(
            requests,
            keys,
            kek,
            witness_folder=config.witness,
            mode=arguments.take_over,
            lease_seconds=config.lease_seconds,
        )

    found = export_device(requests, keys, paths, take, progress=progress)
    return Result({"device": arguments.device, "image": paths.flash, "size": found})


def _take_over(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.layout import Keys
    from vhost_rpmb.storage.fleet.ownership import take_over
    from vhost_rpmb.storage.fleet.presence import Presence

    def say(owner: "Owner") -> None:
        warn(
            f"device {arguments.device} is owned by {owner}: waiting up to {config.lease_seconds}"
            " seconds for the end of its lease"
        )

    owned = take_over(
        requests,
        Keys(config.prefix, arguments.device),
        arguments.take_over,
        Presence(config.witness, arguments.device),
        lease_seconds=config.lease_seconds,
        waiting=say,
    )
    owned.release()
    return Result({"device": arguments.device, "epoch": owned.owner.epoch})


def _quarantine(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import quarantine

    quarantine(requests, config.prefix)
    return Result({"prefix": config.prefix.decode()})


def _accept(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import accept
    from vhost_rpmb.storage.fleet.layout import Keys

    accept(requests, Keys(config.prefix, arguments.device), config.key_encryption_key())
    return Result({"device": arguments.device})


class _Row(NamedTuple):
    action: _Action
    help: str
    arguments: tuple[Callable[[argparse.ArgumentParser], None], ...] = ()


_ACTIONS = {
    "create": _Row(_create, "create a blank device", (_add_device, add_size)),
    "list": _Row(_list, "print write counter and owner of each device"),
    "info": _Row(_info, "print and authenticate the state of a device", (_add_device,)),
    "verify": _Row(
        _verify, "read and authenticate all that is stored of devices", (_add_optional_device,)
    ),
    "import": _Row(
        _import, "move a stopped device from files into the store", (_add_device, _add_files)
    ),
    "export": _Row(
        _export,
        "move a device from the store into new files",
        (_add_device, _add_new_files, _add_take_over),
    ),
    "take-over": _Row(
        _take_over,
        "fence the daemon that owns a device, and free it",
        (_add_device, _add_take_over),
    ),
    "quarantine": _Row(
        _quarantine, "refuse all devices until each is accepted, after a backup was restored"
    ),
    "accept": _Row(
        _accept, "declare the present state of a quarantined device the right one", (_add_device,)
    ),
}
