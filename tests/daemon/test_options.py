# SPDX-License-Identifier: Apache-2.0
"""The table of options: read without the argument parser, with the same result."""

from __future__ import annotations

import random

import pytest

from vhost_rpmb.cli import build_parser
from vhost_rpmb.errors import UsageError
from vhost_rpmb.options import OPTIONS, parse

NEEDED = (["--socket-path=s", "--fd=3", "--fd", "4"], ["--flash-path=f", "--store=etcd:c"])
WORDS = [
    *("--socket-path", "--socket-path=", "--socket-path=t", "--fd=-1", "--fd=x", "--flash-path=g"),
    *("-v", "-vv", "--verbose", "--verbose=1", "-d", "--debug", "--once", "--once=yes", "--strict"),
    *("--device", "--device=", "--device=a=b", "--take-over=now", "--take-over=later", "--sandbox"),
    *("off", "-", "--", "", "-1", "5", "--max-write-blocks", "--max-write-blocks=0", "--poll-us"),
    *("--virtio-features=-event-idx", "--virtio-features", "--virtio-features=x", "--key-set"),
    *("--initial-counter=7", "--initial-counter", "--state", "--zzz", "--help", "--key-path=k"),
]


def by_argparse(line: list[str]) -> dict[str, object] | None:
    try:
        return vars(build_parser().parse_args(line))
    except (UsageError, SystemExit):
        return None


@pytest.mark.parametrize("seed", range(20))
def test_random_lines_mean_the_same_to_both(seed: int, capfd: pytest.CaptureFixture[str]) -> None:
    chance = random.Random(seed)
    for _ in range(20):
        line = [chance.choice(group) for group in NEEDED if chance.random() < 0.9]
        line += chance.choices(WORDS, k=chance.randrange(4))
        chance.shuffle(line)
        found = parse(line)
        assert found is None or found == by_argparse(line), line


def test_right_line_needs_no_argparse() -> None:
    values = {"--virtio-features": "event-idx", "--socket-group": "0"}
    home = [("--fd", "3"), ("--flash-path", "f")]
    rest = [
        (
            option.name,
            values.get(option.name, option.choices[-1] if option.choices else "1"),
        )
        for option in OPTIONS
        if option.convert is not None and not option.group
    ]
    flags = [option.name for option in OPTIONS if option.convert is None]
    for lines in (
        [f"{name}={value}" for name, value in home + rest],
        [word for pair in home + rest for word in pair],
    ):
        line = [*lines, *flags, "-v"]
        found = parse(line)
        assert found == by_argparse(line)
        assert found is not None
        assert found["verbose"] == 2
        assert found["fd"] == 3
        assert found["once"] is True
