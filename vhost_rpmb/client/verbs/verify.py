# SPDX-License-Identifier: Apache-2.0
"""``verify``: the files of a device."""

import argparse

from vhost_rpmb.client.arguments import add_device_files
from vhost_rpmb.client.report import report_files
from vhost_rpmb.client.result import Result

HELP = "check the files of a device that is not running, and change nothing"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_device_files(parser, required=True)


def run(arguments: argparse.Namespace) -> Result:
    """Verify the files of a device."""
    return report_files(arguments)
