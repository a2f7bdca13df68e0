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
    """The back-end cannot be reached, is gone, does not answer in time or broke the protocol."""


class RequestRefusedError(BackendError):
    """The back-end answered a vhost-user message with an error; the connection is still good."""


class QueueError(ClientError):
    """The device reports the queue broken, or wrote something impossible into the used ring."""
