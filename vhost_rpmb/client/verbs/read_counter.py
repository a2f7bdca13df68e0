# SPDX-License-Identifier: Apache-2.0
"""``read-counter``: the request GET_WRITE_COUNTER."""

import argparse

from vhost_rpmb.client.arguments import add_key_file
from vhost_rpmb.client.device import connect
from vhost_rpmb.client.files import read_optional_key, warn
from vhost_rpmb.client.result import Result
from vhost_rpmb.rpmb import spec

HELP = "print the write counter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_key_file(parser, "the key; without it, the answer is not authenticated", optional=True)


def run(arguments: argparse.Namespace) -> Result:
    """Read the write counter."""
    key = read_optional_key(arguments.key_file)
    with connect(arguments, key) as client:
        counter = client.read_counter()
    if counter == spec.MAX_WRITE_COUNTER:
        warn("the write counter has expired: no more writes are possible")
    return Result(
        {"write_counter": counter, "verified": key is not None},
        [f"Counter value: 0x{counter:08x}"],
    )
