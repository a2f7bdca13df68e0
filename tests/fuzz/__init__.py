# SPDX-License-Identifier: Apache-2.0
"""Fuzz targets: see targets.py for what they are, __main__.py for how to run them."""

from collections.abc import Callable
from pathlib import Path

from tests.fuzz.frames import Frames
from tests.fuzz.packed import Packed
from tests.fuzz.rings import Rings
from tests.fuzz.stream import Stream
from tests.fuzz.targets import Target
from vhost_rpmb.engine import Engine

TARGETS: dict[str, Callable[[Engine, Path], Target]] = {
    "rings": Rings,
    "packed": Packed,
    "frames": Frames,
    "stream": Stream,
}
