# SPDX-License-Identifier: Apache-2.0
"""The package on aarch64: built, installed and tested under QEMU's user emulation.

``python -m tests.e2e.aarch64 TREE [pytest's arguments]``: builds the wheel of a copy of the source
tree, installs it into TREE/.venv, takes the sources away and runs the tests in TREE. It happens in
a Debian of this machine's architecture in which Python and all that links with it are arm64's. So
only Python is emulated; Debian's cross compiler, which has the name by which this Python calls its
compiler, is not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.e2e.cache import (
    EMULATED,
    MOUNT_PROC,
    RECIPE,
    REGISTER,
    KitUnavailable,
    Steps,
    cached,
    check_emulation,
    make_debian,
)

PACKAGES = ("gcc-aarch64-linux-gnu", "qemu-user", "systemd")
EMULATED_PACKAGES = ("libc6-dev:arm64", "libssl-dev:arm64", "python3:arm64", "python3-dev:arm64")
# What builds the wheel and what the tests need, from PyPI. The first has no wheel there: its source
# archive becomes one here, it is pure Python.
PURE = ("argparse-manpage>=4.6",)
REQUIREMENTS = (
    *("pip", "setuptools>=77", "Cython>=3.1", "shtab>=1.8", "cryptography>=41"),
    *("hypothesis", "pytest>=8.4", "pytest-timeout", "tqdm"),
)
PLATFORMS = ("manylinux_2_34_aarch64", "manylinux_2_28_aarch64", "manylinux_2_17_aarch64")
PYTHON = "3.13"  # Debian's


def main() -> int:
    """Build, install and test; the exit status is pytest's."""
    tree = Path(sys.argv[1]).resolve()
    try:
        check_emulation()
        system = cached("aarch64", (RECIPE, PACKAGES, EMULATED_PACKAGES), _make_system)
    except KitUnavailable as error:
        print(f"aarch64.py: {error}", file=sys.stderr)
        return 1
    venv = tree / ".venv"
    shutil.rmtree(venv, ignore_errors=True)
    try:
        _download(venv, tree / "build/wheels")
    except subprocess.CalledProcessError as error:
        print(f"aarch64.py: {error}", file=sys.stderr)
        return 1
    pip = (".venv/bin/python", "-m", "pip", "--no-cache-dir", "--disable-pip-version-check")
    for command in (
        ("python3", "-m", "venv", "--without-pip", ".venv"),
        (*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir=build/wheels", "."),
        (*pip, "install", "--no-index", "--find-links=build/wheels", "--no-deps", "vhost-rpmb"),
    ):
        if _run(system, tree, *command).returncode != 0:
            return 1
    shutil.rmtree(tree / "vhost_rpmb")  # what is tested is what is installed
    return _run(system, tree, ".venv/bin/python", "-m", "pytest", *sys.argv[2:]).returncode


def _make_system(folder: Path, steps: Steps) -> None:
    make_debian(folder, PACKAGES, steps, "arm64", emulated=EMULATED_PACKAGES)


def _download(venv: Path, wheels: Path) -> None:
    """Unpack what comes from PyPI into the venv, by this machine's pip: it need not be emulated."""
    shutil.rmtree(wheels, ignore_errors=True)
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
    subprocess.run([*pip, "wheel", "--no-deps", f"--wheel-dir={wheels}", *PURE], check=True)
    target = venv / f"lib/python{PYTHON}/site-packages"
    subprocess.run(
        [
            *(*pip, "install", f"--target={target}", f"--find-links={wheels}"),
            *("--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"),
            *(f"--platform={platform}" for platform in PLATFORMS),
            *(*PURE, *REQUIREMENTS),
        ],
        check=True,
    )


def _run(system: Path, tree: Path, *command: str) -> subprocess.CompletedProcess[bytes]:
    """Run a command in the tree, inside the system."""
    script = (
        MOUNT_PROC,
        REGISTER,
        'mount --rbind /dev "$0/dev"',
        'mount -t tmpfs none "$0/tmp"',
        'mount --bind . "$0/mnt"',
        'exec chroot "$0" env --chdir=/mnt "$@"',
    )
    return subprocess.run(
        [*EMULATED, "sh", "-c", " && ".join(script), system, *command],
        cwd=tree,
        env={
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": "/tmp",
            "VHOST_RPMB_EMULATED": "1",
            "CPPFLAGS": os.environ.get("CPPFLAGS", ""),
            "TERM": os.environ.get("TERM", "dumb"),
        },
    )


if __name__ == "__main__":
    sys.exit(main())
