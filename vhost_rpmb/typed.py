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
    from operator import itemgetter

    class _Named(type):
        """Makes a named tuple of a class with annotated fields, methods and defaults."""

        def __new__(cls, name, bases, attributes):
            fields = tuple(attributes.get("__annotations__", ()))
            made = {
                **attributes,
                "__slots__": (),
                "__match_args__": fields,
                "_fields": fields,
                "_field_defaults": {key: attributes[key] for key in fields if key in attributes},
            }
            made.update((key, property(itemgetter(at))) for at, key in enumerate(fields))
            return super().__new__(cls, name, bases, made)

    class NamedTuple(tuple, metaclass=_Named):
        """The base of named tuples. Each by `collections` takes 3 KiB, of functions of its own."""

        def __new__(cls, *values, **named):  # noqa: D102
            if named or len(values) != len(cls._fields):
                values = cls._completed(values, named)
            return tuple.__new__(cls, values)

        @classmethod
        def _completed(cls, values, named):
            given = dict(zip(cls._fields, values, strict=False))
            if len(values) > len(given) or named.keys() & given.keys():
                raise TypeError(f"{cls.__name__}: expected one value for a field, found more")
            given |= named
            if given.keys() - set(cls._fields):
                raise TypeError(f"{cls.__name__}: expected the fields {cls._fields}, found others")
            try:
                return [{**cls._field_defaults, **given}[field] for field in cls._fields]
            except KeyError as error:
                raise TypeError(f"{cls.__name__}: expected a value for {error}") from None

        @classmethod
        def _make(cls, values):
            """Make one of an iterable."""
            made = tuple.__new__(cls, values)
            if len(made) != len(cls._fields):
                raise TypeError(f"expected {len(cls._fields)} values, found {len(made)}")
            return made

        def _replace(self, **named):
            """Return one with other values of some fields."""
            made = self._make([named.pop(*each) for each in zip(self._fields, self, strict=True)])
            if named:
                raise ValueError(f"{type(self).__name__}: unknown fields {list(named)}")
            return made

        def _asdict(self):
            """Return the values by field."""
            return dict(zip(self._fields, self, strict=True))

        def __repr__(self):
            values = [f"{field}={value!r}" for field, value in self._asdict().items()]
            return f"{type(self).__name__}({', '.join(values)})"

        def __getnewargs__(self):
            return tuple(self)

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

        def __getitem__(cls, name):
            return {member.name: member for member in cls}[name]

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
        def value(self):
            """The number as such."""
            return int(self)

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
