# SPDX-License-Identifier: Apache-2.0
"""The store of a running device: each commit is one transaction that compares owner and head.

A rule holds for each change here: every put compares something that the same change replaces, so
that a copy of the request that arrives later applies nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from vhost_rpmb.errors import Fenced, Stopped
from vhost_rpmb.log import FailureLog, Logger
from vhost_rpmb.rpmb import spec
from vhost_rpmb.rpmb.replay import NO_REPLAY, Replay
from vhost_rpmb.storage.fleet.contents import Contents, Device, State
from vhost_rpmb.storage.fleet.engine import Answer, Compare, Delete, Get, Operation, Put, Refused
from vhost_rpmb.storage.fleet.layout import (
    CHUNK,
    CHUNK_BLOCKS,
    Entry,
    Head,
    Keys,
    Table,
    chain,
    pack_chunk,
)
from vhost_rpmb.storage.fleet.ownership import EXPORTED, Ownership
from vhost_rpmb.storage.fleet.requests import Requests
from vhost_rpmb.storage.fleet.witness import Witness
from vhost_rpmb.storage.interface import Resources

__all__ = ["FleetStore"]

logger = Logger(__name__)

_CHUNKS_PER_CHANGE = 8  # 128 KiB: the engine keeps thousands of requests in memory
_PAUSE = 0.1  # seconds between two tries to renew a lease that has ended
_SHORTEST_LOG = 32 * 1024  # bytes


class FleetStore:
    """The durable state of one device that this daemon owns in a replicated engine.

    Implements `vhost_rpmb.storage.interface`. `commit`, `checkpoint` and `confirm` raise `Fenced`
    or `Stopped`, upon which the process ends without an answer. Reads may be answered from
    ``image`` only before ``until``; to be called in intervals, `renew` moves it ahead. With
    ``confirmed_reads`` no clock is trusted: `confirm` asks the engine.
    """

    def __init__(
        self,
        requests: Requests,
        keys: Keys,
        ownership: Ownership,
        device: Device,
        contents: Contents,
        witness: Witness,
        revision: int,
        *,
        confirmed_reads: bool = False,
    ) -> None:
        self._requests = requests
        self._keys = keys
        self._ownership = ownership
        self.witness = witness
        self._revision = revision
        self._device = device
        self._memory = contents.memory
        self._sealer = device.sealer
        self._life = device.info.life
        self._head = device.head
        self._head_record = device.head_record
        self._versions = contents.versions
        self._pending = contents.pending
        self._log_bytes = contents.log_bytes
        self._last_chain = contents.last_chain
        self._limit = max(_SHORTEST_LOG, device.info.size // 4)
        self._checkpoint_at = 2 * self._limit
        self._failures = FailureLog(logger, "writes are made durable again")
        self._refusals = FailureLog(logger, "reads are confirmed again")
        self._closed = False
        self.name = device.info.life[:16]
        self.image = memoryview(contents.memory)
        self.damaged = bytearray(device.info.size // spec.BLOCK_SIZE)
        self.counter = device.head.counter
        self.key = contents.key
        self.replay = contents.replay
        self._owed = bool(contents.replay.chains)
        self._confirmed_reads = confirmed_reads
        self._confirmed = False  # by a commit that no `confirm` followed yet

    @property
    def until(self) -> float:
        """The end of the time, in seconds of CLOCK_BOOTTIME, in which reads may be answered."""
        return self._ownership.until

    def confirm(self) -> None:
        """Return as soon as reads may be answered. Raises `Fenced` and `Stopped`."""
        if self._confirmed_reads:
            self._ask()
            return
        while not self._ownership.certain:
            if not self.renew():
                self._requests.wait(_PAUSE)

    def _ask(self) -> None:
        """Ask the engine whether the state in memory is the latest one; a commit just did."""
        while not self._confirmed:
            try:
                # The reads for a failed compare make etcd ask its other members: a transaction
                # without any request is answered by one member alone.
                answer = self._change([])
            except Refused as error:
                self._refusals.report(f"reads wait, the store refuses to confirm them: {error}")
                self._requests.wait(_PAUSE)
                continue
            self._refusals.report("")
            if not answer.succeeded:
                self._check(answer, self._head_record)
            break
        self._confirmed = False

    def renew(self) -> bool:
        """Move ``until`` ahead; False if the engine does not answer. Raises `Fenced`."""
        renewed = self._ownership.renew()
        if renewed:
            self._note()
            self.witness.flush()
        return renewed

    def commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay = NO_REPLAY,
    ) -> bool:
        """Make counter, blocks, a new key and a record durable atomically; wait for the engine.

        False: the engine refused it, and nothing has changed. Raises `Fenced` and `Stopped`.
        """
        return self._commit(counter, blocks, key, replay)

    def _commit(
        self,
        counter: int,
        blocks: list[tuple[int, bytes]],
        key: bytes | None,
        replay: Replay,
        *more: Operation,
    ) -> bool:
        before = self._head
        seq = before.seq + 1
        sealed = self._sealer.seal(Entry(counter, blocks, replay.pack()).pack(), Entry.place(seq))
        head = before._replace(
            counter=counter,
            seq=seq,
            chain=chain(before.chain, sealed),
            programmed=before.programmed or key is not None,
        )
        puts: list[Operation] = [Put(self._keys.entry(self._life, seq), sealed), *more]
        if key is not None:
            puts.append(Put(self._keys.key(self._life), self._sealer.seal(key, b"key")))
        try:
            self._replace_head(head, puts)
        except Refused as error:
            self._failures.report(f"a write could not be made durable: {error}")
            return False
        self._failures.report("")
        self._confirmed = True
        self._last_chain = before.chain
        self.counter = counter
        self.replay = replay
        self._owed = True
        if key is not None:
            self.key = key
        for address, data in blocks:
            start = address * spec.BLOCK_SIZE
            self.image[start : start + spec.BLOCK_SIZE] = data
            self._pending.add(address // CHUNK_BLOCKS)
        self._log_bytes += len(sealed)
        if self._log_bytes >= self._checkpoint_at:
            self.checkpoint()
        return True

    def settle(self) -> None:
        """Note that no answer is owed, so that `close` empties the replay record."""
        self._owed = False

    @property
    def checkpoint_due(self) -> bool:
        """Whether the log is long enough to be moved into the chunks."""
        return self._log_bytes >= self._limit

    def checkpoint(self) -> bool:
        """Write the changed chunks, then delete the log except its last entry.

        False: the engine refused it; nothing is lost, the log stays. Raises `Fenced` and `Stopped`.
        """
        if self._head.folded == self._head.seq:
            return True
        changed = sorted(self._pending)
        try:
            for first in range(0, len(changed), _CHUNKS_PER_CHANGE):
                self._put_chunks(changed[first : first + _CHUNKS_PER_CHANGE])
            self._cut_log(changed)
        except Refused as error:
            self._checkpoint_at = self._log_bytes + self._limit
            logger.error(
                "%d chunks could not be written (the log has them): %s", len(changed), error
            )
            return False
        self._pending.clear()
        self._log_bytes = 0
        self._checkpoint_at = 2 * self._limit
        return True

    def checkpoint_slice(self) -> bool | None:
        """As `checkpoint`: all of it."""
        return self.checkpoint()

    def _put_chunks(self, numbers: Sequence[int]) -> None:
        """Put chunks as they are in memory; repeated later, it compares a head that is gone."""
        puts = []
        for number in numbers:
            data = bytes(self.image[number * CHUNK : (number + 1) * CHUNK])
            record = pack_chunk(self._sealer, number, self._head.seq, data)
            puts.append(Put(self._keys.chunk(self._life, number), record))
        answer = self._change(puts)
        if not answer.succeeded:
            self._check(answer, self._head_record)

    def _cut_log(self, changed: Sequence[int]) -> None:
        """Declare the chunks complete; the last entry stays, for the record that it has."""
        head = self._head._replace(folded=self._head.seq)
        versions = list(self._versions)
        for number in changed:
            versions[number] = head.seq
        table = Table(versions, self._last_chain).pack(self._sealer, head.folded)
        log = self._keys.log(self._life)
        self._replace_head(
            head,
            [
                Put(self._keys.table(self._life), table),
                Delete(log, self._keys.entry(self._life, head.seq)),
            ],
        )
        self._versions = versions

    def _replace_head(self, head: Head, operations: Sequence[Operation]) -> None:
        record = head.pack(self._sealer)
        answer = self._change([Put(self._keys.head, record), *operations])
        if not answer.succeeded:
            self._check(answer, record)
        self._head, self._head_record = head, record

    def _change(self, operations: Sequence[Operation]) -> Answer:
        """Apply a change if this daemon owns the device and the head is the known one."""
        answer = self._requests.change(
            [self._ownership.compare, Compare(self._keys.head, self._head_record)],
            operations,
            [Get(self._keys.owner), Get(self._keys.head)],
        )
        self._revision = answer.revision
        return answer

    def _check(self, answer: Answer, expected: bytes) -> None:
        """Judge a change whose compare failed: done by an earlier try if the head is ``expected``.

        Raises `Fenced` otherwise.
        """
        self._ownership.check(answer.found.get(self._keys.owner))
        if answer.found.get(self._keys.head) != expected:
            raise Fenced(
                f"device {self._keys.device}: expected the state that this daemon wrote, found"
                " another: if the store was restored from a backup, quarantine it"
            )

    def hand_out(self, token: str) -> None:
        """Give the device up for ever, to the files that have the token. Raises `Fenced`."""
        owner = self._ownership.owner
        gone = owner._replace(epoch=owner.epoch + 1, token=token, state=EXPORTED).pack()
        answer = self._change([Put(self._keys.owner, gone)])
        if not answer.succeeded and answer.found.get(self._keys.owner) != gone:
            self._check(answer, self._head_record)

    def _note(self) -> None:
        self.witness.note(self._keys.device, self._head, self._revision)

    def resources(self) -> Resources:
        """Return the folder of the witness and the ports of the engine."""
        return self.witness.resources()._replace(ports=self._requests.engine.ports)

    def release(self) -> State:
        """Let another daemon take the device over at once; return the state and its head.

        The caller has the witness record it.
        The replay record becomes empty if no answer is owed. That is tried once: an outage must not
        make the stop of a ring wait.
        """
        free = bool(self.replay.chains) and not self._owed and self._empty_record()
        self._ownership.release(free=free)
        self._note()
        return State(
            self._device._replace(head_record=self._head_record, head=self._head),
            Contents(
                self._memory,
                self._versions,
                self._pending,
                self._log_bytes,
                self.replay,
                self.key,
                self._last_chain,
            ),
            {self._keys.owner: self._ownership.record},
        )

    def _empty_record(self) -> bool:
        """Empty the replay record, and delete the key "alive" with the same request."""
        once = Requests(self._requests.engine, stopping=lambda: True)
        requests, self._requests = self._requests, once
        try:
            with suppress(Fenced, Stopped):
                return self._commit(self.counter, [], None, NO_REPLAY, Delete(self._keys.alive))
            return False
        finally:
            self._requests = requests

    def close(self) -> None:
        """Release the device and close the connection; idempotent."""
        if self._closed:
            return
        self._closed = True
        self.release()
        self.witness.flush()
        self._requests.engine.close()
