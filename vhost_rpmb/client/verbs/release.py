# SPDX-License-Identifier: Apache-2.0
"""``release``: take back a device that was handed to another host."""

import argparse

from vhost_rpmb.arguments import path_argument
from vhost_rpmb.client.arguments import add_device_files
from vhost_rpmb.client.files import warn
from vhost_rpmb.client.result import Result

HELP = "take back a device that no other host uses, after a migration that failed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_device_files(parser, required=True)
    parser.add_argument(
        "--fence-path",
        metavar="FOLDER",
        type=path_argument,
        help="the fence folder of the daemon's --fence-path, which says whether another host was "
        "first; without it you say so: a device in use on two hosts is a replay",
    )


def run(arguments: argparse.Namespace) -> Result:
    """Take the device back."""
    from vhost_rpmb.migration.fence import Fence
    from vhost_rpmb.migration.release import release
    from vhost_rpmb.storage.paths import Paths

    paths = Paths.resolve(arguments.flash_path, arguments.state_path, arguments.key_path)
    fence = None if arguments.fence_path is None else Fence(arguments.fence_path)
    name, generation = release(paths, fence, warn)
    return Result(
        {"image": arguments.flash_path, "device": name, "generation": generation},
        [f"device {name} is active in its files, generation {generation}"],
    )
