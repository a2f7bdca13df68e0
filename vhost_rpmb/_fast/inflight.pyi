# SPDX-License-Identifier: Apache-2.0
from collections.abc import Sequence
from typing import Self, final

from vhost_rpmb._fast.memory import GuestMemory

__all__ = ["Inflight", "PackedInflight"]

@final
class Inflight:
    def __new__(
        cls, memory: GuestMemory, offset: int, size: int, last: int, heads: Sequence[int]
    ) -> Self: ...

@final
class PackedInflight:
    def __new__(
        cls, memory: GuestMemory, offset: int, size: int, record: bytes, heads: Sequence[int]
    ) -> Self: ...
