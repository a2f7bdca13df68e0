# SPDX-License-Identifier: Apache-2.0
"""Requests that are not whole frames: a line in the log that says which driver probably sends them.

There are drivers from before the virtio specification: Intel's for the ACRN hypervisor and for
Linux, 2018 to 2020. Their requests begin with a header of 12 bytes, which a list of commands may
follow; the first ones have no device-readable buffers at all.
"""

from __future__ import annotations

from vhost_rpmb.log import LimitedLog, Logger
from vhost_rpmb.rpmb import limits, spec

__all__ = ["MalformedLog"]

_HEADER = 12  # bytes
_LIST = tuple(8 + 16 * commands for commands in (1, 2, 3))  # bytes: a number, then the commands
_PREFIXES = (_HEADER, *(_HEADER + length for length in _LIST))
_EARLY = (
    "the driver of the guest is probably one from before the virtio specification (Intel's for"
    " ACRN, or for Linux 2018 to 2020): use one that follows the specification"
)

logger = Logger(__name__)


class MalformedLog:
    """A rate-limited log of requests that are answered GENERAL_FAILURE for their length."""

    def __init__(self) -> None:
        self._log = LimitedLog(logger)

    def report(self, length: int) -> None:
        """Report a request of that many device-readable bytes."""
        whole = f"expected a request of whole frames of {spec.FRAME_SIZE} bytes"
        if not length:
            self._log.report("empty", f"{whole}, found no device-readable bytes: {_EARLY}")
        elif length % spec.FRAME_SIZE in _PREFIXES:
            header = length % spec.FRAME_SIZE
            self._log.report(
                "header", f"{whole}, found {length} bytes, {header} more than frames: {_EARLY}"
            )
        else:
            self._log.report(
                "length",
                f"{whole}, 1 to {limits.MAX_REQUEST_FRAMES} of them, found {length} bytes: correct"
                " the driver of the guest",
            )
