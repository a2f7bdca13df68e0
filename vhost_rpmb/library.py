# SPDX-License-Identifier: Apache-2.0
"""Functions of shared libraries, by their names: through ctypes."""

from __future__ import annotations

import ctypes

__all__ = ["Library"]

_MAX_ARGUMENTS = 7
_LONG_MAX = (1 << 8 * ctypes.sizeof(ctypes.c_long) - 1) - 1


class Library:
    """A shared library, or without ``name`` all that the process has loaded.

    OSError where there is none of this name. It stays loaded.
    """

    def __init__(self, name: str | None = None) -> None:
        self._library = ctypes.CDLL(name, use_errno=True)

    def call(
        self, function: str, *arguments: int | bytes | bytearray | memoryview | None
    ) -> tuple[int, int]:
        """Call a function with numbers, memory and null pointers: its result, and errno.

        All numbers are those of a C long, also the result: of a function that returns an int, the
        other bits are undefined, as is errno after a success. OSError where the library has no such
        function. Other threads run meanwhile.
        """
        if len(arguments) > _MAX_ARGUMENTS:
            raise ValueError(f"expected at most {_MAX_ARGUMENTS} arguments")
        try:
            called = self._library[function]
        except AttributeError as error:
            raise OSError(str(error)) from error
        called.restype = ctypes.c_long
        result = called(*[_value(argument) for argument in arguments])
        return int(result), ctypes.get_errno()

    @staticmethod
    def address(memory: bytes | bytearray | memoryview) -> int:
        """The address of memory, as long as the object and its size stay."""
        if isinstance(memory, bytes):
            return ctypes.cast(ctypes.c_char_p(memory), ctypes.c_void_p).value or 0
        return ctypes.addressof(ctypes.c_char.from_buffer(memory)) if len(memory) else 0


def _value(argument: int | bytes | bytearray | memoryview | None) -> object:
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, int):
        if not -_LONG_MAX - 1 <= argument <= _LONG_MAX:
            raise OverflowError("expected a number of a C long")
        return ctypes.c_long(argument)
    if isinstance(argument, bytes):
        return ctypes.c_char_p(argument)
    return ctypes.byref((ctypes.c_char * len(argument)).from_buffer(argument))
