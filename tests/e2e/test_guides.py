# SPDX-License-Identifier: Apache-2.0
"""What the guides to QEMU and to the guest's side print, run as it is printed."""

from __future__ import annotations

import re
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import pytest

from tests.e2e.cache import Steps
from tests.e2e.kit import AMD64, DRIVER_FOLDER, DRIVER_SOURCES, Kit
from tests.e2e.vm import BOOT_TIMEOUT, READY, Guest, VirtualMachine, succeed
from tests.support.daemon import Daemon
from tests.support.documents import ROOT, blocks_of_guide, blocks_that_begin, commands

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


def test_qemu_by_hand(kit: Kit, daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line for each architecture, and what a user does then in the guest."""
    monkeypatch.chdir(daemon.socket_path.parent)
    daemon.start()
    (block,) = blocks_that_begin("qemu", kit.architecture.emulator)
    with Guest(command_line(kit, block)) as guest:
        assert (
            int(succeed(guest, "sed -n 's/MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")) > 4e5
        )
        (usage,) = blocks_that_begin("guest", "(umask 077; head -c 32 /dev/urandom > key)")
        for command in commands(usage):
            succeed(guest, command)
        assert succeed(guest, "mmc rpmb read-counter /dev/rpmb0") == "Counter value: 0x00000001"
    daemon.stop()


@AMD64_ONLY
def test_driver_is_built_and_loaded(kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    (block,) = blocks_that_begin("guest", "make -C")
    build, load = commands(block)
    folder = Path(tempfile.mkdtemp(prefix="guide-", dir=kit.system / "tmp"))
    try:
        here = folder / DRIVER_FOLDER.relative_to(ROOT)
        here.mkdir(parents=True)
        for name in DRIVER_SOURCES:
            shutil.copy(DRIVER_FOLDER / name, here)
        (folder / "vhost_rpmb").mkdir()
        shutil.copy(ROOT / "vhost_rpmb/__init__.py", folder / "vhost_rpmb")
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
        succeed(vm, f"mkdir -p {DRIVER_FOLDER.relative_to(ROOT)}")
        succeed(vm, f"ln -s /virtio_rpmb.ko {load.removeprefix('insmod ')} && {load}")
        succeed(vm, "test -c /dev/rpmb0")
    daemon.stop()


# Of libvirt's QEMU driver: as this user, and with nothing that only a running libvirtd has.
QEMU_CONF = """\
user = "root"
group = "root"
security_driver = "none"
stdio_handler = "file"
"""
# Debian's build insists on this user, whom the package of libvirtd's units makes.
LIBVIRT_USER = "libvirt-qemu:x:64055:64055::/:/bin/false\n"
AS_IF_INSTALLED = (
    'mount --bind "$0/passwd" /etc/passwd && mount --bind "$0/group" /etc/group && exec "$@"'
)


@AMD64_ONLY
def test_libvirt(kit: Kit, daemon: Daemon, tmp_path: Path) -> None:
    """The domain of the guide, without KVM, started by libvirt's own QEMU driver."""
    daemon.start()
    console = tmp_path / "console"
    emulator = tmp_path / "emulator"
    emulator.write_text(f'#!/bin/sh\nexec {shlex.join(kit.qemu)} "$@"\n')
    emulator.chmod(0o755)
    boot = f"<kernel>{kit.kernel}</kernel><initrd>{kit.initramfs}</initrd>"
    boot += "<cmdline>console=ttyS0 quiet</cmdline>"
    line = f"<console type='unix'><source mode='bind' path='{console}'/></console>"
    ((_, domain),) = blocks_of_guide("libvirt")
    for pattern, value in (
        ("type='kvm'", "type='qemu'"),
        ("/usr/bin/qemu-system-x86_64", str(emulator)),
        ("<boot dev='hd'/>", boot),
        ("<disk .*</disk>", ""),
        ("<console type='pty'/>", line),
        ("/run/vhost-user-rpmb/vm1.sock", str(daemon.socket_path)),
    ):
        domain, count = re.subn(pattern, value, domain, flags=re.DOTALL)
        assert count == 1, pattern
    (tmp_path / "vm1.xml").write_text(domain)
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/qemu.conf").write_text(QEMU_CONF)
    (tmp_path / "passwd").write_text(Path("/etc/passwd").read_text() + LIBVIRT_USER)
    (tmp_path / "group").write_text(Path("/etc/group").read_text() + "libvirt-qemu:x:64055:\n")
    libvirt = subprocess.Popen(
        [
            *("unshare", "--mount", "sh", "-c", AS_IF_INSTALLED, str(tmp_path)),
            *("virt-qemu-run", "-r", str(tmp_path), str(tmp_path / "vm1.xml")),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        with socket.socket(socket.AF_UNIX) as terminal:
            terminal.settimeout(BOOT_TIMEOUT)
            while terminal.connect_ex(str(console)):
                assert libvirt.poll() is None, libvirt.communicate()[1]
                time.sleep(0.1)
            wait(terminal, READY)
            terminal.send(b"mmc rpmb read-counter /dev/rpmb0\n")
            wait(terminal, b"RPMB operation failed, retcode 0x0007")
    finally:
        libvirt.terminate()  # and the domain with it
        libvirt.communicate()
    daemon.stop()


def wait(terminal: socket.socket, text: bytes) -> None:
    """Read a console until it has shown a text."""
    shown = b""
    while text not in shown:
        more = terminal.recv(4096)
        assert more, shown
        shown += more


def test_guide_has_no_other_commands(daemon: Daemon) -> None:
    found = [text.split()[:2] for _, text in blocks_of_guide("guest")]
    # The package: tests/e2e/test_guest_driver_builds.py.
    assert found == [["make", "guest-dkms"], ["make", "-C"], ["(umask", "077;"]]
