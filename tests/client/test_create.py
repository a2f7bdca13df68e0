# SPDX-License-Identifier: Apache-2.0
"""``vhost-rpmb-client create`` on storage that takes less than it needs."""

from __future__ import annotations

import resource
from pathlib import Path

import pytest

from vhost_rpmb.client.cli import build_parser
from vhost_rpmb.driver.errors import ClientError

# The key fits and the image does not; neither fits.
LIMITS = {"image": 4096, "key": 16}


@pytest.mark.parametrize("failing", LIMITS)
def test_failed_create_leaves_no_file(tmp_path: Path, failing: str) -> None:
    paths = {"image": tmp_path / "rpmb.img", "key": tmp_path / "rpmb.key"}
    arguments = build_parser().parse_args(
        ["create", str(paths["image"]), f"--random-key={paths['key']}"]
    )
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMITS[failing], limits[1]))
    try:
        with pytest.raises(ClientError, match=f"cannot create {paths[failing]}: File too large"):
            arguments.run(arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
    arguments.run(arguments)
    assert paths["key"].stat().st_size == 32
