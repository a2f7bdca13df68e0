# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: a source archive, and a wheel installed where no compiler is."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from vhost_rpmb import __version__

ROOT = Path(__file__).resolve().parent.parent
MAN_PAGE = "share/man/man1/vhost-user-rpmb.1"
FAST = sorted(path.stem for path in (ROOT / "vhost_rpmb/_fast").glob("*.pyx"))
TIMEOUT = 600  # seconds; the builds fetch what they need

pytestmark = pytest.mark.timeout(2 * TIMEOUT)


@dataclass(frozen=True)
class Archives:
    """The two files that a release has."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """Build the source archive from this folder, and the wheel from the source archive alone."""
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)],
        check=True,
        timeout=TIMEOUT,
    )
    (sdist,) = folder.glob("*.tar.gz")
    (wheel,) = folder.glob("*.whl")
    return Archives(sdist, wheel)


@dataclass(frozen=True)
class Installation:
    """A venv with nothing but the wheel and its dependencies, used from an empty folder."""

    venv: Path
    folder: Path

    def run(
        self, program: str, *arguments: str, pass_fds: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the venv, where neither the sources nor a compiler are found."""
        environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VHOST_RPMB_")) and name not in ("CC", "VIRTUAL_ENV")
        }
        return subprocess.run(
            [str(self.venv / "bin" / program), *arguments],
            cwd=self.folder,
            env=environment | {"PATH": str(self.venv / "bin")},
            pass_fds=pass_fds,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT,
            check=False,
        )

    def modules(self) -> Path:
        """Return the folder of the installed compiled modules."""
        (folder,) = self.venv.glob("lib/python*/site-packages/vhost_rpmb/_fast")
        return folder


@pytest.fixture(scope="session")
def installation(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """Install the wheel into an empty venv."""
    venv = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True, timeout=TIMEOUT)
    installed = Installation(venv, tmp_path_factory.mktemp("empty"))
    done = installed.run("python", "-m", "pip", "install", str(archives.wheel))
    assert done.returncode == 0, done.stderr
    return installed


def test_source_archive_is_complete(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as archive:
        top = f"vhost_rpmb-{__version__}/"
        names = {name.removeprefix(top) for name in archive.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("vhost_rpmb", "tests", "bench", "docs", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert sources
    assert sources <= names
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "Makefile",
        "pyproject.toml",
        "setup.py",
    } <= names
    assert not [
        name for name in names if name.endswith((".so", ".c", ".pyc")) and name not in sources
    ]
    assert not [name for name in names if name.startswith("build/")]


def test_wheel_holds_what_runs_and_nothing_else(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as archive:
        names = archive.namelist()
    assert "vhost_rpmb/py.typed" in names
    for module in FAST:
        assert f"vhost_rpmb/_fast/{module}.pyi" in names
        assert [n for n in names if n.startswith(f"vhost_rpmb/_fast/{module}.cpython-")], module
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".c"))]
    top = {name.split("/")[0] for name in names}
    assert top == {"vhost_rpmb"} | {
        f"vhost_rpmb-{__version__}.{kind}" for kind in ("data", "dist-info")
    }


def test_metadata(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as archive:
        info = f"vhost_rpmb-{__version__}.dist-info"
        metadata = archive.read(f"{info}/METADATA").decode().splitlines()
        entry_points = archive.read(f"{info}/entry_points.txt").decode()
    assert f"Version: {__version__}" in metadata
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    needed = [line for line in metadata if line.startswith("Requires-Dist:")]
    assert [line for line in needed if "extra ==" not in line] == [
        "Requires-Dist: cryptography>=41"
    ]
    assert "vhost-user-rpmb = vhost_rpmb.cli:main" in entry_points
    assert "vhost-rpmb-client = vhost_rpmb.client.cli:main" in entry_points


def test_installation_has_no_compiler(installation: Installation) -> None:
    where = f"import shutil; print([shutil.which(n) for n in {['cc', 'gcc', 'clang', 'cython']}])"
    assert installation.run("python", "-c", where).stdout == "[None, None, None, None]\n"


def test_installed_version(installation: Installation) -> None:
    done = installation.run("vhost-user-rpmb", "--version")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"vhost-user-rpmb {__version__}\n"
    module = installation.run("python", "-m", "vhost_rpmb", "--version")
    assert module.stdout == done.stdout


def test_installed_capabilities(installation: Installation) -> None:
    done = installation.run("vhost-user-rpmb", "--print-capabilities")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"type": "rpmb"}


