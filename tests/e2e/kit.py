# SPDX-License-Identifier: Apache-2.0
"""The guest kit: what it takes to boot a Linux guest with an RPMB device.

Two cached folders (see cache.py):

- ``system-<hash>``: a Debian with QEMU, a Linux kernel and its headers, mmc-utils, busybox and a
  compiler.
- ``guest-<hash>``: the initramfs with the driver module built in there.

Run as a program this file makes the kit and prints where it is.
"""

from __future__ import annotations

import lzma
import shutil
import stat
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.archive import Archive
from tests.e2e.cache import (
    RECIPE,
    KitUnavailable,
    Say,
    Steps,
    cache_folder,
    cached,
    make_debian,
    say_it,
)
from vhost_rpmb import __version__


@dataclass(frozen=True, slots=True)
class Architecture:
    """All that differs between guests of different architectures.

    The packages are meta-packages: exact versions disappear from mirrors. The cloud kernels are the
    same source with fewer modules, a third of the size. ``loader`` and ``libraries`` are where a
    guest's program looks for the dynamic loader and its libraries.
    """

    name: str  # as Debian says
    packages: tuple[str, ...]
    compiler_prefix: str
    make_variables: tuple[str, ...]  # of the kernel's build system
    loader: str
    libraries: str
    emulator: str
    machine: tuple[str, ...]  # options of QEMU
    console: str
    transport: str  # of virtio: the last part of QEMU's device names
    modules: tuple[str, ...] = ()  # of the kernel: for this transport, and for other devices
    foreign: str | None = None  # its name for Debian, where it is not that of the machine


AMD64 = Architecture(
    name="amd64",
    packages=(
        "qemu-system-x86",
        "linux-image-cloud-amd64",
        "linux-headers-cloud-amd64",
        "mmc-utils",
        "busybox-static",
        "make",
        "gcc",
        "libc6-dev",
    ),
    compiler_prefix="",
    make_variables=(),
    loader="lib64/ld-linux-x86-64.so.2",
    libraries="usr/lib/x86_64-linux-gnu",
    emulator="qemu-system-x86_64",
    machine=("-machine", "q35,memory-backend=mem"),
    console="ttyS0",
    transport="-pci",
    modules=("virtio_blk",),
)
ARM64 = Architecture(
    name="arm64",
    packages=(
        "qemu-system-arm",
        "linux-image-cloud-arm64:arm64",
        "linux-headers-cloud-arm64:arm64",
        "mmc-utils:arm64",
        "busybox-static:arm64",
        "make",
        "gcc-aarch64-linux-gnu",
        "libc6-dev-arm64-cross",
    ),
    compiler_prefix="aarch64-linux-gnu-",
    make_variables=("ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-"),
    loader="usr/lib/ld-linux-aarch64.so.1",
    libraries="usr/lib/aarch64-linux-gnu",
    emulator="qemu-system-aarch64",
    machine=(
        *("-machine", "virt,memory-backend=mem", "-cpu", "cortex-a57"),
        *("-global", "virtio-mmio.force-legacy=false"),
    ),
    console="ttyAMA0",
    transport="",
    modules=("virtio_mmio",),
    foreign="arm64",
)
DRIVER_FOLDER = Path(__file__).resolve().parents[2] / "guest" / "linux"
DRIVER_SOURCES = ("Kbuild", "Makefile", "core.c", "ioctl.c", "route.c", "virtio_rpmb.h")
DRIVER_VERSION = f"VIRTIO_RPMB_VERSION={__version__}"
TOOLS_FOLDER = Path(__file__).resolve().parent / "guest"
TOOLS_SOURCES = ("init", "rpmb-send.c")
RPMB_SEND_FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-static")


@dataclass(frozen=True, slots=True)
class Kit:
    """A whole kit: paths into the cache, and how its QEMU is started."""

    architecture: Architecture
    system: Path
    kernel: Path
    initramfs: Path

    @property
    def qemu(self) -> list[str]:
        """The start of a QEMU command line.

        QEMU runs outside the system folder, so that socket paths mean the same to it and to the
        daemon, but on the folder's dynamic loader, libraries and firmware.
        """
        share = self.system / "usr/share"
        return [
            str(self.system / "lib64/ld-linux-x86-64.so.2"),
            "--library-path",
            str(self.system / "usr/lib/x86_64-linux-gnu"),
            str(self.system / "usr/bin" / self.architecture.emulator),
            "-L",
            str(share / "qemu"),
            "-L",
            str(share / "seabios"),
        ]


