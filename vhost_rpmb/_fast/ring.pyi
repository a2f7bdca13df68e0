# SPDX-License-Identifier: Apache-2.0
from typing import Self

from typing_extensions import disjoint_base

from vhost_rpmb._fast.memory import GuestMemory

__all__ = ["Ring"]

@disjoint_base
class Ring:
    def __new__(cls, memory: GuestMemory) -> Self: ...
