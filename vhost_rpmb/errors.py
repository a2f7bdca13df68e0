# SPDX-License-Identifier: Apache-2.0
"""Exceptions by origin of the error: usage, durable state, peer. Each has one way of handling.

There is none for the guest: an invalid request is answered in the ring, not raised.
"""


class OperatorError(Exception):
    """An error that the operator can fix; the text is one line that says how."""

    exit_status = 1


class UsageError(OperatorError):
    """A wrong option, or an option that names an unsuitable file."""

    exit_status = 2


class StateError(OperatorError):
    """The durable state of the device is unusable: unreadable, inconsistent or in use."""


class Fenced(OperatorError):
    """Another daemon owns the device, or its state is another one: answer nothing and end.

    A service manager must not start the daemon again: it would take the device back, or be refused
    for ever.
    """

    exit_status = 3


class Stopped(Exception):
    """A stop was requested while a request to a shared store waits for a definite answer."""


class PeerError(Exception):
    """The peer violated the vhost-user protocol; its connection ends, the daemon continues."""


class ClientError(Exception):
    """Base of all errors of driver and client; the text is one line: expected and found."""
