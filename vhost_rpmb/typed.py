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

    class Protocol:
        """The base of classes that describe what others have, for readers and type checkers."""
