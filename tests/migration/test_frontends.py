# SPDX-License-Identifier: Apache-2.0
"""The device moves with the messages of Cloud Hypervisor and crosvm, in their order."""

from __future__ import annotations

import pytest

from tests.migration.test_copy import holds, is_fenced
from tests.support.daemon import PATIENCE
from tests.support.frontends import CloudHypervisor, Crosvm
from tests.support.hosts import Host, MovingFrontend
from tests.support.oracle import KEY
from vhost_rpmb.driver.rpmb import RpmbClient, Setup
from vhost_rpmb.vhost_user import wire


class MovingCloudHypervisor(MovingFrontend, CloudHypervisor):
    """Gives the state over a socket, before the virtio features."""

    through_socket = True


class MovingCrosvm(MovingFrontend, Crosvm):
    """Gives the state over a pipe, after the virtio features."""

    def start_device(self, features: int) -> None:
        blob, self.blob = self.blob, None
        super().start_device(features)
        if blob is not None:
            self.load(blob)


Moving = type[MovingCloudHypervisor] | type[MovingCrosvm]


def machine(host: Host, kind: Moving, blob: bytes | None = None) -> RpmbClient:
    frontend = kind.connect(host.socket_path, timeout=PATIENCE)
    frontend.blob = blob
    setup = Setup(protocol_features=kind.protocol_mask)
    return RpmbClient(frontend, KEY, timeout=PATIENCE, setup=setup)


def suspend(client: RpmbClient) -> tuple[int, bytes]:
    """Stop the ring and take the state; return the base as well."""
    frontend = client.frontend
    assert isinstance(frontend, (MovingCloudHypervisor, MovingCrosvm))
    return frontend.stop(), frontend.save()


@pytest.mark.parametrize("kind", [MovingCloudHypervisor, MovingCrosvm])
def test_device_moves(source: Host, destination: Host, kind: Moving) -> None:
    with machine(source, kind) as here:
        holds(here)
        if kind is MovingCloudHypervisor:  # it moves a machine only with a dirty log
            assert here.frontend._offered & wire.F_LOG_ALL
        _, blob = suspend(here)
    with machine(destination, kind, blob) as there:
        holds(there)
        assert there.write(4, b"c" * 256) == 3
    with source.machine(KEY) as here:  # with an error eventfd, which the two do not have
        is_fenced(here)


@pytest.mark.parametrize("kind", [MovingCloudHypervisor, MovingCrosvm])
def test_machine_continues_after_a_snapshot(source: Host, destination: Host, kind: Moving) -> None:
    """Its rings are set up anew on the same connection, with the bases of the snapshot."""
    with machine(source, kind) as here:
        base, snapshot = suspend(here)
        frontend = here.frontend
        assert isinstance(frontend, (MovingCloudHypervisor, MovingCrosvm))
        frontend.activate(here.ring, base)
        holds(here)
        assert here.write(4, b"c" * 256) == 3
    with destination.machine(KEY, snapshot) as there:
        is_fenced(there)


def test_local_migration_of_cloud_hypervisor(source: Host) -> None:
    """The new process connects to the same daemon."""
    with machine(source, MovingCloudHypervisor) as here:
        _, blob = suspend(here)
    with machine(source, MovingCloudHypervisor, blob) as there:
        holds(there)
        assert there.write(4, b"c" * 256) == 3
