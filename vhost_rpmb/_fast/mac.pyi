# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable
from typing import final

__all__ = ["Authenticator", "Hashes"]

@final
class Authenticator:
    def __init__(self, key: bytes) -> None: ...
    def mac(self, frames: Iterable[bytes]) -> bytes: ...
    def verify(self, frames: Iterable[bytes], mac: bytes) -> bool: ...

@final
class Hashes:
    @staticmethod
    def sha256(data: bytes) -> bytes: ...
    @staticmethod
    def hmac_sha256(key: bytes, data: bytes) -> bytes: ...
    @staticmethod
    def equal(one: bytes, other: bytes) -> bool: ...
