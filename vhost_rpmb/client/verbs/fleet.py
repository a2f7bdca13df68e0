# SPDX-License-Identifier: Apache-2.0
"""``fleet``: the devices of a store that hosts share, also while daemons serve them."""

import argparse
from collections.abc import Callable
from contextlib import closing
from typing import TYPE_CHECKING

from vhost_rpmb.arguments import path_argument
from vhost_rpmb.client.arguments import size
from vhost_rpmb.client.result import Result

if TYPE_CHECKING:
    from vhost_rpmb.storage.fleet.config import Config
    from vhost_rpmb.storage.fleet.requests import Requests

HELP = "create, list and release devices in a store that hosts share"

_Action = Callable[["Config", "Requests", argparse.Namespace], Result]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the actions of the verb, each with its arguments."""
    actions = parser.add_subparsers(metavar="ACTION", required=True, title="actions")
    for name, (action, text, with_device) in _ACTIONS.items():
        command = actions.add_parser(name, help=text, description=f"{text[0].upper()}{text[1:]}.")
        command.add_argument(
            "config", metavar="CONFIG", type=path_argument, help="the configuration of the store"
        )
        if with_device:
            command.add_argument("device", metavar="DEVICE", help="the name of the device")
        if action is _create:
            command.add_argument(
                "--size",
                metavar="SIZE",
                type=size,
                default="128K",
                help="a multiple of 128K, up to 16M; default %(default)s",
            )
        command.set_defaults(action=action)


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
    if not fields["alive"]:
        return "no running daemon"
    return f"process {fields['pid']} on host {fields['host']}"


def _quarantine(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import quarantine

    quarantine(requests, config.prefix)
    return Result({"prefix": config.prefix.decode()})


def _accept(config: "Config", requests: "Requests", arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.fleet.administration import accept
    from vhost_rpmb.storage.fleet.layout import Keys

    accept(requests, Keys(config.prefix, arguments.device), config.key_encryption_key())
    return Result({"device": arguments.device})


# Of each action: its function, a line of --help, whether it is about one device.
_ACTIONS: dict[str, tuple[_Action, str, bool]] = {
    "create": (_create, "create a blank device", True),
    "list": (_list, "print write counter and owner of each device", False),
    "info": (_info, "print and authenticate the state of a device", True),
    "quarantine": (
        _quarantine,
        "refuse all devices until each is accepted, after a backup was restored",
        False,
    ),
    "accept": (_accept, "declare the present state of a quarantined device the right one", True),
}