def test_installed_client(installation: Installation) -> None:
    done = installation.run("vhost-rpmb-client", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for verb in ("create", "write-key", "read-counter", "write-block", "read-block"):
        assert verb in done.stdout


def test_installed_man_page(installation: Installation) -> None:
    page = (installation.venv / MAN_PAGE).read_text()
    assert page.startswith(".TH VHOST\\-USER\\-RPMB")
    sections = [line.removeprefix(".SH ") for line in page.splitlines() if line.startswith(".SH ")]
    for section in (
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "EXAMPLES",
        "FILES",
        "EXIT STATUS",
    ):
        assert section in sections
    plain = page.replace("\\-", "-")
    assert "vhost-user-test-device-pci" in plain
    assert "vhost-user-rpmb-pci" in plain
    for option in ("--help", "--flash-path", "--key-set", "--max-read-blocks", "--once"):
        assert f"\\fB{option}\\fR" in plain


def test_installed_files_of_others(installation: Installation) -> None:
    """The client's man page, systemd's units, and the description for management software."""
    page = (installation.venv / "share/man/man1/vhost-rpmb-client.1").read_text()
    assert page.startswith(".TH VHOST\\-RPMB\\-CLIENT")
    for word in (".SH EXAMPLES", ".SH EXIT STATUS", "read\\-counter", "\\-\\-random\\-key"):
        assert word in page
    for name in (
        "lib/systemd/system/vhost-user-rpmb@.service",
        "lib/systemd/system/vhost-user-rpmb@.socket",
        "share/qemu/vhost-user/50-vhost-user-rpmb.json",
    ):
        assert (installation.venv / name).read_bytes()


COMPLETE = """\
source "$0"
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
registered=$(complete -p "$1")
function=${registered#*-F }
"${function%% *}"
echo "${COMPREPLY[@]}"
"""


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["vhost-user-rpmb", "--fl"], "--flash-path"),
        (["vhost-user-rpmb", "--sandbox", "of"], "off"),
        (["vhost-user-rpmb", "--flash-path", "wan"], "wanted.img"),
        (["vhost-rpmb-client", "ver"], "verify"),
        (["vhost-rpmb-client", "create", "--ran"], "--random-key"),
    ],
)
def test_installed_completion_of_bash(
    installation: Installation, tmp_path: Path, words: list[str], found: str
) -> None:
    (tmp_path / "wanted.img").touch()
    file = installation.venv / "share/bash-completion/completions" / words[0]
    done = subprocess.run(
        ["bash", "-c", COMPLETE, file, *words], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.stdout.strip(), done.stderr) == (found, "")


@pytest.mark.parametrize("name", ["vhost-user-rpmb", "vhost-rpmb-client"])
def test_installed_completions_of_other_shells(installation: Installation, name: str) -> None:
    """The shells themselves find nothing wrong with them."""
    for command, path in (
        (["zsh", "-n"], f"share/zsh/site-functions/_{name}"),
        (["fish", "--no-execute"], f"share/fish/vendor_completions.d/{name}.fish"),
    ):
        done = subprocess.run([*command, installation.venv / path], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("engine", ["fast", "pure"])
def test_installed_engine(engine: str, installation: Installation) -> None:
    code = f"from vhost_rpmb import engine; print(engine.load({engine!r}).RpmbDevice.__module__)"
    done = installation.run("python", "-c", code)
    assert done.stderr == ""
    assert done.stdout.startswith(f"vhost_rpmb._{engine}")


@pytest.mark.parametrize("module", FAST)
@pytest.mark.parametrize("damage", ["missing", "broken"])
def test_damaged_engine_is_refused(
    module: str, damage: str, installation: Installation, tmp_path: Path
) -> None:
    image = tmp_path / "rpmb.img"
    with image.open("wb") as file:
        file.truncate(128 * 1024)
    (library,) = installation.modules().glob(f"{module}.*.so")
    kept = shutil.copy2(library, tmp_path)
    library.unlink()
    ours, theirs = socket.socketpair()
    arguments = (f"--flash-path={image}", f"--fd={theirs.fileno()}")
    try:
        if damage == "broken":
            library.write_bytes(b"\x7fELF, but no more of it")
        refused = installation.run("vhost-user-rpmb", *arguments, pass_fds=[theirs.fileno()])
        assert refused.returncode == 1
        assert refused.stdout == ""
        (line,) = refused.stderr.splitlines()
        assert line.startswith("vhost-user-rpmb: error: the compiled engine cannot be loaded")
        assert "--debug" in line
        assert "reinstall" in line

        # The pure engine needs none of it: it serves the connection to its end.
        ours.close()
        served = installation.run(
            "vhost-user-rpmb", "--debug", *arguments, pass_fds=[theirs.fileno()]
        )
        assert served.returncode == 0, served.stderr
    finally:
        ours.close()
        theirs.close()
        shutil.copy2(kept, library)
