# SPDX-License-Identifier: Apache-2.0
"""Each request of a device's life is lost, late, repeated, refused or its client's last one.

Faults that a random campaign rarely meets are all here: a copy of each change arrives before each
later request.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from tests.storage.fleet.story import KEYS, Story
from tests.support.fake_engine import FOREVER, Cluster, FakeEngine, Fault, Kind
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.storage.fleet.engine import Answer, Compare, Operation, Put, Refused, Unknown

RANDOM_PLANS = 100

EngineClass = Callable[[Cluster], FakeEngine]


def quiet_run(folder: Path, engine: EngineClass = FakeEngine) -> Cluster:
    cluster = Cluster(engine=engine)
    live(Story(cluster, folder))
    return cluster


def live(story: Story) -> None:
    try:
        story.run()
    finally:
        story.end()


def single(kind: Kind, folder: Path) -> Iterator[dict[int, Fault]]:
    """A plan for each request, and for late ones for each later request before which they come."""
    quiet = quiet_run(folder)
    if kind in (Kind.DELAY, Kind.DUPLICATE):
        for number in quiet.changes:
            for due in [*(each for each in quiet.changes if each > number), FOREVER]:
                yield {number: Fault(kind, due)}
    else:
        for number in range(quiet.count):
            yield {number: Fault(kind)}


def run_each(
    plans: Iterable[dict[int, Fault]],
    folder: Path,
    engine: EngineClass = FakeEngine,
    *,
    proof: bool = True,
) -> None:
    for plan in plans:
        story = Story(Cluster(plan, engine), folder)
        story.proof = proof
        try:
            live(story)
        except BaseException as error:
            error.add_note(f"the plan: {plan}")
            raise


@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.name.lower())
def test_no_acknowledged_write_is_lost_by_one_fault(kind: Kind, folder: Path) -> None:
    run_each(single(kind, folder), folder)


@pytest.mark.parametrize("kind", [Kind.CRASH_BEFORE, Kind.CRASH_AFTER])
def test_no_acknowledged_write_is_lost_by_a_death_that_nobody_can_prove(
    kind: Kind, folder: Path
) -> None:
    run_each(single(kind, folder), folder, proof=False)


def test_no_acknowledged_write_is_lost_by_several_faults(folder: Path) -> None:
    count = quiet_run(folder).count
    chosen = random.Random(14)
    kinds = [kind for kind in Kind if kind.name.startswith(("LOSE", "D", "CRASH"))]
    plans = []
    for _ in range(RANDOM_PLANS):
        numbers = chosen.sample(range(count), chosen.randint(2, 6))
        plans.append(
            {
                number: Fault(chosen.choice(kinds), number + chosen.randint(1, count))
                for number in numbers
            }
        )
    run_each(plans, folder)


# The faults find a store that breaks one of the rules.


class NoCompares(FakeEngine):
    """Every change of the state is applied, whoever owns the device."""

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        fenced = (KEYS.owner, KEYS.head)
        kept = [each for each in compare if each.key not in fenced or not each.value]
        return super().txn(kept, success, failure)


class ChunksCompareOwnerOnly(FakeEngine):
    """The puts of a checkpoint compare nothing that the checkpoint changes."""

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        if any(isinstance(each, Put) and b"/c/" in each.key for each in success):
            compare = [each for each in compare if each.key != KEYS.head]
        return super().txn(compare, success, failure)


class BelievesARead(FakeEngine):
    """A change without an answer counts as refused if a read does not show it."""

    def txn(
        self,
        compare: Sequence[Compare],
        success: Sequence[Operation],
        failure: Sequence[Operation] = (),
    ) -> Answer:
        try:
            return super().txn(compare, success, failure)
        except Unknown as error:
            heads = [put for put in success if isinstance(put, Put) and put.key == KEYS.head]
            present = self.cluster.data.get(KEYS.head)  # None before the creation
            if present and any(present != put.value for put in heads):
                raise Refused("not there") from error
            raise


@pytest.mark.parametrize(
    ("mutant", "kind"),
    [
        (NoCompares, Kind.DUPLICATE),
        (ChunksCompareOwnerOnly, Kind.DUPLICATE),
        (BelievesARead, Kind.DELAY),
    ],
)
def test_broken_store_is_found(mutant: EngineClass, kind: Kind, folder: Path) -> None:
    if mutant is not NoCompares:
        quiet_run(folder, mutant)  # without a fault it works
    with pytest.raises((AssertionError, StateError, Fenced)):
        run_each(single(kind, folder), folder, mutant)
