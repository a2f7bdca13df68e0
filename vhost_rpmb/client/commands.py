# SPDX-License-Identifier: Apache-2.0
"""The commands of ``vhost-rpmb-client``: each takes its options and returns what to report.

The client itself is imported where it is used: the command line has to work where only the standard
library is there.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from vhost_rpmb.client.files import (
    PROG,
    STANDARD_STREAM,
    create_file,
    create_folder,
    name_of,
    read_blocks,
    read_key,
    read_optional_key,
    warn,
    write_file,
    write_stdout,
)
from vhost_rpmb.driver.errors import RpmbResultError
from vhost_rpmb.errors import OperatorError, StateError, UsageError
from vhost_rpmb.rpmb import spec

if TYPE_CHECKING:
    from vhost_rpmb.driver.rpmb import RpmbClient

__all__ = [
    "IMAGE_NAME",
    "MAX_BLOCKS",
    "Result",
    "create",
    "info",
    "load",
    "read",
    "read_counter",
    "verify",
    "write_block",
    "write_key",
]

IMAGE_NAME = "rpmb.img"  # in a folder of its own
MAX_BLOCKS = 1 << 16  # an address has 16 bits
MAX_WRITE_BLOCKS = 255  # max_wr_cnt has 8 bits


class Result(NamedTuple):
    """What a command reports: ``values`` for programs, ``lines`` for people.

    ``error``: what is wrong all the same; it is reported behind them.
    """

    values: dict[str, Any]
    lines: Sequence[str] = ()
    error: OperatorError | None = None


def create(arguments: argparse.Namespace) -> Result:
    """Make a sparse image, and a folder or a random key where they are asked for."""
    image, key_path = arguments.image, arguments.random_key
    with ExitStack() as undo:
        if arguments.folder is not None:
            create_folder(arguments.folder)
            undo.callback(os.rmdir, arguments.folder)
            image = os.path.join(arguments.folder, IMAGE_NAME)
        if key_path is not None:
            create_file(key_path, os.urandom(spec.KEY_SIZE))
            undo.callback(os.unlink, key_path)
        create_file(image, b"", arguments.size)
        undo.pop_all()
    return Result({"image": image, "size": arguments.size, "key_file": key_path})


def write_key(arguments: argparse.Namespace) -> Result:
    """Program the key."""
    key = read_key(arguments.key_file)
    with _connect(arguments, None) as client:
        client.program_key(key)
    return Result({"key_programmed": True})


def read_counter(arguments: argparse.Namespace) -> Result:
    """Read the write counter."""
    key = read_optional_key(arguments.key_file)
    with _connect(arguments, key) as client:
        counter = client.read_counter()
    if counter == spec.MAX_WRITE_COUNTER:
        warn("the write counter has expired: no more writes are possible")
    return Result(
        {"write_counter": counter, "verified": key is not None},
        [f"Counter value: 0x{counter:08x}"],
    )


def write_block(arguments: argparse.Namespace) -> Result:
    """Write blocks in one request."""
    data, key = _data_and_key(arguments, MAX_WRITE_BLOCKS)
    count = len(data) // spec.BLOCK_SIZE
    with _connect(arguments, key) as client:
        limit = client.config.max_wr_cnt or MAX_WRITE_BLOCKS
        if count > limit:
            raise UsageError(
                f"{name_of(arguments.data_file)}: expected at most {limit} blocks of "
                f"{spec.BLOCK_SIZE} bytes, the device's limit for one write, found {count}: "
                "use load"
            )
        _check_range(client, arguments.address, count)
        counter = client.write(arguments.address, data)
    return Result({"address": arguments.address, "blocks": count, "write_counter": counter})


def load(arguments: argparse.Namespace) -> Result:
    """Write any number of blocks, by as many requests as it takes."""
    data, key = _data_and_key(arguments, MAX_BLOCKS)
    count = len(data) // spec.BLOCK_SIZE
    written = 0
    with _connect(arguments, key) as client:
        limit = client.config.max_wr_cnt or MAX_WRITE_BLOCKS
        _check_range(client, arguments.address, count)
        counter = client.read_counter()
        with _progress(count) as advance:
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


def _data_and_key(arguments: argparse.Namespace, most: int) -> tuple[bytes, bytes]:
    if arguments.data_file == arguments.key_file == STANDARD_STREAM:
        raise UsageError("DATAFILE and KEYFILE cannot both be standard input: name a file for one")
    return read_blocks(arguments.data_file, most), read_key(arguments.key_file)


def read(arguments: argparse.Namespace) -> Result:
    """Read blocks into a file; all behind the address where no count is given."""
    address, count = arguments.address, arguments.count
    if arguments.json and arguments.out_file == STANDARD_STREAM:
        raise UsageError("--json and the data cannot both go to standard output: name an OUTFILE")
    key = read_optional_key(arguments.key_file)
    parts = []
    with _connect(arguments, key) as client:
        if count is None:
            count = max(client.config.blocks - address, 1)
        _check_range(client, address, count)
        limit = client.config.max_rd_cnt or MAX_WRITE_BLOCKS
        with _progress(count) as advance:
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
def _progress(blocks: int) -> Iterator[Callable[[int], object]]:
    """Show how far it is, on a terminal and where tqdm is installed."""
    if sys.stderr is None or not sys.stderr.isatty():
        yield lambda _blocks: None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda _blocks: None
        return
    with tqdm(total=blocks, unit="blocks", desc=PROG, leave=False) as bar:
        yield bar.update


def info(arguments: argparse.Namespace) -> Result:
    """Tell about a device: through its daemon, or from its files."""
    if arguments.flash_path is not None:
        if arguments.key_file is not None:
            raise UsageError("KEYFILE needs --socket-path: use --key-path with --flash-path")
        return _report(arguments)
    if arguments.socket_path is None:
        raise UsageError(
            "--socket-path=PATH of a running daemon or --flash-path=PATH is required"
            f" (see {PROG} info --help)"
        )
    key = None if arguments.key_file is None else read_key(arguments.key_file)
    counter: int | None = None
    with _connect(arguments, key) as client:
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


def verify(arguments: argparse.Namespace) -> Result:
    """Check the files of a device."""
    return _report(arguments)


def _report(arguments: argparse.Namespace) -> Result:
    from vhost_rpmb.storage.local import opening
    from vhost_rpmb.storage.paths import Paths

    report = opening.verify(
        Paths.resolve(arguments.flash_path, arguments.state_path, arguments.key_path),
        warn=warn,
    )
    error = None
    if report.disagreement:
        error = StateError(report.disagreement)
    elif report.damaged:
        error = StateError(f"{len(report.damaged)} blocks are not what was stored")
    where = "in a key file" if report.key_in_file else "in the state file"
    return Result(
        {
            "image": arguments.flash_path,
            "size": report.blocks * spec.BLOCK_SIZE,
            "blocks": report.blocks,
            "state": report.state_path,
            "closed": report.clean,
            "key_programmed": report.programmed,
            "key_in_file": report.key_in_file,
            "write_counter": report.counter,
            "pending_blocks": report.pending,
            "damaged_blocks": report.damaged,
            "problem": None if error is None else str(error),
        },
        [
            f"image: {arguments.flash_path}, {report.blocks} blocks",
            f"state: {report.state_path}, {'closed' if report.clean else 'not closed'}",
            f"write counter: 0x{report.counter:08x}",
            f"key: {f'programmed, {where}' if report.programmed else 'not programmed'}",
            f"blocks pending in the state file: {_addresses(report.pending)}",
            f"damaged blocks: {_addresses(report.damaged)}",
        ],
        error,
    )


def _addresses(blocks: list[int]) -> str:
    """Write block addresses for people."""
    from vhost_rpmb.storage.local.image import ranges

    return f"{len(blocks)}, address {ranges(blocks, None)}" if blocks else "none"


def _connect(arguments: argparse.Namespace, key: bytes | None) -> "RpmbClient":
    from vhost_rpmb.driver.rpmb import RpmbClient

    if arguments.socket_path is None:
        raise UsageError(f"--socket-path=PATH is required (see {PROG} --help)")
    return RpmbClient.connect(arguments.socket_path, key, timeout=arguments.timeout)


def _check_range(client: "RpmbClient", address: int, count: int) -> None:
    if address + count > client.config.blocks:
        raise UsageError(
            f"expected block addresses below {client.config.blocks}, the device's capacity, found "
            f"{address} to {address + count - 1}: choose a lower address or fewer blocks"
        )
