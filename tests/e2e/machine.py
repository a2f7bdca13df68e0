# SPDX-License-Identifier: Apache-2.0
"""A whole machine under systemd, in QEMU: a Debian that boots, and our wheel for its Python.

Two cached folders (see cache.py):

- ``machine-<hash>``: a Debian with systemd, Python, and what it takes to build the wheel;
- ``wheel-<hash>``: the wheel made there from the sources, and those that it depends on.

QEMU and the kernel are those of the guest kit for amd64.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cache import (
    ISOLATED,
    RECIPE,
    SUITE,
    KitUnavailable,
    Say,
    Steps,
    cached,
    make_debian,
    say_it,
)
from tests.e2e.kit import AMD64, Kit, make_kit
from tests.e2e.vm import READY
from tests.support.documents import ROOT
from tests.support.history import export

# systemd of the stable release is what operators have.
PACKAGES = (
    *("systemd", "systemd-sysv", "dbus", "python3", "python3-venv"),
    *("gcc", "libc6-dev", "libssl-dev", "python3-dev", "python3-pip"),
)
PYTHON = "3.13"  # of that release
DISK_SIZE = "2G"  # sparse
# Nothing between a command and its output, and no protection that takes an emulated processor long.
KERNEL_OPTIONS = "systemd.show_status=0 mitigations=off init_on_alloc=0"
WHEELS = "wheels"  # a folder in the machine
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
# What the wheel is made of.
SOURCES = (
    *("LICENSE", "README.md", "pyproject.toml", "setup.py"),
    *("docs/man", "share", "tools", "vhost_rpmb"),
)
NOT_SOURCES = ("*.so", "*.c", "__pycache__")

# A shell for the tests, with nothing but the console between; no getty, which wants udev.
CONSOLE_UNIT = f"""\
[Unit]
Description=Shell on the console
After=dbus.service
[Service]
Environment=HOME=/root
WorkingDirectory=/root
ExecStart=/bin/sh -c 'echo "{READY.decode()}"; exec sh'
StandardInput=tty
StandardOutput=tty
TTYPath=/dev/ttyS0
Restart=always
# A shell on a terminal does not heed SIGTERM.
KillSignal=SIGHUP
[Install]
WantedBy=multi-user.target
"""
FILES = {
    "etc/hostname": "machine\n",
    "etc/machine-id": "00000000000000000000000000000028\n",  # not a first boot
    "etc/systemd/system/console.service": CONSOLE_UNIT,
}


@dataclass(frozen=True, slots=True)
class Machine:
    """What a machine is made of: QEMU and a kernel, a Debian, and the wheel with what it needs."""

    kit: Kit
    debian: Path
    wheels: Path

    def make_disk(self, path: Path, install: str, old: Path | None = None) -> None:
        """Make its disk: the Debian after the commands `install`, run beside the wheels.

        The wheel of an earlier commit (`make_old_wheel`) is in the folder `old` there. The commands
        run before it boots, as root and without a network: it would take them five times as long.
        Raises RuntimeError, with what they say, when they fail, or mke2fs does.
        """
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            root = Path(folder) / "root"
            script = (
                'cp -a "$0" "$1" && cp "$2"/*.whl "$3" && cp -r "$6" "$3/old" && '
                'mount -t proc proc "$1/proc" && '
                f'chroot "$1" env -i PATH={PATH} PIP_NO_INDEX=1 PIP_FIND_LINKS=/{WHEELS} '
                f'sh -euc "cd /{WHEELS}; $4" && umount "$1/proc" && '
                f'mke2fs -q -t ext4 -d "$1" "$5" {DISK_SIZE}'
            )
            empty = Path(folder) / "empty"
            empty.mkdir()
            words = (self.debian, root, self.wheels, root / WHEELS, install, path, old or empty)
            done = subprocess.run(
                [*ISOLATED, "sh", "-c", script, *map(str, words)],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        if done.returncode != 0:
            raise RuntimeError(f"the machine's disk cannot be made:\n{done.stdout.strip()}")

    def command_line(self, disk: Path) -> list[str]:
        """Start it; what it writes to its disk ends with QEMU."""
        return [
            *self.kit.qemu,
            *("-nodefaults", "-no-user-config", "-display", "none", "-serial", "mon:stdio"),
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-smp", "2", "-m", "512"),
            *("-kernel", str(self.kit.kernel)),
            *("-append", f"console=ttyS0 quiet root=/dev/nvme0n1 rw {KERNEL_OPTIONS}"),
            # The kernel has drivers for this disk and this file system built in.
            *("-drive", f"if=none,id=disk,file={disk},format=raw,snapshot=on"),
            *("-device", "nvme,drive=disk,serial=machine"),
        ]


def make_machine(say: Say = say_it) -> Machine:
    """Return the cached machine, or make it first; `say` gets one line for each step done.

    Raises KitUnavailable where it cannot be made, and RuntimeError when the wheel does not build.
    """
    if shutil.which("mke2fs") is None:
        raise KitUnavailable("mke2fs is not installed: apt-get install e2fsprogs")
    debian = cached(
        "machine",
        (RECIPE, PACKAGES, SUITE, FILES, CONSOLE_UNIT),
        _make_debian,
        say,
    )
    wheel = cached(
        "wheel",
        (debian.name, _sources()),
        lambda folder, steps: _make_wheel(debian, folder, steps, _copy_sources),
        say,
    )
    return Machine(make_kit(AMD64, say), debian, wheel)


def make_old_wheel(machine: Machine, commit: str, say: Say = say_it) -> Path:
    """Return the cached folder with the wheel of an earlier commit, or make it first."""

    return cached(
        "wheel",
        (machine.debian.name, commit, Path(__file__).read_bytes()),
        lambda folder, steps: _make_wheel(
            machine.debian, folder, steps, lambda copied: export(commit, SOURCES, copied)
        ),
        say,
    )


def _make_debian(folder: Path, steps: Steps) -> None:
    make_debian(folder, PACKAGES, steps, release=SUITE)
    (folder / WHEELS).mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    steps.run_inside(folder, "systemctl", "enable", "console.service")


def _sources() -> list[tuple[str, bytes]]:
    """What decides how the wheel is, this recipe included."""
    with tempfile.TemporaryDirectory() as folder:
        copied = Path(folder)
        _copy_sources(copied)
        files = sorted(path for path in copied.rglob("*") if path.is_file())
        found = [(str(path.relative_to(copied)), path.read_bytes()) for path in files]
    return [*found, ("", Path(__file__).read_bytes())]


def _copy_sources(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns(*NOT_SOURCES))
        else:
            shutil.copy(ROOT / name, folder / name)


def _make_wheel(
    debian: Path, folder: Path, steps: Steps, copy_sources: Callable[[Path], None]
) -> None:
    build = Path(tempfile.mkdtemp(prefix="build-", dir=debian / "tmp"))
    inside = Path("/") / build.relative_to(debian)
    needs = build / "needs"
    metadata = tomllib.loads((ROOT / "pyproject.toml").read_text())
    try:
        with steps.step("what the wheel needs"):
            pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
            for_python = (f"--python-version={PYTHON}", "--only-binary=:all:")
            # What is compiled comes as wheels; of the rest some come as sources.
            steps.run(*pip, "wheel", "--wheel-dir", needs, *metadata["build-system"]["requires"])
            steps.run(*pip, "download", *for_python, "--dest", needs, "Cython")
            for name in metadata["project"]["dependencies"]:
                steps.run(*pip, "download", *for_python, "--dest", folder, name)
        with steps.step("wheel"):
            copy_sources(build / "source")
            offline = ("PIP_NO_INDEX=1", f"PIP_FIND_LINKS={inside}/needs")
            steps.run_inside(
                debian,
                *("env", "--unset=PIP_CERT", "--unset=PIP_EXTRA_INDEX_URL", *offline),
                *("pip", "wheel", "--no-deps", "--wheel-dir", inside, inside / "source"),
            )
        (wheel,) = build.glob("*.whl")
        shutil.copy(wheel, folder)
    except subprocess.CalledProcessError as error:
        raise RuntimeError(
            f"the wheel does not build, the log ends with:\n{error.output}"
        ) from error
    finally:
        shutil.rmtree(build)
