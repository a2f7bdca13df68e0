# SPDX-License-Identifier: Apache-2.0
"""A Debian for building the guest driver: cached, see cache.py.

It has the headers of Debian's two kernels, for amd64 and arm64, a compiler for each, sparse, DKMS,
udev's own checks, and the source of the RPMB subsystem, which Debian's kernels leave out.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.e2e.cache import BACKPORTS, RECIPE, SUITE, Say, Steps, cached, make_debian, say_it

# The flavours differ so that both releases can be installed: the packages have the same names.
PACKAGES = (
    *(f"linux-headers-amd64/{SUITE}", f"linux-headers-cloud-amd64/{BACKPORTS}"),
    f"linux-headers-cloud-arm64:arm64/{BACKPORTS}",
    *(f"linux-source/{BACKPORTS}", "bzip2", "xz-utils"),
    *("gcc", "libc6-dev", "make", "gcc-aarch64-linux-gnu", "sparse", "kmod", "dkms", "udev"),
)
RPMB_CORE = Path("usr/src/rpmb-core.c")
ARM64_VARIABLES = ("ARCH=arm64", "CROSS_COMPILE=aarch64-linux-gnu-")


@dataclass(frozen=True, slots=True)
class Headers:
    """The headers of one kernel."""

    release: str  # as uname(1) prints it
    variables: tuple[str, ...]  # of make, for its architecture

    @property
    def kdir(self) -> str:
        return f"/lib/modules/{self.release}/build"


@dataclass(frozen=True, slots=True)
class Workshop:
    """The Debian in a folder."""

    system: Path

    def headers(self, version: str, architecture: str) -> Headers:
        """The headers of the kernel whose version begins so."""
        (found,) = (
            path.name
            for path in (self.system / "lib/modules").glob(f"{version}.*")
            if path.name.endswith(f"-{architecture}")
        )
        return Headers(found, ARM64_VARIABLES if architecture == "arm64" else ())

    @contextmanager
    def folder(self) -> Iterator[Path]:
        """A new folder inside; `inside` says where it is for programs that run there."""
        path = Path(tempfile.mkdtemp(prefix="work-", dir=self.system / "tmp"))
        path.chmod(0o755)
        try:
            yield path
        finally:
            shutil.rmtree(path)

    def inside(self, path: Path) -> Path:
        return Path("/") / path.relative_to(self.system)

    def copy_rpmb_core(self, folder: Path) -> None:
        """Put the source of the RPMB subsystem there, ready to be built as a module."""
        folder.mkdir()
        shutil.copy(self.system / RPMB_CORE, folder)
        kbuild = "obj-m := rpmb-core.o\nccflags-y := -DCONFIG_RPMB_MODULE\n"
        (folder / "Kbuild").write_text(kbuild)


def make_workshop(say: Say = say_it) -> Workshop:
    """Return the cached workshop, or make it first; KitUnavailable where it cannot be made."""
    return Workshop(cached("workshop", (RECIPE, PACKAGES, 1), _fill, say))


def _fill(folder: Path, steps: Steps) -> None:
    make_debian(folder, PACKAGES, steps, "arm64", release=SUITE)
    with steps.step(f"headers of {SUITE} for arm64"):
        # These want a compiler that runs on arm64, so they cannot be installed. All that they lack,
        # the common headers and the programs, is in the packages for amd64.
        (stable,) = (folder / "usr/src").glob("linux-headers-*+deb*[0-9]-amd64")
        package = f"{stable.name.removesuffix('-amd64')}-arm64"
        script = (
            f"apt-get update && cd /tmp && apt-get download {package}:arm64 && "
            "dpkg-deb --extract linux-headers-*.deb / && rm linux-headers-*.deb && "
            "rm -r /var/lib/apt/lists"
        )
        steps.run_inside(folder, "sh", "-euc", script)
    with steps.step("source of the RPMB subsystem"):
        (archive,) = (folder / "usr/src").glob("linux-source-*.tar.xz")
        steps.run(
            *("tar", "--extract", "--file", archive, "--strip-components=3"),
            *("--directory", folder / "usr/src", "--wildcards", "*/drivers/misc/rpmb-core.c"),
        )
        archive.unlink()
