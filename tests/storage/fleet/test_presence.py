# SPDX-License-Identifier: Apache-2.0
"""An owner that is provably dead is replaced at once; without a proof its lease is waited for."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.storage.fleet.story import KEYS, LEASE, MemoryStory, block
from tests.support.oracle import KEY
from vhost_rpmb.errors import Fenced, StateError
from vhost_rpmb.storage.fleet import presence
from vhost_rpmb.storage.fleet.engine import Unknown
from vhost_rpmb.storage.fleet.layout import Owner
from vhost_rpmb.storage.fleet.ownership import Ownership, try_take_over
from vhost_rpmb.storage.fleet.presence import Presence
from vhost_rpmb.storage.fleet.store import FleetStore

TOKEN = "0123456789abcdef" * 2

# A process that claims a token, and stays until its standard input ends.
_OWNER = """
import sys
from vhost_rpmb.storage.fleet.presence import Presence
claim = Presence(sys.argv[1], sys.argv[2]).claim(sys.argv[3])
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def owner(story: MemoryStory) -> FleetStore:
    """The owner of a device with one write."""
    store = story.open()
    assert store.commit(0, [], KEY)
    assert store.commit(1, [(0, block(1))], None)
    story.state = (1, KEY, {0: block(1)})
    return store


def seconds_until_open(story: MemoryStory) -> float:
    began = story.cluster.now
    story.open()
    return story.cluster.now - began


def owner_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.owner"))


def test_dead_owner_is_replaced_at_once(story: MemoryStory, owner: FleetStore) -> None:
    (before,) = owner_files(story.folder)
    story.bury(owner)
    assert seconds_until_open(story) < 1
    (after,) = owner_files(story.folder)
    assert after != before


def test_dead_owner_is_not_in_use(story: MemoryStory, owner: FleetStore) -> None:
    with pytest.raises(StateError, match="in use"):
        story.open("never")
    story.bury(owner)
    story.open("never")


def test_living_owner_is_waited_for(story: MemoryStory, owner: FleetStore) -> None:
    assert seconds_until_open(story) > LEASE - 1
    with pytest.raises(Fenced):
        owner.commit(2, [(0, block(2))], None)


def lose(folder: Path) -> None:
    for path in owner_files(folder):
        path.unlink()


def copy(folder: Path) -> None:
    """The folder as a backup, a copy to another host or a cloned disk has it."""
    copied = folder.with_name(folder.name + "-copy")
    shutil.copytree(folder, copied)
    lose(folder)
    for path in owner_files(copied):
        shutil.copy2(path, folder)
    shutil.rmtree(copied)


def damage(folder: Path) -> None:
    for path in owner_files(folder):
        os.truncate(path, 10)


@pytest.mark.parametrize("change", [lose, copy, damage])
@pytest.mark.parametrize("dead", [True, False], ids=["dead", "alive"])
def test_without_the_very_file_there_is_no_proof(
    story: MemoryStory, owner: FleetStore, change: Callable[[Path], None], dead: bool
) -> None:
    if dead:
        owner._ownership._claim.release(keep=True)
    change(story.folder)
    assert seconds_until_open(story) > LEASE - 1


