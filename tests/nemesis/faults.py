# SPDX-License-Identifier: Apache-2.0
"""Faults of members and of daemons, each of which ends with everything as before."""

from __future__ import annotations

import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence

from tests.nemesis.guests import Guest
from tests.nemesis.store import Member, Store
from tests.support.fleet import LEASE

BEYOND_LEASE = 1.6 * LEASE  # seconds
JUMP = "100000"  # seconds, of the clocks that do not go back


class MemberFaults:
    """Faults of the store."""

    def __init__(self, store: Store, chosen: random.Random) -> None:
        self._store = store
        self._random = chosen

    def _any(self) -> Member:
        return self._random.choice(self._store.members)

    def _others(self, member: Member) -> list[Member]:
        return [each for each in self._store.members if each is not member]

    def _stopped(self, member: Member, seconds: float) -> None:
        member.signal(signal.SIGSTOP)
        time.sleep(seconds)
        member.signal(signal.SIGCONT)

    def _killed(self, members: Sequence[Member], seconds: float, *before: str) -> None:
        for member in members:
            member.kill()
        time.sleep(seconds)
        for member in members:
            member.start(self._store.members, *before)

    def leader_killed(self) -> None:
        self._killed([self._store.leader()], 2)

    def leader_stopped(self) -> None:
        self._stopped(self._store.leader(), 4)

    def leader_isolated(self) -> None:
        place = self._store.leader().place
        place.isolate()
        time.sleep(4)
        place.join()

    def leader_cut_one_way(self) -> None:
        leader = self._store.leader()
        for other in self._others(leader):
            leader.place.cut(other.place)
        time.sleep(4)
        for other in self._others(leader):
            leader.place.mend(other.place)

    def leader_on_a_slow_disk(self) -> None:
        self._inject(self._store.leader(), "delay_enter=200000")

    def disk_fails(self) -> None:
        member = self._any()
        self._inject(member, "error=EIO")
        self._store.mend(member)

    def _inject(self, member: Member, how: str) -> None:
        assert member.process is not None
        command = ["strace", "-f", "-p", str(member.process.pid), "-o", "/dev/null"]
        tracer = subprocess.Popen(
            [*command, "-e", "trace=fdatasync", "-e", f"inject=fdatasync:{how}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(3)
        tracer.send_signal(signal.SIGINT)  # upon which it detaches
        tracer.wait()

    def member_killed(self) -> None:
        self._killed([self._any()], 1)

    def member_stopped(self) -> None:
        self._stopped(self._any(), 2)

    def all_killed(self) -> None:
        self._killed(self._store.members, 0)

    def clock_jumps(self) -> None:
        clocks = ("--boottime", JUMP, "--monotonic", JUMP)
        self._killed([self._any()], 0, "unshare", "--time", *clocks)

    def defragmented(self) -> None:
        self._any().ask("/v3/maintenance/defragment", {})


class DaemonFaults:
    """Faults of the daemon that serves a device now."""

    def __init__(self, pairs: Sequence[tuple[Guest, Guest]], chosen: random.Random) -> None:
        self._pairs = pairs
        self._random = chosen

    def _owner(self) -> tuple[Guest, Guest]:
        """The guest of a device that was answered last, and the other one."""
        first, second = self._random.choice(self._pairs)
        return (first, second) if first.served_at >= second.served_at else (second, first)

    def killed(self) -> None:
        self._owner()[0].signal(signal.SIGKILL)

    def ended(self) -> None:
        self._owner()[0].signal(signal.SIGTERM)

    def asleep_beyond_the_lease(self) -> None:
        owner, _ = self._owner()
        owner.signal(signal.SIGSTOP)
        time.sleep(BEYOND_LEASE)
        owner.signal(signal.SIGCONT)

    def asleep(self) -> None:
        owner, _ = self._owner()
        owner.signal(signal.SIGSTOP)
        time.sleep(1)
        owner.signal(signal.SIGCONT)

    def isolated_beyond_the_lease(self) -> None:
        place = self._owner()[0].place
        place.isolate()
        time.sleep(BEYOND_LEASE)
        place.join()

    def replaced_after_its_death(self) -> None:
        owner, other = self._owner()
        owner.signal(signal.SIGKILL)
        self._usurp(other)

    def replaced(self) -> None:
        """Take its device over while it runs, which is right for writes only."""
        self._usurp(self._owner()[1])

    @staticmethod
    def _usurp(guest: Guest) -> None:
        guest.mode = "now"
        guest.signal(signal.SIGKILL)


class Nemesis(threading.Thread):
    """Causes faults, one after another in an order of its own, until it is stopped."""

    def __init__(self, faults: Sequence[Callable[[], None]], chosen: random.Random) -> None:
        super().__init__(daemon=True)
        self.done: list[str] = []
        self.error: BaseException | None = None
        self._faults = list(faults)
        self._random = chosen
        self._stopping = threading.Event()

    def run(self) -> None:
        try:
            while not self._stopping.is_set():
                self._random.shuffle(self._faults)
                for fault in self._faults:
                    if self._stopping.wait(self._random.uniform(0.5, 1.5)):
                        return
                    fault()
                    self.done.append(fault.__name__)
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        self._stopping.set()
        self.join(60)
