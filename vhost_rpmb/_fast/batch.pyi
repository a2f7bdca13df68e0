# SPDX-License-Identifier: Apache-2.0
from typing import Self, final

from vhost_rpmb.storage.interface import DeviceStore

__all__ = ["Batch", "View"]

@final
class Batch: ...

@final
class View:
    def __new__(cls, store: DeviceStore) -> Self: ...
