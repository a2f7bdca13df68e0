# SPDX-License-Identifier: Apache-2.0
from typing import final

from vhost_rpmb._fast.ring import Ring

__all__ = ["PackedRing"]

@final
class PackedRing(Ring): ...
