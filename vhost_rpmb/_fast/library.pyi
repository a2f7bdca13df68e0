# SPDX-License-Identifier: Apache-2.0
from typing import final

__all__ = ["Library"]

@final
class Library:
    def __init__(self, name: str | None = None) -> None: ...
    def call(
        self, function: str, *arguments: int | bytes | bytearray | memoryview | None
    ) -> tuple[int, int]: ...
    @staticmethod
    def address(memory: bytes | bytearray | memoryview) -> int: ...
