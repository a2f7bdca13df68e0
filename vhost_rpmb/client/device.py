# SPDX-License-Identifier: Apache-2.0
"""What verbs share that use a daemon: the connection, its limits, whole reads, progress.

The driver is imported on connecting only: the command line has to work where only the standard
library is installed.
"""

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from vhost_rpmb.client.files import (
    PROG,
    STANDARD_STREAM,
    read_blocks,
    read_key,
    read_optional_key,
    write_file,
    write_stdout,
)
from vhost_rpmb.client.result import Result
from vhost_rpmb.errors import UsageError

if TYPE_CHECKING:
    from vhost_rpmb.driver.rpmb import RpmbClient

__all__ = [
    "MAX_REQUEST_BLOCKS",
    "check_range",
    "connect",
    "data_and_key",
    "progress",
    "read_into_file",
]

MAX_REQUEST_BLOCKS = 255  # max_wr_cnt and max_rd_cnt have 8 bits; 0 is no limit


def connect(arguments: argparse.Namespace, key: bytes | None) -> "RpmbClient":
    """Connect to the daemon that the options name."""
    from vhost_rpmb.driver.rpmb import RpmbClient

    if arguments.socket_path is None:
        raise UsageError(f"--socket-path=PATH is required (see {PROG} --help)")
    return RpmbClient.connect(arguments.socket_path, key, timeout=arguments.timeout)


def check_range(client: "RpmbClient", address: int, count: int) -> None:
    """Refuse blocks that the device does not have."""
    if address + count > client.config.blocks:
        raise UsageError(
            f"expected block addresses below {client.config.blocks}, the device's capacity, found "
            f"{address} to {address + count - 1}: choose a lower address or fewer blocks"
        )


def data_and_key(arguments: argparse.Namespace, limit: int) -> tuple[bytes, bytes]:
    """Read DATAFILE, up to ``limit`` blocks, and KEYFILE."""
    if arguments.data_file == arguments.key_file == STANDARD_STREAM:
        raise UsageError("DATAFILE and KEYFILE cannot both be standard input: name a file for one")
    return read_blocks(arguments.data_file, limit), read_key(arguments.key_file)


def read_into_file(arguments: argparse.Namespace) -> Result:
    """Read blocks into OUTFILE: COUNT of them, or all from ADDRESS on if COUNT is None."""
    address, count = arguments.address, arguments.count
    if arguments.json and arguments.out_file == STANDARD_STREAM:
        raise UsageError("--json and the data cannot both go to standard output: name an OUTFILE")
    key = read_optional_key(arguments.key_file)
    parts = []
    with connect(arguments, key) as client:
        if count is None:
            count = max(client.config.blocks - address, 1)
        check_range(client, address, count)
        limit = client.config.max_rd_cnt or MAX_REQUEST_BLOCKS
        with progress(count) as advance:
            for start in range(address, address + count, limit):
                size = min(limit, address + count - start)
                parts.append(client.read(start, size))
                advance(size)
    if arguments.out_file == STANDARD_STREAM:
        write_stdout(b"".join(parts))
    else:
        write_file(arguments.out_file, b"".join(parts))
    return Result(
        {
            "address": address,
            "blocks": count,
            "file": arguments.out_file,
            "verified": key is not None,
        }
    )


@contextmanager
def progress(total: int, unit: str = "blocks") -> Iterator[Callable[[int], object]]:
    """Show the progress of a transfer on a terminal, if tqdm is installed."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _count: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _count: None
        return
    with tqdm(total=total, unit=unit, desc=PROG, leave=False) as bar:
        yield bar.update
