# SPDX-License-Identifier: Apache-2.0
"""The commands of docs/guides/fleet.md: ``python -m tests.e2e.fleet_guide`` in its own namespaces.

/etc and /var/lib are overlays that end with the process, members are on hosts with the addresses of
the guide. Commands of systemd run in test_systemd_fleet.py: daemons are processes
here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.nemesis import network
from tests.nemesis.network import Place
from tests.support.daemon import PATIENCE, Daemon, until
from tests.support.documents import blocks_of_guide
from tests.support.etcd import make_etcd, make_etcdctl
from tests.support.oracle import KEY
from vhost_rpmb.driver.rpmb import RpmbClient

NETWORK = "192.0.2"
MEMBERS = {f"etcd-{number}": f"{NETWORK}.1{number}" for number in (1, 2, 3)}
CONFIG = "/etc/vhost-user-rpmb/fleet.toml"
WAITS = "waiting for the end of its lease"
A, B = b"a" * 256, b"b" * 256


def block(beginning: str) -> str:
    """The one block with a command or line."""
    (found,) = (text for _, text in blocks_of_guide("fleet") if beginning in text)
    return found


def of_member(text: str, name: str) -> str:
    """The block for a member: the first line changed, as the guide says."""
    first, rest = text.split("\n", 1)
    data = first.partition("DATA=")[2]
    return f"NAME={name} ADDRESS={MEMBERS[name]} DATA={data}-{name}\n{rest}"


class Operator:
    """A shell of root, whose variables last."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._before = "set -eu\n"

    def run(self, text: str) -> str:
        exports = [line for line in text.splitlines() if line.startswith("export")]
        done = subprocess.run(
            ["bash", "-c", self._before + text],
            cwd=self._folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}"
        self._before += "\n".join([*exports, ""])
        return done.stdout

    def until(self, text: str) -> str:
        """Repeat a command until it works."""
        end = time.monotonic() + 60
        while True:
            try:
                return self.run(text)
            except AssertionError:
                if time.monotonic() > end:
                    for log in self._folder.glob("*.log"):
                        print(log, log.read_text()[-3000:], file=sys.stderr)
                    raise
                time.sleep(0.5)


@contextmanager
def members(folder: Path, command: str, places: list[Place]) -> Iterator[None]:
    """The three members, until the end of the context."""
    started = []
    try:
        for place in places:
            text = of_member(command, place.name).replace("\netcd ", "\nexec etcd ")
            words = [*place.enter, "bash", "-c", text]
            with (folder / f"{place.name}.log").open("ab") as log:
                started.append(subprocess.Popen(words, cwd=folder, stdout=log, stderr=log))
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def daemon(folder: Path, name: str) -> Daemon:
    """What the unit starts, with the secrets where it has them."""
    made = Daemon(folder, sandbox=["--sandbox=on"])
    at = made.command_line.index(f"--flash-path={made.flash_path}")
    made.command_line[at : at + 1] = [f"--store=etcd:{CONFIG}", f"--device={name}"]
    made.environment["CREDENTIALS_DIRECTORY"] = "/etc/vhost-user-rpmb"
    return made


def prepare(folder: Path) -> list[Place]:
    for place in ("/etc", "/var/lib"):
        above = folder / place.replace("/", "-")
        for name in ("upper", "work"):
            (above / name).mkdir(parents=True)
        layers = f"lowerdir={place},upperdir={above}/upper,workdir={above}/work"
        command = ["mount", "-t", "overlay", "overlay", "-o", layers, place]
        subprocess.run(command, check=True)
    network.prepare(NETWORK)
    programs = [make_etcd().parent, make_etcdctl().parent, Path(sys.executable).parent]
    os.environ["PATH"] = ":".join([*map(str, programs), os.environ["PATH"]])
    return [
        Place(name, int(address.rpartition(".")[2]), NETWORK) for name, address in MEMBERS.items()
    ]


def main() -> None:
    with tempfile.TemporaryDirectory(dir="/dev/shm") as name:
        folder = Path(name)
        tell(folder, Operator(folder), prepare(folder))
    print("told")


