# SPDX-License-Identifier: Apache-2.0
"""Requests repeated until the engine gives a definite answer.

A request without an answer may be applied at any later time, even after a read that does not show
it. Reading again therefore settles nothing. The identical request is sent again until there is a
definite answer; the compares of a change make that safe: at most one copy can apply.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

from vhost_rpmb.errors import StateError, Stopped
from vhost_rpmb.log import Logger
from vhost_rpmb.storage.fleet.engine import (
    Answer,
    Compare,
    Engine,
    Get,
    LeaseEnded,
    Operation,
    Page,
    Refused,
    Unknown,
)

__all__ = ["Requests", "named_refusals"]

logger = Logger(__name__)

_FIRST_PAUSE = 0.005  # seconds
_LONGEST_PAUSE = 0.5  # seconds

T = TypeVar("T")


@contextmanager
def named_refusals(action: str, remedy: str = "") -> Iterator[None]:
    """Turn `Refused` into a StateError for the operator: the store refused this action."""
    try:
        yield
    except Refused as error:
        raise StateError(f"the store refused {action}: {error}{remedy}") from error


class Requests:
    """Sends the requests of one store; ``stopping`` is asked between two tries.

    ``report`` gets the reason when requests begin to wait, for the status of a service.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        stopping: Callable[[], bool] = lambda: False,
        report: Callable[[str], None] = lambda reason: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.engine = engine
        self._stopping = stopping
        self._report_wait = report
        self._sleep = sleep
        self._trouble = ""  # why there is no answer now

    def change(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation],
    ) -> Answer:
        """Apply a transaction of which each put compares what the transaction itself changes.

        Raises `Refused` if the first try was refused: nothing was applied. After a try without an
        answer a refusal of the next one decides nothing, except `LeaseEnded`. Raises `Stopped`.
        """
        return self._repeat(lambda: self.engine.txn(compare, success, failure), change=True)

    def read(self, compare: Sequence[Compare], keys: Sequence[bytes]) -> Answer:
        """Read single keys, if the compares hold. Raises `Refused` and `Stopped`."""
        gets = [Get(key) for key in keys]
        return self._repeat(lambda: self.engine.txn(compare, gets), change=False)

    def grant(self, seconds: int) -> int:
        """Create a lease; of several tries the unused ones end by themselves."""
        return self._repeat(lambda: self.engine.grant(seconds), change=False)

    def pages(self, key: bytes, end: bytes, limit: int) -> Iterator[tuple[bytes, bytes]]:
        """Read a range page by page, each of up to ``limit`` keys."""
        more = True
        while more:
            page = self._page(key, end, limit)
            yield from page.pairs
            more = page.more
            if more:
                key = page.pairs[-1][0] + b"\0"

    def _page(self, key: bytes, end: bytes, limit: int) -> Page:
        return self._repeat(lambda: self.engine.range(key, end, limit), change=False)

    def wait(self, seconds: float) -> None:
        """Pause. Raises `Stopped`."""
        if self._stopping():
            raise Stopped
        self._sleep(seconds)

    def _repeat(self, request: Callable[[], T], *, change: bool) -> T:
        pause = _FIRST_PAUSE
        uncertain = False  # an earlier try may be applied
        while True:
            try:
                answer = request()
            except LeaseEnded:
                raise
            except Refused as error:
                if not uncertain:
                    raise
                reason = str(error)
            except Unknown as error:
                uncertain = change
                reason = str(error)
            else:
                self._report("")
                return answer
            self._report(reason)
            self.wait(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _report(self, trouble: str) -> None:
        """Log once that there is no answer, and once that there is one again."""
        if trouble and not self._trouble:
            logger.warning("the store gives no definite answer, requests wait: %s", trouble)
            self._report_wait(trouble)
        elif self._trouble and not trouble:
            logger.warning("the store answers again")
        self._trouble = trouble
