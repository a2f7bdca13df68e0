# SPDX-License-Identifier: Apache-2.0
"""The report on the files of a device that is not running, for `info` and `verify`."""

import argparse

from vhost_rpmb.client.files import warn
from vhost_rpmb.client.result import Result
from vhost_rpmb.errors import StateError
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.interface import ACTIVE, EXPORTED, IMPORTED, SUPERSEDED, VACANT

__all__ = ["report_files"]

_POSSESSION = {
    ACTIVE: "the device is here, generation {}",
    EXPORTED: "handed to another host, generation {}: use it there, or see"
    " vhost-rpmb-client release",
    IMPORTED: "arrived from another host, not used yet, generation {}",
    SUPERSEDED: "fenced, another host is active in generation {}",
    VACANT: "incoming, the device is expected from another host",
}


def report_files(arguments: argparse.Namespace) -> Result:
    """Verify the files of a device, and report what they hold."""
    from vhost_rpmb.storage.local.verification import verify
    from vhost_rpmb.storage.paths import Paths

    report = verify(
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
            "possession": report.possession.state,
            "generation": report.possession.generation,
            "pending_blocks": report.pending,
            "damaged_blocks": report.damaged,
            "problem": None if error is None else str(error),
        },
        [
            f"image: {arguments.flash_path}, {report.blocks} blocks",
            f"state: {report.state_path}, {'closed' if report.clean else 'not closed'}",
            f"write counter: 0x{report.counter:08x}",
            f"key: {f'programmed, {where}' if report.programmed else 'not programmed'}",
            "possession: "
            + _POSSESSION[report.possession.state].format(report.possession.generation),
            f"blocks pending in the state file: {_addresses(report.pending)}",
            f"damaged blocks: {_addresses(report.damaged)}",
        ],
        error,
    )


def _addresses(blocks: list[int]) -> str:
    """Return the number and the addresses of blocks as text."""
    from vhost_rpmb.storage.local.image import ranges

    return f"{len(blocks)}, address {ranges(blocks, None)}" if blocks else "none"
