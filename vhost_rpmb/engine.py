# SPDX-License-Identifier: Apache-2.0
"""The choice of the engine; nothing else knows that there are two."""

from __future__ import annotations

from vhost_rpmb.errors import OperatorError
from vhost_rpmb.typed import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from typing import Any

    # In types the reference stands for both: a test compares the signatures of the twins.
    from vhost_rpmb import _pure

__all__ = ["ENGINES", "Engine", "load"]

ENGINES = ("fast", "pure")


class Engine(NamedTuple):
    """The classes of one engine."""

    name: str
    Authenticator: type[_pure.Authenticator]
    GuestMemory: type[_pure.GuestMemory]
    Hashes: type[_pure.Hashes]
    Library: type[_pure.Library]
    Loop: type[_pure.Loop]
    Virtqueue: type[_pure.Virtqueue]
    RpmbDevice: type[_pure.RpmbDevice]


def load(name: str) -> Engine:
    """Load the engine ``name``, one of ENGINES.

    Raises OperatorError where the compiled engine cannot be loaded. The slower engine never
    replaces it silently: a broken wheel would remain unnoticed until production.
    """
    if name not in ENGINES:
        raise ValueError(f"an engine is one of {', '.join(ENGINES)}, not {name!r}")
    try:
        module = _import(name)
    except ImportError as error:
        raise OperatorError(
            f"the compiled engine cannot be loaded ({error}): reinstall vhost-rpmb for this"
            " Python, or use --debug to run on the pure-Python engine"
        ) from error
    return Engine(
        name=name,
        Authenticator=module.Authenticator,
        GuestMemory=module.GuestMemory,
        Hashes=module.Hashes,
        Library=module.Library,
        Loop=module.Loop,
        Virtqueue=module.Virtqueue,
        RpmbDevice=module.RpmbDevice,
    )


def _import(name: str) -> Any:
    # Not by importlib.import_module(): it takes 0.1 MiB in each daemon.
    if name == "fast":
        from vhost_rpmb import _fast

        return _fast
    from vhost_rpmb import _pure

    return _pure
