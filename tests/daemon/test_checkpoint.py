# SPDX-License-Identifier: Apache-2.0
"""The time of a checkpoint."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from pathlib import Path

from tests.support.daemon import until
from tests.support.driver import KEY
from vhost_rpmb.daemon import listener, server
from vhost_rpmb.daemon.descriptors import DescriptorStore
from vhost_rpmb.daemon.eventloop import EventLoop, StopSignals
from vhost_rpmb.daemon.handover import Handover
from vhost_rpmb.daemon.notify import Notifier
from vhost_rpmb.driver.rpmb import RpmbClient
from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths


class RecordingLoop(EventLoop):
    """Counts the waits that ended without an event."""

    def __init__(self) -> None:
        super().__init__()
        self.quiet = 0

    def wait(self, timeout: float | None) -> bool:
        happened = super().wait(timeout)
        self.quiet += not happened and timeout != 0
        return happened


def test_idle_time_in_the_engine_counts_for_the_checkpoint(engine: Engine, tmp_path: Path) -> None:
    """The second that passes in the engine's loop is not followed by another one here."""
    flash = tmp_path / "flash"
    flash.write_bytes(bytes(spec.CAPACITY_UNIT))
    path = str(tmp_path / "socket")
    quiet: list[int] = []

    def write() -> None:
        with RpmbClient.connect(path) as client:
            client.program_key(KEY)
            client.write(0, bytes(256), 0)
            until(lambda: not store.checkpoint_due)

    with ExitStack() as stack:
        store = open_store(Paths.resolve(str(flash)))
        stack.callback(store.close)
        loop = RecordingLoop()
        stack.callback(loop.close)
        checkpoint = store.checkpoint_slice

        def observed() -> bool | None:
            quiet.append(loop.quiet)
            return checkpoint()

        store.checkpoint_slice = observed  # type: ignore[method-assign]
        device = engine.RpmbDevice(store)
        sock = listener.listen(path, None, stack)
        handover = Handover(DescriptorStore(Notifier({}), {}))
        daemon = server.Server(
            *(loop, sock, device, engine, handover), listening=True, once=True, poll_us=64
        )
        stack.callback(daemon.close)
        daemon.listen()
        notifier = Notifier({})
        stack.callback(notifier.close)
        for number in (signal.SIGTERM, signal.SIGINT):  # it leaves them ignored
            stack.callback(signal.signal, number, signal.getsignal(number))
        stop = StopSignals(loop)
        stack.callback(stop.close)
        guest = threading.Thread(target=write)
        guest.start()
        status = server.Status(notifier, daemon, store, device)
        server.serve(loop, stop, daemon, store, status)
        guest.join()
        assert quiet
        assert not any(quiet)
