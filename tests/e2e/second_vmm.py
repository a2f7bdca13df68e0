# SPDX-License-Identifier: Apache-2.0
"""A VMM that is not QEMU: ``second_vmm/``, a front-end on the Rust crate ``vhost``.

Two cached folders (see cache.py): a Debian with the Rust compiler and the crates, and the program.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.e2e.cache import RECIPE, Say, Steps, cached, make_debian, say_it

SOURCES = Path(__file__).resolve().parent / "second_vmm"
PACKAGES = (
    "cargo",
    "rustc",
    "gcc",
    "libc6-dev",
    "librust-vhost-dev",
    "librust-vm-memory-dev",
    "librust-vmm-sys-util-dev",
)


def make_second_vmm(say: Say = say_it) -> Path:
    """Return the cached program, or build it first; `say` gets a line for each step done.

    Raises KitUnavailable where that cannot be done, and RuntimeError when it does not build.
    """
    rust = cached(
        "rust",
        (RECIPE, PACKAGES),
        lambda folder, steps: make_debian(folder, PACKAGES, steps),
        say,
    )
    files = [path for path in sorted(SOURCES.rglob("*")) if path.is_file()]
    sources = [(str(path.relative_to(SOURCES)), path.read_bytes()) for path in files]
    built = cached(
        "second-vmm",
        (rust.name, sources),
        lambda folder, steps: _build(rust, folder, steps),
        say,
    )
    return built / "second-vmm"


def _build(rust: Path, folder: Path, steps: Steps) -> None:
    build = Path(tempfile.mkdtemp(prefix="build-", dir=rust / "tmp"))
    try:
        with steps.step("second VMM"):
            shutil.copytree(SOURCES, build, dirs_exist_ok=True)
            inside = Path("/tmp") / build.name
            command = f"cd {inside} && HOME={inside} cargo build --offline --release"
            try:
                steps.run_inside(rust, "sh", "-c", command)
            except subprocess.CalledProcessError as error:
                raise RuntimeError(
                    f"the second VMM does not build, the log ends with:\n{error.output}"
                ) from error
            shutil.copy(build / "target/release/second-vmm", folder)
    finally:
        shutil.rmtree(build)
