# SPDX-License-Identifier: Apache-2.0
"""Errors of an answer that a driver checks."""

from vhost_rpmb.errors import ClientError
from vhost_rpmb.rpmb.results import result_name

__all__ = ["RpmbResultError", "VerificationError"]


class VerificationError(ClientError):
    """A response does not match its request or its MAC: its content is not authentic."""


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
