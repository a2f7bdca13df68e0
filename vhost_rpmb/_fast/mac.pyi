# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from typing import final

__all__ = ["Authenticator"]

@final
class Authenticator:
    def __init__(self, key: bytes) -> None: ...
    def mac(self, frames: Iterable[bytes]) -> bytes: ...
    def verify(self, frames: Iterable[bytes], mac: bytes) -> bool: ...
