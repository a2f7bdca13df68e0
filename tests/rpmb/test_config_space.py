# SPDX-License-Identifier: Apache-2.0
"""The configuration space and the identity of the device."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.rig import Rig, RigFactory, make_image
from vhost_rpmb.virtio import features


def test_config_has_capacity_and_the_default_limits(rig: Rig) -> None:
    assert rig.device.config == bytes((1, 32, 255))


@pytest.mark.parametrize("units", [1, 2, 127, 128])
def test_config_capacity_is_in_units_of_128_kib(
    make_rig: RigFactory, tmp_path: Path, units: int
) -> None:
    rig = make_rig(make_image(tmp_path / "sized", units))
    assert rig.device.config[0] == units


@pytest.mark.parametrize("rig_home", ["files"], indirect=True)
def test_config_capacity_is_at_most_16_mib(make_rig: RigFactory, tmp_path: Path) -> None:
    rig = make_rig(make_image(tmp_path / "large", 256))
    assert rig.device.config[0] == 0x80


def test_config_has_the_chosen_limits(make_rig: RigFactory) -> None:
    rig = make_rig(max_write_blocks=7, max_read_blocks=9)
    assert rig.device.config[1:] == bytes((7, 9))


def test_config_announces_no_limit_of_a_read_as_0(make_rig: RigFactory) -> None:
    rig = make_rig(max_read_blocks=0)
    assert rig.device.config == bytes((1, 32, 0))


@pytest.mark.parametrize(
    ("name", "limit", "allowed"),
    [
        ("max_write_blocks", 0, "1 to 255"),
        ("max_write_blocks", 256, "1 to 255"),
        ("max_read_blocks", -1, "0 to 255"),
        ("max_read_blocks", 256, "0 to 255"),
    ],
)
def test_limit_out_of_range_is_refused(
    make_rig: RigFactory, name: str, limit: int, allowed: str
) -> None:
    with pytest.raises(ValueError, match=allowed):
        make_rig(**{name: limit})


@pytest.mark.parametrize(
    "offered", [features.DEFAULT, features.REQUIRED, features.DEFAULT | 1 << 34]
)
def test_device_offers_the_chosen_features(make_rig: RigFactory, offered: int) -> None:
    assert make_rig(virtio_features=offered).device.features == offered


@pytest.mark.parametrize(
    ("offered", "expected"),
    [
        (0, "VERSION_1"),
        (features.REQUIRED | 1 << 36, "optional feature bits"),
        (features.REQUIRED | 1 << 35, "in-order only together with indirect-desc"),
    ],
)
def test_features_that_break_a_rule_are_refused(
    make_rig: RigFactory, offered: int, expected: str
) -> None:
    with pytest.raises(ValueError, match=expected):
        make_rig(virtio_features=offered)


def test_it_is_virtio_device_28_with_one_queue(rig: Rig) -> None:
    assert (rig.device.device_id, rig.device.num_queues) == (28, 1)