def test_another_boot_proves_nothing(
    story: MemoryStory, owner: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner._ownership._claim.release(keep=True)
    monkeypatch.setattr(presence, "_BOOT", "another")
    assert seconds_until_open(story) > LEASE - 1


@pytest.mark.parametrize(
    ("name", "value"), [("_BOOT", ""), ("_LOCAL", frozenset())], ids=["boot", "file system"]
)
def test_host_without_the_means_claims_nothing(
    story: MemoryStory, monkeypatch: pytest.MonkeyPatch, name: str, value: object
) -> None:
    monkeypatch.setattr(presence, name, value)
    store = story.open()
    assert not owner_files(story.folder)
    monkeypatch.undo()
    assert seconds_until_open(story) > LEASE - 1
    store.close()


def test_released_device_leaves_no_file(story: MemoryStory, owner: FleetStore) -> None:
    owner.close()
    assert not owner_files(story.folder)
    assert seconds_until_open(story) < 1


def test_release_without_an_answer_leaves_the_proof(
    story: MemoryStory, owner: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The key "alive" may stay; an owner that released the device answers nothing more."""

    def lost(lease: int) -> None:
        raise Unknown("no answer")

    monkeypatch.setattr(owner._requests.engine, "revoke", lost)
    owner.close()
    assert KEYS.alive in story.cluster.data
    assert seconds_until_open(story) < 1


def test_owner_that_was_replaced_meanwhile_stays_fenced(
    story: MemoryStory, owner: FleetStore, folder: Path
) -> None:
    """The proof is about one token: a later owner is compared and waited for."""
    story.bury(owner)
    dead = Owner.unpack(story.cluster.data[KEYS.owner])
    found = dict(story.cluster.data)
    second = story.open()
    # A process that read the records before the second owner came, and now replaces the dead one.
    requests = story.requests()
    look = requests.read
    stale = iter([found])

    def read_late(*arguments: object) -> object:
        answer = look([], [KEYS.owner, KEYS.alive])
        return answer._replace(found=next(stale, answer.found))

    requests.read = read_late  # type: ignore[method-assign, assignment]
    here = Presence(str(folder), KEYS.device)
    here.claim(dead.token).release(keep=True)  # its file, which the second owner removed
    assert here.is_dead(dead.token)
    outcome = try_take_over(
        requests, KEYS, "expired", here, lease_seconds=LEASE, clock=lambda: story.cluster.now
    )
    assert not isinstance(outcome, Ownership)
    assert second.commit(2, [(0, block(2))], None)


def test_two_successors_of_a_dead_owner(story: MemoryStory, owner: FleetStore) -> None:
    story.bury(owner)
    first = story.open()
    assert seconds_until_open(story) > LEASE - 1
    with pytest.raises(Fenced):
        first.commit(2, [(0, block(2))], None)


@pytest.fixture
def here(folder: Path) -> Presence:
    return Presence(str(folder), "vm-1")


def test_lock_is_held_by_a_stopped_process_and_free_after_its_death(
    here: Presence, folder: Path
) -> None:
    command = [sys.executable, "-c", _OWNER, str(folder), "vm-1", TOKEN]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert not here.is_dead(TOKEN)
        process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, process.pid, os.WSTOPPED)
        assert not here.is_dead(TOKEN)
        process.kill()
        process.wait()
        assert here.is_dead(TOKEN)
        assert here.is_dead(TOKEN)


def test_folder_may_have_another_name(here: Presence, folder: Path) -> None:
    """As it has in another mount namespace: the kernel's lock is on the file."""
    here.claim(TOKEN).release(keep=True)
    link = folder / "link"
    link.symlink_to(folder)
    assert Presence(str(link), "vm-1").is_dead(TOKEN)


@pytest.mark.parametrize("token", ["", "../vm-1", TOKEN.upper(), TOKEN[:-1], TOKEN + "\n"])
def test_token_of_another_form_names_no_file(here: Presence, token: str) -> None:
    assert not here.is_dead(token)


def test_token_is_claimed_once(here: Presence) -> None:
    first = here.claim(TOKEN)
    here.claim(TOKEN).release()
    assert not here.is_dead(TOKEN)
    first.release(keep=True)
    first.release()
    assert here.is_dead(TOKEN)


def test_file_that_cannot_be_written_only_loses_the_proof(folder: Path) -> None:
    missing = Presence(str(folder / "missing"), "vm-1")
    missing.claim(TOKEN).release()
    missing.clear()
    assert not missing.is_dead(TOKEN)


def test_files_of_the_dead_are_removed_and_no_others(here: Presence, folder: Path) -> None:
    others = [Presence(str(folder), name).claim(TOKEN) for name in ("vm", "vm-1-2")]
    for other in others:
        other.release(keep=True)
    here.claim(TOKEN).release(keep=True)
    living = here.claim(TOKEN[::-1])
    (folder / "vm-1-0.owner").touch()
    here.clear()
    names = {path.name for path in folder.iterdir()}
    assert names == {
        f"vm-1-{TOKEN[::-1]}.owner", f"vm-{TOKEN}.owner", f"vm-1-2-{TOKEN}.owner", "vm-1-0.owner"
    }  # fmt: skip
    living.release()


def test_death_of_one_device_says_nothing_about_another(
    story: MemoryStory, owner: FleetStore
) -> None:
    story.bury(owner)
    other = Presence(str(story.folder), "vm-2")
    assert not other.is_dead(Owner.unpack(story.cluster.data[KEYS.owner]).token)


def test_daemon_that_takes_every_owner_for_dead_is_found(
    story: MemoryStory, owner: FleetStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Presence, "is_dead", lambda self, token: True)
    with pytest.raises(AssertionError, match="two stores may answer reads"):
        story.open()
    assert owner.until > story.cluster.now