def make_kit(architecture: Architecture = AMD64, say: Say = say_it) -> Kit:
    """Return the cached kit, or make it first; `say` gets one line for each step done.

    Raises KitUnavailable where a kit cannot be made, and RuntimeError when the driver does not
    build.
    """
    packages, foreign = architecture.packages, architecture.foreign
    system = cached(
        f"system-{architecture.name}",
        (RECIPE, packages),
        lambda folder, steps: make_debian(folder, packages, steps, foreign),
        say,
    )
    sources = [(path.name, path.read_bytes()) for path in _guest_sources()]
    guest = cached(
        f"guest-{architecture.name}",
        (system.name, sources, __version__),
        lambda folder, steps: _make_guest(architecture, system, folder, steps),
        say,
    )
    (kernel,) = (system / "boot").glob("vmlinuz-*")
    return Kit(architecture, system, kernel, guest / "initramfs")


def _guest_sources() -> list[Path]:
    """What the guest is made from, this recipe included."""
    return [
        Path(__file__),
        Path(__file__).with_name("archive.py"),
        *(DRIVER_FOLDER / name for name in DRIVER_SOURCES),
        *(TOOLS_FOLDER / name for name in TOOLS_SOURCES),
    ]


def _make_guest(architecture: Architecture, system: Path, folder: Path, steps: Steps) -> None:
    build = Path(tempfile.mkdtemp(prefix="build-", dir=system / "tmp"))
    try:
        with steps.step("guest driver"):
            for source in _guest_sources()[2:]:
                shutil.copy(source, build)
            inside = Path("/tmp") / build.name
            (headers,) = (system / "lib/modules").glob("*/build")
            kdir = Path("/") / headers.relative_to(system)
            try:
                variables = (f"KDIR={kdir}", *architecture.make_variables)
                steps.run_inside(system, "make", "-C", inside, *variables, DRIVER_VERSION, "W=1e")
                strip = f"{architecture.compiler_prefix}strip"
                steps.run_inside(system, strip, "--strip-debug", inside / "virtio_rpmb.ko")
                compiler = f"{architecture.compiler_prefix}gcc"
                program = (inside / "rpmb-send", inside / "rpmb-send.c")
                steps.run_inside(system, compiler, *RPMB_SEND_FLAGS, "-o", *program)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(
                    f"the guest driver does not build, the log ends with:\n{error.output}"
                ) from error
        with steps.step("initramfs"):
            (folder / "initramfs").write_bytes(_initramfs(architecture, system, build))
    finally:
        shutil.rmtree(build)


def _initramfs(architecture: Architecture, system: Path, build: Path) -> bytes:
    archive = Archive()
    for name in ("bin", "dev", "lib64", "proc", "sys", "tmp", "usr", "usr/bin", "usr/lib"):
        archive.add(name, stat.S_IFDIR | 0o755)
    archive.add("lib", stat.S_IFLNK | 0o777, b"usr/lib")
    archive.add(architecture.libraries, stat.S_IFDIR | 0o755)
    files = {
        "init": build / "init",
        "virtio_rpmb.ko": build / "virtio_rpmb.ko",
        "usr/bin/rpmb-send": build / "rpmb-send",
        "bin/busybox": system / "bin/busybox",
        "usr/bin/mmc": system / "usr/bin/mmc",
        # What mmc is linked with.
        architecture.loader: system / architecture.loader,
        f"{architecture.libraries}/libc.so.6": system / architecture.libraries / "libc.so.6",
    }
    for name, path in files.items():
        archive.add(name, stat.S_IFREG | 0o755, path.read_bytes())
    for name in architecture.modules:
        (packed,) = (system / "usr/lib/modules").glob(f"*/kernel/**/{name}.ko.xz")
        content = lzma.decompress(packed.read_bytes())
        archive.add(f"{name}.ko", stat.S_IFREG | 0o644, content)
    return archive.finish()


def main() -> int:
    """Make the kit and print where it is."""
    start = time.monotonic()
    try:
        kit = make_kit()
    except KitUnavailable as error:
        print(f"kit.py: no guest kit: {error}", file=sys.stderr)
        return 1
    print(f"guest kit: complete in {cache_folder()} ({time.monotonic() - start:.1f} s)")
    print(f"  kernel     {kit.kernel}\n  initramfs  {kit.initramfs}\n  qemu       {kit.qemu[3]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
