# SPDX-License-Identifier: Apache-2.0
"""Arguments that several verbs share, and the types of their values."""

import argparse
import re
from collections.abc import Callable

from vhost_rpmb.arguments import path_argument
from vhost_rpmb.rpmb import spec

__all__ = [
    "MAX_BLOCKS",
    "add_address",
    "add_address_option",
    "add_data_file",
    "add_device_files",
    "add_key_file",
    "add_out_file",
    "add_size",
    "blocks",
    "seconds",
]

MAX_BLOCKS = spec.MAX_CAPACITY // spec.BLOCK_SIZE
MAX_TIMEOUT = 86400.0  # seconds

_SIZE = re.compile(r"([1-9][0-9]{0,9})([KM]?)", re.ASCII)
_UNITS = {"": 1, "K": 1024, "M": 1024 * 1024}


def _number(low: int, high: int) -> Callable[[str], int]:
    """Return the parser of a number from ``low`` to ``high``, decimal or hexadecimal."""

    def parse(text: str) -> int:
        # A leading zero is refused: mmc-utils reads it as octal, people as decimal.
        if re.fullmatch(r"0|[1-9][0-9]*|0[xX][0-9a-fA-F]+", text, re.ASCII):
            number = int(text, 0)
            if low <= number <= high:
                return number
        raise argparse.ArgumentTypeError(f"expected a number {low} to {high}, found {text!r}")

    return parse


blocks = _number(1, MAX_BLOCKS)
_address = _number(0, MAX_BLOCKS - 1)


def seconds(text: str) -> float:
    """Parse a time limit."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value <= MAX_TIMEOUT:
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds above 0 and up to {MAX_TIMEOUT:g}, found {text!r}"
        )
    return value


def _size(text: str) -> int:
    """Parse the size of an image, in bytes or with K or M behind it."""
    found = _SIZE.fullmatch(text)
    value = int(found[1]) * _UNITS[found[2]] if found else 0
    if not 0 < value <= spec.MAX_CAPACITY or value % spec.CAPACITY_UNIT:
        raise argparse.ArgumentTypeError(
            f"expected a multiple of 128K, from 128K to 16M, found {text!r}"
        )
    return value


def add_size(parser: argparse.ArgumentParser) -> None:
    """Add --size, of a new device."""
    parser.add_argument(
        "--size",
        metavar="SIZE",
        type=_size,
        default="128K",
        help="a multiple of 128K, up to 16M; default %(default)s",
    )


def add_key_file(
    parser: argparse.ArgumentParser, description: str, *, optional: bool = False
) -> None:
    """Add KEYFILE."""
    parser.add_argument(
        "key_file",
        metavar="KEYFILE",
        type=path_argument,
        nargs="?" if optional else None,
        help=description,
    )


def add_address(parser: argparse.ArgumentParser) -> None:
    """Add ADDRESS."""
    parser.add_argument(
        "address", metavar="ADDRESS", type=_address, help="the first block, counted from 0"
    )


def add_address_option(parser: argparse.ArgumentParser) -> None:
    """Add --address, with the first block of the device as its default."""
    parser.add_argument(
        "--address",
        metavar="ADDRESS",
        type=_address,
        default=0,
        help="the first block; default %(default)s",
    )


def add_data_file(parser: argparse.ArgumentParser, limit: str) -> None:
    """Add DATAFILE, whose size is bounded by ``limit``, and KEYFILE."""
    parser.add_argument(
        "data_file",
        metavar="DATAFILE",
        type=path_argument,
        help=f"the data, a multiple of 256 bytes up to {limit}",
    )
    add_key_file(parser, "the key, which authenticates requests and answers")


def add_out_file(parser: argparse.ArgumentParser) -> None:
    """Add OUTFILE and an optional KEYFILE."""
    parser.add_argument(
        "out_file", metavar="OUTFILE", type=path_argument, help="the file for the data"
    )
    add_key_file(parser, "the key; without it, answers are not authenticated", optional=True)


def add_device_files(parser: argparse.ArgumentParser, *, required: bool) -> None:
    """Add the paths of a device's files: --flash-path, --state-path and --key-path."""
    for name, needed, text in (
        ("flash", required, "the raw backing image" + ("; required" if required else "")),
        (
            "state",
            False,
            "the state; default: the flash path, links resolved, with .state behind it",
        ),
        ("key", False, "the key file, to check that it holds the device's key"),
    ):
        parser.add_argument(
            f"--{name}-path", metavar="PATH", type=path_argument, required=needed, help=text
        )
