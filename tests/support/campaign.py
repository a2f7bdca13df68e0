# SPDX-License-Identifier: Apache-2.0
"""The size of the hostile campaigns: a sample, or all with VHOST_RPMB_HOSTILE_FULL=1."""

from __future__ import annotations

import os
import random
from collections.abc import Iterable
from typing import TypeVar

DIVISOR = 1 if os.environ.get("VHOST_RPMB_HOSTILE_FULL") == "1" else 10

_Case = TypeVar("_Case")


def sample(cases: Iterable[_Case]) -> list[_Case]:
    """The cases that run: always the same ones, from all parts of the list."""
    found = list(cases)
    return random.Random(1).sample(found, -(-len(found) // DIVISOR))
