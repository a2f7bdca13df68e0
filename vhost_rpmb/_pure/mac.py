# SPDX-License-Identifier: Apache-2.0
"""The MAC of RPMB frames, and hashes: driver, tests and this engine share them."""

from vhost_rpmb.hashes import Hashes
from vhost_rpmb.rpmb.mac import Authenticator

__all__ = ["Authenticator", "Hashes"]
