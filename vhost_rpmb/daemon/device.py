# SPDX-License-Identifier: Apache-2.0
"""The device that the options ask for: that of the engine or, for tests, one with faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from vhost_rpmb.engine import Engine
from vhost_rpmb.storage.interface import Store
from vhost_rpmb.typed import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from vhost_rpmb.daemon.server import Options
    from vhost_rpmb.vhost_user.interfaces import Device

    class ServedDevice(Device, Protocol):
        """A device that counts, and whose store may be owned anew."""

        register: bytes  # the result register, for another host

        def reload(self) -> None:
            """Take the durable state again: another daemon may have changed it."""

        @property
        def served(self) -> int:
            """The number of chains that were served."""


__all__ = ["make_device"]


@contextmanager
def make_device(
    options: Options, store: Store, engine: Engine, wait: Callable[[float], object]
) -> Iterator[ServedDevice]:
    """Make the device of an engine. ``wait``: until an event, or for that many seconds."""
    make = partial(
        engine.RpmbDevice,
        store,
        max_write_blocks=options.max_write_blocks,
        max_read_blocks=options.max_read_blocks,
        strict=options.strict,
        virtio_features=options.virtio_features,
    )
    if options.inject is None:
        yield make()
        return
    from vhost_rpmb.injection.device import InjectedDevice  # imported lazily: for tests only

    with InjectedDevice(options.inject, store, make, engine, wait) as device:
        yield device
