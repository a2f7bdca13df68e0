# SPDX-License-Identifier: Apache-2.0
"""``write-key``: the request PROGRAM_KEY."""

import argparse

from vhost_rpmb.client.arguments import add_key_file
from vhost_rpmb.client.device import connect
from vhost_rpmb.client.files import read_key
from vhost_rpmb.client.result import Result

HELP = "program the device's key, which is possible once"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_key_file(parser, "the key, 32 bytes")


def run(arguments: argparse.Namespace) -> Result:
    """Program the key."""
    key = read_key(arguments.key_file)
    with connect(arguments, None) as client:
        client.program_key(key)
    return Result({"key_programmed": True})
