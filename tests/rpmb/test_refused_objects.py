# SPDX-License-Identifier: Apache-2.0
"""Objects of the engines that cannot be made: checks that the callers' own checks hide."""

from __future__ import annotations

import pytest

from vhost_rpmb.engine import Engine
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.frame import Frame


class Image:
    """A store as far as a device looks at it first."""

    key = None
    counter = 0

    def __init__(self, size: int) -> None:
        self.image = bytearray(size)
        self.damaged = bytearray(size // spec.BLOCK_SIZE)


@pytest.mark.parametrize(
    "size", [0, spec.BLOCK_SIZE, spec.CAPACITY_UNIT + 1, spec.MAX_CAPACITY + spec.CAPACITY_UNIT]
)
def test_device_refuses_an_image_of_a_wrong_size(engine: Engine, size: int) -> None:
    with pytest.raises(ValueError, match=f"128 KiB, not {size} bytes"):
        engine.RpmbDevice(Image(size))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [0, spec.FRAME_SIZE - 1, spec.FRAME_SIZE + 1])
def test_frame_of_a_wrong_size_is_refused(size: int) -> None:
    with pytest.raises(ValueError, match=f"512 bytes, not {size}"):
        Frame.unpack(bytes(size))
