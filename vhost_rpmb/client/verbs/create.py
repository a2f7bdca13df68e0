# SPDX-License-Identifier: Apache-2.0
"""``create``: the files of a new device."""

import argparse
import os
from contextlib import ExitStack

from vhost_rpmb.arguments import path_argument
from vhost_rpmb.client.arguments import add_size
from vhost_rpmb.client.files import create_file, create_folder
from vhost_rpmb.client.result import Result
from vhost_rpmb.rpmb import spec

HELP = "create the sparse image of a new device"
_IMAGE_NAME = "rpmb.img"  # in a folder of its own


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    place = parser.add_mutually_exclusive_group(required=True)
    place.add_argument(
        "image", metavar="IMAGE", type=path_argument, nargs="?", help="the image; a new file"
    )
    place.add_argument(
        "--folder",
        metavar="DIR",
        type=path_argument,
        help=f"create a folder for the device, mode 0700, with {_IMAGE_NAME} in it",
    )
    add_size(parser)
    parser.add_argument(
        "--random-key",
        metavar="PATH",
        type=path_argument,
        help="also create a key file with a random key, mode 0600",
    )


def run(arguments: argparse.Namespace) -> Result:
    """Create the image, with --folder its folder and with --random-key a key file, or nothing."""
    image, key_path = arguments.image, arguments.random_key
    with ExitStack() as undo:
        if arguments.folder is not None:
            create_folder(arguments.folder)
            undo.callback(os.rmdir, arguments.folder)
            image = os.path.join(arguments.folder, _IMAGE_NAME)
        if key_path is not None:
            create_file(key_path, os.urandom(spec.KEY_SIZE))
            undo.callback(os.unlink, key_path)
        create_file(image, b"", arguments.size)
        undo.pop_all()
    return Result({"image": image, "size": arguments.size, "key_file": key_path})
