# SPDX-License-Identifier: Apache-2.0
"""The verbs of ``vhost-rpmb-client``, one module each, in the order of ``--help``.

A module has ``HELP``, ``add_arguments`` and ``run``; its name is the verb, with _ for -. To add a
verb, write its module and put it into `VERBS`. Does not belong here: code that several verbs share
(`vhost_rpmb.client.arguments`, `device`, `files`, `report`).
"""

import argparse
from typing import Protocol

from vhost_rpmb.client.result import Result
from vhost_rpmb.client.verbs import (
    create,
    dump,
    fleet,
    info,
    load,
    read_block,
    read_counter,
    release,
    verify,
    write_block,
    write_key,
)

__all__ = ["VERBS", "Verb"]


class Verb(Protocol):
    """A module of this folder."""

    __name__: str
    HELP: str  # a line of --help, in lower case and without a full stop

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the arguments of the verb to its own parser."""

    def run(self, arguments: argparse.Namespace) -> Result:
        """Do the work of the verb, with the arguments as parsed, and return its report."""


VERBS: tuple[Verb, ...] = (
    create,
    info,
    write_key,
    read_counter,
    write_block,
    read_block,
    load,
    dump,
    verify,
    release,
    fleet,
)
