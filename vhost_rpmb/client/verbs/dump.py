# SPDX-License-Identifier: Apache-2.0
"""``dump``: requests DATA_READ for the whole device."""

import argparse

from vhost_rpmb.client.arguments import add_address_option, add_out_file, blocks
from vhost_rpmb.client.device import read_into_file
from vhost_rpmb.client.result import Result

HELP = "read the whole device, or a range of it, into a file"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_address_option(parser)
    parser.add_argument(
        "--count",
        metavar="COUNT",
        type=blocks,
        help="how many blocks; default: all that follow",
    )
    add_out_file(parser)


def run(arguments: argparse.Namespace) -> Result:
    """Read blocks from --address on into OUTFILE."""
    return read_into_file(arguments)
