# SPDX-License-Identifier: Apache-2.0
"""The MAC of RPMB frames: driver, tests and this engine share it."""

from vhost_rpmb.rpmb.mac import Authenticator

__all__ = ["Authenticator"]
