# SPDX-License-Identifier: Apache-2.0
"""What can go wrong between the client and a device, each with its own type."""

from vhost_rpmb.rpmb import spec


class ClientError(Exception):
    """Base of all errors of the client; the text says on one line what was expected and found."""


class BackendError(ClientError):
    """The back-end cannot be reached, is gone, does not answer in time or broke the protocol."""


class RequestRefusedError(BackendError):
    """The back-end answered a vhost-user message with an error; the connection is still good."""


class QueueError(ClientError):
    """The device reports the queue broken, or wrote something impossible into the used ring."""


class VerificationError(ClientError):
    """A response does not match its request or its MAC: it must not be believed."""


class RpmbResultError(ClientError):
    """The device answered with a result other than OK.

    ``request`` is the request type's name, ``result`` the result field as answered (16 bits),
    ``authenticated`` whether the MAC of the answer was checked and found right.
    """

    def __init__(self, request: str, result: int, authenticated: bool) -> None:
        super().__init__(f"{request} failed: {result_name(result)} (result 0x{result:04x})")
        self.request = request
        self.result = result
        self.authenticated = authenticated


_RESULT_NAMES = {
    value: name.removeprefix("VIRTIO_RPMB_RES_")
    for name, value in vars(spec).items()
    if name.startswith("VIRTIO_RPMB_RES_")
}


def result_name(result: int) -> str:
    """The specification's name of a result, the expired bit included ("A, B" when both)."""
    status = result & ~spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    expired = result & spec.VIRTIO_RPMB_RES_WRITE_COUNTER_EXPIRED
    names = [_RESULT_NAMES.get(status, "unknown result")] if status or not expired else []
    if expired:
        names.append(_RESULT_NAMES[expired])
    return ", ".join(names)
