# SPDX-License-Identifier: Apache-2.0
"""A device that obeys the rules of a script, in front of the real one.

It takes one chain at a time, so that each is published before the next one is executed: what the
real device promises about durable writes holds for every request without a rule. A request reaches
the real device through a virtqueue in private memory, unchanged. The real device knows nothing of
rules, and both engines have the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

from vhost_rpmb.closing import Closing
from vhost_rpmb.engine import Engine
from vhost_rpmb.errors import StateError
from vhost_rpmb.injection.answers import Answers, Request, split
from vhost_rpmb.injection.private import MAX_BYTES, PrivateQueue
from vhost_rpmb.injection.script import WRITES, Action, Rule, Script
from vhost_rpmb.log import Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.results import request_name
from vhost_rpmb.storage.interface import DeviceStore
from vhost_rpmb.virtio import features
from vhost_rpmb.virtio.flags import Unanswered

__all__ = ["InjectedDevice"]

_OF_A_REQUEST = (Action.ANSWER, Action.CORRUPT)  # other actions are about its whole chain

logger = Logger(__name__)


class _Chain:
    """A chain at hand: its requests with their rules, and how far it got."""

    def __init__(self, raw: bytes, faults: list[_Faulted]) -> None:
        self.raw = raw
        self.faults = faults
        rules = [rule for each in faults for rule in each.rules]
        delays = [rule for rule in rules if rule.action is Action.DELAY]
        others = [rule for rule in rules if rule.action not in (*_OF_A_REQUEST, Action.DELAY)]
        self.end = others[0] if others else None  # in place of an answer
        self.answer: bytes | None = None  # None: not executed yet
        self.delay_after = sum(rule.seconds for rule in delays if rule.after)
        self.due = time.monotonic() + sum(rule.seconds for rule in delays if not rule.after)


class _Faulted(NamedTuple):
    request: Request
    rules: list[Rule]

    @property
    def altered(self) -> list[Rule]:
        """The rules about the answer to this request."""
        return [rule for rule in self.rules if rule.action in _OF_A_REQUEST]


class InjectedDevice(Closing):
    """An RPMB device with the faults of a script; ``make`` makes the real one.

    ``wait`` waits for that many seconds or until there is something else to do. Requests are
    counted from the creation of the object on, over all connections.
    """

    num_queues = spec.RPMB_NUM_QUEUES
    journal: memoryview | None = None  # no other process continues a connection

    def __init__(
        self,
        script: Script,
        store: DeviceStore,
        make: Callable[[], Any],
        engine: Engine,
        wait: Callable[[float], object],
    ) -> None:
        script.check(len(store.image) // spec.BLOCK_SIZE)
        self._script = script
        self._make = make
        self._wait = wait
        _jump(script, store)
        self._device = make()
        self._queue = PrivateQueue(engine)
        self._answers = Answers(store)
        self._counts = [0] * len(script.rules)
        self._chain: _Chain | None = None
        self._postponed = 0.0  # the time when the chain at hand is due; 0: there is none
        self._disconnected: Rule | None = None
        self.served = 0
        logger.warning("faults are injected as %s says: not for production", script.path)

    def close(self) -> None:
        """Free the private memory."""
        self._queue.close()

    @property
    def features(self) -> int:
        """The virtio feature bits of the device; not IN_ORDER where an answer may be lost."""
        offered: int = self._device.features
        if any(rule.action is Action.LOSE for rule in self._script.rules):
            offered &= ~features.OPTIONAL["in-order"]
        return offered

    @property
    def config(self) -> bytes:
        """The configuration space of the device."""
        config: bytes = self._device.config
        return config

    def restore_register(self, used_index: int) -> None:
        """There is no journal."""

    def clear_register(self) -> None:
        """Clear the result register: a new connection begins."""
        self._chain = None
        self._answers.register = None
        self._device.clear_register()

    @property
    def register(self) -> bytes:
        """The result register, for another host."""
        register: bytes = self._device.register
        return register

    @register.setter
    def register(self, packed: bytes) -> None:
        self._device.register = packed

    def reload(self) -> None:
        """Take the durable state again."""
        self._device.reload()

    def reset(self) -> None:
        """Reset the device; the counts of the rules go on."""
        self._chain = None
        self._answers.register = None
        self._device.reset()

    def process(self, queue: Any) -> int:
        """Serve one chain, or wait for one that is delayed; EOFError to disconnect."""
        self._postponed = 0.0
        flags: int = queue.answer_chains(self._answer, MAX_BYTES, 1)
        if self._disconnected is not None:
            rule, self._disconnected = self._disconnected, None
            # As after a crash: the answer of a durable write is owed to a chain that comes again.
            self._device = self._make()
            raise EOFError(f"injected by {rule}")
        if self._postponed:
            self._wait(max(self._postponed - time.monotonic(), 0.0))
        return flags

    def _answer(self, raw: bytes, room: int) -> bytes | Unanswered:
        """Answer one chain; a delayed one is asked about again, and is known by its bytes."""
        chain = self._chain
        if chain is None or chain.raw != raw:
            chain = self._chain = self._begin(raw, room)
        if time.monotonic() < chain.due:
            self._postponed = chain.due
            return Unanswered.LATER
        if chain.answer is None:
            executed = chain.end is None or chain.end.after
            chain.answer = self._execute(chain, room) if executed else b""
            if chain.delay_after:
                chain.due = time.monotonic() + chain.delay_after
                self._postponed = chain.due
                return Unanswered.LATER
        self._chain = None
        self.served += 1
        if chain.end is None:
            whole = min(room, MAX_BYTES) // spec.FRAME_SIZE * spec.FRAME_SIZE
            return chain.answer[:whole]
        if chain.end.action is Action.EMPTY:
            return b""
        if chain.end.action is Action.DISCONNECT:
            self._disconnected = chain.end
        return Unanswered.NEVER

    def _begin(self, raw: bytes, room: int) -> _Chain:
        """Count the requests of a new chain and find the rules that act on them."""
        faults = []
        _, max_write_blocks, max_read_blocks = self._device.config
        frames = room // spec.FRAME_SIZE
        for request in split(raw, frames, max_write_blocks, max_read_blocks):
            rules = []
            for index, rule in enumerate(self._script.rules):
                if rule.concerns(request.req_resp, request.blocks):
                    self._counts[index] += 1
                    if rule.selects(self._counts[index]):
                        rules.append(rule)
                        # No limit on the lines: the operator asked for each of these faults.
                        logger.info(
                            "%s: %s, number %d of the rule",
                            *(rule, request_name(request.req_resp), self._counts[index]),
                        )
            faults.append(_Faulted(request, rules))
        return _Chain(raw, faults)

    def _execute(self, chain: _Chain, room: int) -> bytes:
        """Execute a chain: as it is, or request by request where an answer is altered."""
        if not self._is_altered(chain):
            if any(each.request.req_resp in WRITES for each in chain.faults):
                self._answers.register = None
            return self._queue.run(self._device, chain.raw, room)
        answer = b""
        frames = min(room, MAX_BYTES) // spec.FRAME_SIZE
        for each in chain.faults:
            left = frames - len(answer) // spec.FRAME_SIZE
            part = self._answers.answer(each.request, each.altered, self._run, left)
            if len(part) <= left * spec.FRAME_SIZE:
                answer += part
        return answer

    def _is_altered(self, chain: _Chain) -> bool:
        """Whether a rule is about an answer of the chain, also one from the register."""
        if any(each.altered for each in chain.faults):
            return True
        if self._answers.register is None:
            return False
        types = [each.request.req_resp for each in chain.faults]
        first = next((each for each in types if each in _REGISTER), None)
        return first == spec.VIRTIO_RPMB_REQ_RESULT_READ

    def _run(self, request: bytes, frames: int) -> bytes:
        return self._queue.run(self._device, request, frames * spec.FRAME_SIZE)


_REGISTER = WRITES | {spec.VIRTIO_RPMB_REQ_RESULT_READ}  # requests that use the result register


def _jump(script: Script, store: DeviceStore) -> None:
    """Raise the write counter as the script says, durably. Raises StateError."""
    wanted = script.write_counter
    if wanted is None or wanted == store.counter:
        return
    if wanted < store.counter:
        logger.warning(
            "write-counter=%d of %s was not applied: the device's write counter is %d, and only"
            " increases",
            *(wanted, script.path, store.counter),
        )
    elif not store.commit(wanted, [], None, store.replay):
        raise StateError(f"{script.path}: the write counter could not be made durable, see the log")
