# SPDX-License-Identifier: Apache-2.0
"""The choice of the engine; nothing else knows that there are two."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, NamedTuple

from vhost_rpmb.errors import OperatorError

if TYPE_CHECKING:
    # In types the reference stands for both: a test compares the signatures of the twins.
    from vhost_rpmb import _pure

__all__ = ["ENGINES", "Engine", "load"]

ENGINES = ("fast", "pure")


class Engine(NamedTuple):
    """The classes of one engine."""

    name: str
    Authenticator: type[_pure.Authenticator]
    GuestMemory: type[_pure.GuestMemory]
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
        module = import_module(f"vhost_rpmb._{name}")
    except ImportError as error:
        raise OperatorError(
            f"the compiled engine cannot be loaded ({error}): reinstall vhost-rpmb for this"
            " Python, or use --debug to run on the pure-Python engine"
        ) from error
    return Engine(
        name=name,
        Authenticator=module.Authenticator,
        GuestMemory=module.GuestMemory,
        Loop=module.Loop,
        Virtqueue=module.Virtqueue,
        RpmbDevice=module.RpmbDevice,
    )