def tell(folder: Path, operator: Operator, places: list[Place]) -> None:
    operator.run(block("openssl req -x509"))
    with members(folder, block("\netcd --name"), places):
        users = block("etcdctl user add root")
        secrets, _, commands = users.partition("etcdctl user")
        operator.run(secrets)
        operator.until("etcdctl endpoint health")
        operator.run(f"etcdctl user{commands}")
        operator.run(block("install -d"))
        Path(CONFIG).write_text(block("endpoints = "))
        created = block("fleet create")
        assert "no running daemon" in operator.until(created)

        with daemon(folder, "vm1") as served, served.client() as guest:
            guest.program_key(KEY)
            guest.write(0, A)
        move(folder)
        transfer(folder, operator)
        lose(folder, operator)
        operator.run(block("snapshot save"))
        with daemon(folder, "vm1") as served, served.client(KEY) as guest:
            guest.write(0, B)
    for name in MEMBERS:
        operator.run(of_member(block("etcdutl"), name))
    data = "DATA=/var/lib/etcd-rpmb"
    restored = block("\netcd --name").replace(data, f"{data}-restored")
    with members(folder, restored, places):
        operator.until(f"vhost-rpmb-client fleet list {CONFIG}")
        refused = daemon(folder, "vm1")
        try:
            refused.start()
            with refused.client(KEY) as guest:
                guest.read_counter()
        except Exception:
            assert "the store went back" in refused.log, refused.log
        else:
            raise AssertionError("a restored backup is served")
        refused.kill()
        operator.run(block("fleet quarantine"))
        with daemon(folder, "vm1") as served, served.client(KEY) as guest:
            assert guest.read(0, 1) == A


def move(folder: Path) -> None:
    """The daemon of another host is started while the first one serves; one move fails."""
    other = folder / "other"
    other.mkdir()
    with daemon(folder, "vm1") as source, daemon(other, "vm1") as destination:
        with source.client(KEY) as leaving, destination.client() as arriving:
            arriving.frontend.stop_ring()  # as that of a virtual machine that waits
            leaving.write(0, B)
            leaving.frontend.stop_ring()
            leaving.frontend.start_ring(leaving.ring)  # it goes on
            leaving.write(0, A)
            counter = leaving.read_counter()
            leaving.frontend.stop_ring()
            arriving.frontend.start_ring(arriving.ring)
            assert arriving.read_counter() == counter
            assert arriving.read(0, 1) == A
        # The other order: the ring runs here before it stops there.
        with ThreadPoolExecutor(1) as threads, source.client(KEY) as leaving:
            assert leaving.read_counter() == counter
            before = destination.log.count(WAITS)
            waiting = threads.submit(read_one, destination)
            until(lambda: destination.log.count(WAITS) > before)
            leaving.write(0, B)
            leaving.frontend.stop_ring()
            assert waiting.result(PATIENCE) == B
            leaving.frontend.start_ring(leaving.ring)
            leaving.write(0, A)


def read_one(served: Daemon) -> bytes:
    with RpmbClient.connect(served.socket_path, KEY, timeout=PATIENCE) as guest:
        return guest.read(0, 1)


def transfer(folder: Path, operator: Operator) -> None:
    """A device in files goes into the store and back."""
    Path("/var/lib/vm2").mkdir()
    Path("/var/lib/vm2/rpmb.img").write_bytes(bytes(128 * 1024))
    operator.run(block("fleet import"))
    assert Path("/var/lib/vm2/new.img").stat().st_size == 128 * 1024


def lose(folder: Path, operator: Operator) -> None:
    """A host dies; its device is freed at once."""
    lost = daemon(folder, "vm1")
    lost.start()
    with lost.client(KEY) as guest:
        guest.write(0, A)
        lost.kill()
    operator.run(block("fleet take-over"))
    with daemon(folder, "vm1") as served, served.client(KEY) as guest:
        assert guest.read(0, 1) == A


if __name__ == "__main__":
    main()
