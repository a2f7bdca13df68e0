# SPDX-License-Identifier: Apache-2.0
"""What the modules of the daemon take from `typing` and `enum`, without their import at run time.

That takes 0.8 MiB of memory in each daemon, and 5 ms of its start. A module that uses `NamedTuple`
has ``from __future__ import annotations``; what is needed in annotations only is imported from
`typing` under ``if TYPE_CHECKING``.
"""

from __future__ import annotations

__all__ = ["TYPE_CHECKING", "IntEnum", "IntFlag", "NamedTuple", "Protocol"]

TYPE_CHECKING = False  # for type checkers it is true, whatever its value

if TYPE_CHECKING:
    from enum import IntEnum, IntFlag
    from typing import NamedTuple, Protocol
else:
    from collections import namedtuple

    _OF_A_CLASS = ("__annotations__", "__module__", "__qualname__")

    class _Named(type):
        """Makes a named tuple of a class with annotated fields, methods and defaults."""

        def __new__(cls, name, bases, attributes):
            if not bases:
                return super().__new__(cls, name, bases, attributes)
            fields = attributes["__annotations__"]
            defaults = [attributes[field] for field in fields if field in attributes]
            made = namedtuple(  # noqa: PYI024
                name, fields, defaults=defaults, module=attributes["__module__"]
            )
            for key, value in attributes.items():
                if key not in fields and key not in _OF_A_CLASS:
                    setattr(made, key, value)
            return made

    class NamedTuple(metaclass=_Named):
        """The base of named tuples."""

    class _Enumeration(type):
        """Makes members of the public attributes of a class that are numbers, in their order."""

        def __new__(cls, name, bases, attributes):
            made = super().__new__(cls, name, bases, {"__slots__": (), **attributes})
            made._members = {}
            for key, value in attributes.items():
                if type(value) is int and key[0] != "_":
                    member = made._members[value] = int.__new__(made, value)
                    setattr(made, key, member)
            return made

        def __iter__(cls):
            return iter(cls._members.values())

    class IntEnum(int, metaclass=_Enumeration):
        """The base of enumerations of numbers; calling one gives its member of a value."""

        def __new__(cls, value):  # noqa: D102
            member = cls._members.get(value)
            if member is None:
                raise ValueError(f"{value!r} is not a valid {cls.__qualname__}")
            return member

        def __reduce__(self):
            return type(self), (int(self),)

        def __repr__(self):
            return f"<{type(self).__qualname__}.{self.name}: {int(self)}>"

        __str__ = int.__repr__

        @property
        def name(self):
            """The name of the member."""
            for name, value in vars(type(self)).items():
                if value is self:
                    return name
            return None

    class IntFlag(IntEnum):
        """The base of enumerations of masks; of several, the result is a number."""

        def __new__(cls, value):  # noqa: D102
            return cls._members.get(value) or int.__new__(cls, value)

    class Protocol:
        """The base of classes that describe what others have, for readers and type checkers."""
