# SPDX-License-Identifier: Apache-2.0
"""``info``: a device through its daemon, or its files."""

import argparse

from vhost_rpmb.client.arguments import add_device_files, add_key_file
from vhost_rpmb.client.device import connect
from vhost_rpmb.client.files import PROG, read_key
from vhost_rpmb.client.report import report_files
from vhost_rpmb.client.result import Result
from vhost_rpmb.driver.errors import RpmbResultError
from vhost_rpmb.errors import UsageError
from vhost_rpmb.rpmb import spec

HELP = "report on a device, through its daemon's socket or from its files"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the verb."""
    add_device_files(parser, required=False)
    add_key_file(
        parser, "the key; without it, the write counter is not authenticated", optional=True
    )


def run(arguments: argparse.Namespace) -> Result:
    """Report on a device."""
    if arguments.flash_path is not None:
        if arguments.key_file is not None:
            raise UsageError("KEYFILE needs --socket-path: use --key-path with --flash-path")
        return report_files(arguments)
    if arguments.socket_path is None:
        raise UsageError(
            "--socket-path=PATH of a running daemon or --flash-path=PATH is required"
            f" (see {PROG} info --help)"
        )
    key = None if arguments.key_file is None else read_key(arguments.key_file)
    counter: int | None = None
    with connect(arguments, key) as client:
        config = client.config
        try:
            counter = client.read_counter()
        except RpmbResultError as error:
            if error.result != spec.VIRTIO_RPMB_RES_NO_AUTH_KEY:
                raise
    values = {
        "size": config.blocks * spec.BLOCK_SIZE,
        "blocks": config.blocks,
        "max_write_blocks": config.max_wr_cnt,
        "max_read_blocks": config.max_rd_cnt,
        "key_programmed": counter is not None,
        "write_counter": counter,
        "verified": key is not None and counter is not None,
    }
    lines = [
        f"capacity: {values['size']} bytes, {config.blocks} blocks",
        f"limits: {config.max_wr_cnt} blocks per write, {config.max_rd_cnt} per read",
        f"key: {'not programmed' if counter is None else 'programmed'}",
    ]
    if counter is not None:
        trust = "" if key else " (not authenticated: no KEYFILE given)"
        lines.append(f"write counter: 0x{counter:08x}{trust}")
    return Result(values, lines)
