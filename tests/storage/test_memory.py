# SPDX-License-Identifier: Apache-2.0
"""The memory that the blocks of a device take in the process."""

from __future__ import annotations

import ctypes
import os
import re
from pathlib import Path

import pytest

from tests.support.store import Open
from vhost_rpmb.rpmb import spec
from vhost_rpmb.storage.local.opening import open_store
from vhost_rpmb.storage.paths import Paths

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident(image: memoryview) -> int:
    """Bytes of memory behind an image, whose mapping has no other use."""
    address = ctypes.addressof(ctypes.c_char.from_buffer(image))
    (of_it,) = (
        text
        for text in re.split(r"^(?=[0-9a-f]+-)", Path("/proc/self/smaps").read_text(), flags=re.M)
        if text.startswith(f"{address:08x}-")
    )
    found = re.search(r"^Rss: +(\d+) kB$", of_it, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


@pytest.mark.parametrize("start", ["first", "second"])
def test_zeros_of_an_image_take_no_memory(opened: Open, tmp_path: Path, start: str) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as image:
        for address in (5, 30_000):
            image.seek(address * spec.BLOCK_SIZE)
            image.write(b"data")
        image.truncate(spec.MAX_CAPACITY)
    if start == "second":
        # Its memory is gone then: two adjacent mappings count as one.
        open_store(Paths.resolve(str(path)), initial_counter=1).close()
    store = opened(path, initial_counter=1)
    everything = bytes(store.image)
    assert [everything.index(b"data"), everything.rindex(b"data")] == [
        5 * spec.BLOCK_SIZE,
        30_000 * spec.BLOCK_SIZE,
    ]
    assert resident(store.image) == 2 * PAGE
