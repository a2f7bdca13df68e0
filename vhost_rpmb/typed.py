# SPDX-License-Identifier: Apache-2.0
"""What the modules of the daemon take from `typing`, without its import at run time.

That takes 0.6 MiB of memory in each daemon, and 4 ms of its start. A module that uses `NamedTuple`
has ``from __future__ import annotations``; what is needed in annotations only is imported from
`typing` under ``if TYPE_CHECKING``.
"""

from __future__ import annotations

__all__ = ["TYPE_CHECKING", "NamedTuple", "Protocol"]

TYPE_CHECKING = False  # for type checkers it is true, whatever its value

if TYPE_CHECKING:
    from typing import NamedTuple, Protocol
else:
    from operator import itemgetter

    class _Tuple(tuple):
        """What all named tuples share; as of `collections.namedtuple`, which compiles each class.

        That takes 0.1 ms and 3 KiB for each of some 30 classes.
        """

        __slots__ = ()
        # _fields and _field_defaults: of each class

        def __new__(cls, *values, **named):
            if named or len(values) != len(cls._fields):
                values = cls._complete(values, named)
            return tuple.__new__(cls, values)

        @classmethod
        def _complete(cls, values, named):
            rest = cls._fields[len(values) :]
            given = cls._field_defaults | named
            wrong = named.keys() - set(rest)
            missing = [field for field in rest if field not in given]
            if len(values) > len(cls._fields) or wrong or missing:
                raise TypeError(
                    f"{cls.__name__}: expected {', '.join(cls._fields)}, found {len(values)} values"
                    f" and {', '.join(named) or 'no names'}"
                )
            return *values, *(given[field] for field in rest)

        @classmethod
        def _make(cls, values):
            return cls(*values)

        def _replace(self, **changed):
            return type(self)(**(self._asdict() | changed))

        def _asdict(self):
            return dict(zip(self._fields, self, strict=True))

        def __getnewargs__(self):
            return tuple(self)

        def __repr__(self):
            fields = ", ".join(f"{name}={value!r}" for name, value in self._asdict().items())
            return f"{type(self).__name__}({fields})"

    class _Named(type):
        """Makes a named tuple of a class with annotated fields, methods and defaults."""

        def __new__(cls, name, bases, attributes):
            if not bases:
                return super().__new__(cls, name, bases, attributes)
            fields = tuple(attributes.pop("__annotations__"))
            defaults = {field: attributes.pop(field) for field in fields if field in attributes}
            attributes |= {field: property(itemgetter(at)) for at, field in enumerate(fields)}
            attributes |= {"__slots__": (), "_fields": fields, "_field_defaults": defaults}
            return type(name, (_Tuple,), attributes | {"__match_args__": fields})

    class NamedTuple(metaclass=_Named):
        """The base of named tuples."""

    class Protocol:
        """The base of classes that describe what others have, for readers and type checkers."""
