# SPDX-License-Identifier: Apache-2.0
"""Who is at fault decides the type of an error, and so how it is handled.

The guest is never at fault in this sense: what a guest does is answered in the ring, not raised.
"""


class OperatorError(Exception):
    """Something the operator has to mend; the text says what and how, on one line."""

    exit_status = 1


class UsageError(OperatorError):
    """A wrong option, or a file named by an option that cannot serve its purpose."""

    exit_status = 2


class StateError(OperatorError):
    """The durable state of the device cannot be used: unreadable, contradictory or in use."""


class PeerError(Exception):
    """The front-end broke the vhost-user protocol; its connection ends, the daemon goes on."""
