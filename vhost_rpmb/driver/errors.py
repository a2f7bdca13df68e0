# SPDX-License-Identifier: Apache-2.0
"""The errors of a driver, each with its own type."""

from vhost_rpmb.errors import ClientError
from vhost_rpmb.rpmb.errors import RpmbResultError, VerificationError

__all__ = [
    "BackendError",
    "ClientError",
    "QueueError",
    "RequestRefusedError",
    "RpmbResultError",
    "VerificationError",
]


class BackendError(ClientError):
    """The back-end is unreachable, disconnected, too slow, or violated the protocol."""


class RequestRefusedError(BackendError):
    """The back-end answered a vhost-user message with an error; the connection is intact."""


class QueueError(ClientError):
    """The device reports the queue broken, or wrote an invalid value into the used ring."""
