# SPDX-License-Identifier: Apache-2.0
"""``write-block``: one request DATA_WRITE."""

import argparse

from vhost_rpmb.client.arguments import add_address, add_data_file
from vhost_rpmb.client.device import MAX_REQUEST_BLOCKS, check_range, connect, data_and_key
from vhost_rpmb.client.files import name_of
from vhost_rpmb.client.result import Result
from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec

HELP = "write blocks in one atomic, authenticated request"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_address(parser)
    add_data_file(parser, "the device's limit for one write")


def run(arguments: argparse.Namespace) -> Result:
    """Write the blocks of DATAFILE in one request."""
    data, key = data_and_key(arguments, MAX_REQUEST_BLOCKS)
    count = len(data) // spec.BLOCK_SIZE
    with connect(arguments, key) as client:
        limit = client.config.max_wr_cnt or MAX_REQUEST_BLOCKS
        if count > limit:
            raise UsageError(
                f"{name_of(arguments.data_file)}: expected at most {limit} blocks of "
                f"{spec.BLOCK_SIZE} bytes, the device's limit for one write, found {count}: "
                "use load"
            )
        check_range(client, arguments.address, count)
        counter = client.write(arguments.address, data)
    return Result({"address": arguments.address, "blocks": count, "write_counter": counter})
