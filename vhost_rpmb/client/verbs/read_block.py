# SPDX-License-Identifier: Apache-2.0
"""``read-block``: requests DATA_READ for a number of blocks."""

import argparse

from vhost_rpmb.client.arguments import add_address, add_out_file, blocks
from vhost_rpmb.client.device import read_into_file
from vhost_rpmb.client.result import Result

HELP = "read blocks into a file, which is replaced"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_address(parser)
    parser.add_argument("count", metavar="COUNT", type=blocks, help="how many blocks")
    add_out_file(parser)


def run(arguments: argparse.Namespace) -> Result:
    """Read COUNT blocks into OUTFILE."""
    return read_into_file(arguments)
