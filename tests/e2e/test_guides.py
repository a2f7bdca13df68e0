# SPDX-License-Identifier: Apache-2.0
"""What the guides to QEMU and to the guest's side print, run as it is printed."""

from __future__ import annotations

import shlex
import shutil
import tempfile
from pathlib import Path

import pytest

from tests.documents import ROOT, blocks_of_guide, blocks_that_begin, commands
from tests.e2e.cache import Steps
from tests.e2e.daemon import DaemonProcess
from tests.e2e.kit import AMD64, GUEST_FOLDER, GUEST_SOURCES, Kit
from tests.e2e.vm import Guest, VirtualMachine

pytestmark = [
    pytest.mark.qemu,
    pytest.mark.timeout(900),
    pytest.mark.parametrize("daemon", ["fast"], indirect=True),
]
AMD64_ONLY = pytest.mark.parametrize("kit", [AMD64], indirect=True, ids=["amd64"])


def command_line(kit: Kit, block: str) -> list[str]:
    """What a guide prints for a machine, with the guest in the place of the dots."""
    (command,) = commands(block)
    emulator, *options, dots = shlex.split(command)
    assert (emulator, dots) == (kit.architecture.emulator, "...")
    return [
        *kit.qemu,
        *options,
        *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "mon:stdio"),
        *("-kernel", str(kit.kernel), "-initrd", str(kit.initramfs)),
        *("-append", f"console={kit.architecture.console} quiet"),
    ]


def succeed(guest: Guest, command: str) -> str:
    status, output = guest.run(command)
    assert status == 0, f"{command}: {output}"
    return output


def test_qemu_by_hand(kit: Kit, daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line for each architecture, and what a user does then in the guest."""
    monkeypatch.chdir(daemon.socket_path.parent)
    daemon.start()
    (block,) = blocks_that_begin("qemu", kit.architecture.emulator)
    with Guest(command_line(kit, block)) as guest:
        assert (
            int(succeed(guest, "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")) > 4e5
        )
        (usage,) = blocks_that_begin("guest", "head -c 32 /dev/urandom > key")
        for command in commands(usage):
            succeed(guest, command)
        assert succeed(guest, "mmc rpmb read-counter /dev/rpmb0") == "Counter value: 0x00000001"
    daemon.stop()


@AMD64_ONLY
def test_the_driver_is_built_and_loaded(kit: Kit, daemon: DaemonProcess, tmp_path: Path) -> None:
    (block,) = blocks_that_begin("guest", "make ")
    build, load = commands(block)
    folder = Path(tempfile.mkdtemp(prefix="guide-", dir=kit.system / "tmp"))
    try:
        here = folder / GUEST_FOLDER.relative_to(ROOT)
        here.mkdir(parents=True)
        for name in GUEST_SOURCES:
            shutil.copy(GUEST_FOLDER / name, here)
        command = build.replace("$(uname -r)", kit.kernel.name.removeprefix("vmlinuz-"))
        inside = f"cd /{folder.relative_to(kit.system)} && {command}"
        Steps("guide", tmp_path / "log", print).run_inside(kit.system, "sh", "-c", inside)
        module = folder / load.removeprefix("insmod ")
        assert module.is_file()
    finally:
        shutil.rmtree(folder)

    daemon.start()
    with VirtualMachine(kit, daemon.socket_path) as vm:
        succeed(vm, "rmmod virtio_rpmb && test ! -e /dev/rpmb0")
        succeed(vm, f"mkdir -p {GUEST_FOLDER.relative_to(ROOT)}")
        succeed(vm, f"ln -s /virtio_rpmb.ko {load.removeprefix('insmod ')} && {load}")
        succeed(vm, "test -c /dev/rpmb0")
    daemon.stop()


def test_nothing_else_is_to_be_typed(daemon: DaemonProcess) -> None:
    assert [text.split()[0] for _, text in blocks_of_guide("guest")] == ["make", "head"]
