# SPDX-License-Identifier: Apache-2.0
"""The messages of real VMMs, each with a full RPMB conversation and a crash in the middle."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path

import pytest

from tests.support.conversation import Conversation
from tests.support.daemon import PATIENCE, Daemon, DaemonFactory
from tests.support.frontends import (
    EVENT_IDX,
    IN_ORDER,
    INDIRECT,
    VERSION_1,
    CloudHypervisor,
    Crosvm,
    Libkrun,
    Qemu,
    Vmm,
)
from tests.support.oracle import KEY
from tests.support.supervised import Supervised
from vhost_rpmb.driver.rpmb import RpmbClient, Setup
from vhost_rpmb.engine import Engine
from vhost_rpmb.vhost_user.wire import ProtocolFeature

LINUX = VERSION_1 | INDIRECT | EVENT_IDX | IN_ORDER  # what a guest acknowledges
OFFER = "--virtio-features=+in-order"
IN_FLIGHT = 24
CRASHES = int(os.environ.get("VHOST_RPMB_FRONTEND_KILLS", "3"))
WITHOUT_INFLIGHT = CloudHypervisor.protocol_mask & ~ProtocolFeature.INFLIGHT_SHMFD

pytestmark = pytest.mark.timeout(300 + 10 * CRASHES)


@contextmanager
def talking(
    kind: type[Vmm],
    path: Path,
    protocol_features: ProtocolFeature | None = None,
    features: int = LINUX,
    around: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> Iterator[Conversation]:
    """A VMM with a guest, which has programmed the key; `around` each message of its."""
    mask = kind.protocol_mask if protocol_features is None else protocol_features
    setup = Setup(features=features, protocol_features=mask)
    vmm = kind.connect(path, timeout=PATIENCE)
    vmm.around = around
    with RpmbClient(vmm, KEY, timeout=PATIENCE, setup=setup) as client:
        talk = Conversation(client)
        talk.begin()
        yield talk


def cloud_hypervisor(talk: Conversation) -> CloudHypervisor:
    vmm = talk.client.frontend
    assert isinstance(vmm, CloudHypervisor)
    return vmm


def crash(talk: Conversation, device: Daemon, stack: ExitStack, published: int = 0) -> None:
    """Kill the daemon, let the guest publish requests, and let Cloud Hypervisor reconnect."""
    device.kill()
    talk.submit(published)
    device.start()
    new = cloud_hypervisor(talk).reconnect(device.socket_path, talk.client.ring)
    talk.client.frontend = stack.enter_context(new)


@pytest.fixture
def supervised(engine: Engine, tmp_path: Path) -> Iterator[Supervised]:
    with Supervised(tmp_path, OFFER, engine=engine.name) as made:
        yield made


# Cloud Hypervisor


@pytest.mark.parametrize(
    "mask", [CloudHypervisor.protocol_mask, WITHOUT_INFLIGHT], ids=["inflight", "used-index"]
)
def test_cloud_hypervisor_reconnects_after_a_crash_under_load(
    daemon: DaemonFactory, mask: ProtocolFeature
) -> None:
    """With an in-flight region from the available index, otherwise in order from the used index."""
    device, source = daemon(OFFER), random.Random(3)
    with ExitStack() as stack, talking(CloudHypervisor, device.socket_path, mask) as talk:
        for _ in range(CRASHES):
            talk.submit(IN_FLIGHT)
            time.sleep(source.uniform(0, 0.01))
            crash(talk, device, stack, published=4)
            talk.finish()
        talk.check()
        uses_region = bool(mask & ProtocolFeature.INFLIGHT_SHMFD)
        assert (cloud_hypervisor(talk).region is not None) == uses_region


def test_cloud_hypervisor_before_v54_reconnects_after_a_crash_at_rest(
    daemon: DaemonFactory,
) -> None:
    """Without a region and IN_ORDER it skips what was in flight: nothing may be."""
    device = daemon(OFFER)
    with (
        ExitStack() as stack,
        talking(CloudHypervisor, device.socket_path, WITHOUT_INFLIGHT, LINUX & ~IN_ORDER) as talk,
    ):
        for _ in range(3):
            crash(talk, device, stack)
            assert cloud_hypervisor(talk).base == talk.client.ring.used_index
            talk.check()


def test_cloud_hypervisor_pauses_and_resumes(daemon: DaemonFactory) -> None:
    with talking(CloudHypervisor, daemon(OFFER).socket_path) as talk:
        vmm, ring = cloud_hypervisor(talk), talk.client.ring
        for _ in range(3):
            talk.submit(IN_FLIGHT)
            vmm.pause()
            talk.finish_used()
            used = ring.used_index
            talk.submit(4)
            vmm.get_features()  # messages are served meanwhile
            assert ring.used_index == used
            vmm.resume()
            talk.finish()
        talk.check()


# All that stop a ring


@pytest.mark.parametrize("kind", [CloudHypervisor, Crosvm, Qemu])
def test_stopped_ring_continues_where_it_was(daemon: DaemonFactory, kind: type[Vmm]) -> None:
    """A snapshot of Cloud Hypervisor, sleep and wake of crosvm, stop and cont of QEMU."""
    with talking(kind, daemon(OFFER).socket_path) as talk:
        stop_and_continue(talk)


def stop_and_continue(talk: Conversation) -> None:
    vmm, ring = talk.client.frontend, talk.client.ring
    assert isinstance(vmm, Vmm)
    for _ in range(3):
        talk.submit(IN_FLIGHT)
        base = vmm.stop()
        assert base == ring.used_index
        talk.submit(4)
        vmm.activate(ring, base)
        talk.finish()
        talk.check()


@pytest.mark.parametrize("kind", [Libkrun, Crosvm, Qemu])
def test_each_acknowledges_what_its_guest_may_use(daemon: DaemonFactory, kind: type[Vmm]) -> None:
    with talking(kind, daemon(OFFER).socket_path) as talk:
        seen = VERSION_1 | EVENT_IDX if kind is Crosvm else LINUX
        assert talk.client.frontend.features == seen
        acked = talk.client.frontend.protocol_features
        assert not acked & ~kind.protocol_mask
        talk.submit(IN_FLIGHT)
        talk.finish()
        talk.check()


# Front-ends that never reconnect: the connection outlives the daemon


@pytest.mark.parametrize("kind", [Libkrun, Crosvm, Qemu])
def test_crash_is_not_seen_by_a_front_end_that_never_reconnects(
    supervised: Supervised, kind: type[Vmm]
) -> None:
    source = random.Random(4)
    with talking(kind, supervised.path) as talk:
        for _ in range(CRASHES):
            talk.submit(IN_FLIGHT)
            time.sleep(source.uniform(0, 0.01))
            with supervised.manager.down():
                talk.submit(4)
            talk.finish()
            write = talk.write_alone()
            supervised.manager.restart(source.choice([signal.SIGKILL, signal.SIGTERM]))
            talk.check_result(write)  # the register outlives the process with the connection
        talk.check()


@pytest.mark.parametrize("kind", [Libkrun, Crosvm, Qemu])
def test_crash_during_the_set_up_is_not_seen(supervised: Supervised, kind: type[Vmm]) -> None:
    """Killed between messages, and while messages arrive."""
    manager, source = supervised.manager, random.Random(5)
    messages = 0

    @contextmanager
    def around() -> Iterator[None]:
        nonlocal messages
        messages += 1
        what = source.randrange(4)
        # The connection is stored after it is accepted; the first answer shows that it was.
        if messages == 1 or what > 1:
            yield
        elif what == 1:
            manager.kill()
            yield
        else:
            with manager.down():
                yield

    with talking(kind, supervised.path, around=around) as talk:
        assert manager.starts > 3
        talk.submit(IN_FLIGHT)
        talk.finish()
        talk.check()


@pytest.mark.parametrize("kind", [Crosvm, Qemu])
def test_ring_that_was_stopped_before_a_crash_continues_where_it_was(
    supervised: Supervised, kind: type[Vmm]
) -> None:
    with talking(kind, supervised.path) as talk:
        vmm, ring = talk.client.frontend, talk.client.ring
        assert isinstance(vmm, Vmm)
        for _ in range(3):
            talk.submit(IN_FLIGHT)
            base = vmm.stop()
            talk.submit(4)
            supervised.manager.kill()
            vmm.get_features()
            assert ring.used_index == base
            vmm.activate(ring, base)
            talk.finish()
            talk.check()
