# SPDX-License-Identifier: Apache-2.0
"""The context manager protocol for objects that have to be closed."""

from __future__ import annotations

from abc import ABC, abstractmethod

from vhost_rpmb.typed import TYPE_CHECKING

if TYPE_CHECKING:
    from typing import Self

__all__ = ["Closing"]


class Closing(ABC):
    """A context manager whose exit calls `close`."""

    __slots__ = ()

    @abstractmethod
    def close(self) -> None:
        """Release what the object owns."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
