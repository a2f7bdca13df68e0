# SPDX-License-Identifier: Apache-2.0
"""``load``: as many requests DATA_WRITE as a file needs."""

import argparse

from vhost_rpmb.client.arguments import MAX_BLOCKS, add_address_option, add_data_file
from vhost_rpmb.client.device import (
    MAX_REQUEST_BLOCKS,
    check_range,
    connect,
    data_and_key,
    progress,
)
from vhost_rpmb.client.files import warn
from vhost_rpmb.client.result import Result
from vhost_rpmb.rpmb import spec

HELP = "write a file's blocks, in as many requests as needed"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_address_option(parser)
    add_data_file(parser, "the device's capacity")


def run(arguments: argparse.Namespace) -> Result:
    """Write the blocks of DATAFILE; report the number written if that is interrupted."""
    data, key = data_and_key(arguments, MAX_BLOCKS)
    count = len(data) // spec.BLOCK_SIZE
    written = 0
    with connect(arguments, key) as client:
        limit = client.config.max_wr_cnt or MAX_REQUEST_BLOCKS
        check_range(client, arguments.address, count)
        counter = client.read_counter()
        with progress(count) as advance:
            try:
                while written < count:
                    size = min(limit, count - written)
                    part = data[written * spec.BLOCK_SIZE : (written + size) * spec.BLOCK_SIZE]
                    counter = client.write(arguments.address + written, part, counter)
                    written += size
                    advance(size)
            except BaseException:
                warn(f"{written} of {count} blocks were written, from address {arguments.address}")
                raise
    return Result({"address": arguments.address, "blocks": count, "write_counter": counter})
