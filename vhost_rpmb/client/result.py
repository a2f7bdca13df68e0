# SPDX-License-Identifier: Apache-2.0
"""The report of a verb."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from vhost_rpmb.errors import OperatorError

__all__ = ["Result"]


class Result(NamedTuple):
    """The report of a verb: ``values`` for programs (--json), ``lines`` for people.

    ``error``: a problem that the verb found; it is raised after the report.
    """

    values: dict[str, Any]
    lines: Sequence[str] = ()
    error: OperatorError | None = None
