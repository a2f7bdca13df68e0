# SPDX-License-Identifier: Apache-2.0
"""The package as others get it: a source archive, and a wheel installed where no compiler is."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.documents import blocks_that_begin
from vhost_rpmb import __version__
from vhost_rpmb.testing import RunningDevice

ROOT = Path(__file__).resolve().parents[2]
MAN_PAGE = "share/man/man1/vhost-user-rpmb.1"
FAST = sorted(path.stem for path in (ROOT / "vhost_rpmb/_fast").glob("*.pyx"))
TIMEOUT = 600  # seconds; the builds fetch what they need

pytestmark = [pytest.mark.timeout(2 * TIMEOUT), pytest.mark.needs_network]


def pythons() -> dict[str, str]:
    """Find what the package can be built for on this machine: version -> program; ours first."""
    facts = "import sys, sysconfig; print(*sys.version_info[:2], sysconfig.get_path('include'))"
    homes = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    programs = [sys.executable, *(f"python3.{minor}" for minor in range(11, 15))]
    programs += [str(path) for path in sorted(homes.glob("3.*/bin/python"))]
    found: dict[str, str] = {}
    for program in programs:
        if shutil.which(program) is None:
            continue
        done = subprocess.run([program, "-I", "-c", facts], capture_output=True, text=True)
        if done.returncode != 0:
            continue  # pyenv's stand-in for one that is not chosen
        major, minor, headers = done.stdout.split(maxsplit=2)
        new_enough = (int(major), int(minor)) >= (3, 11)
        if new_enough and (Path(headers.strip()) / "Python.h").exists():
            found.setdefault(f"{major}.{minor}", program)
    return found


PYTHONS = pythons()
OURS = sysconfig.get_python_version()
NEWEST = max(PYTHONS, key=lambda version: int(version.split(".")[1]))


def make_venv(folder: Path, version: str) -> Path:
    """Make an empty venv of a Python of the machine; return its Python."""
    subprocess.run([PYTHONS[version], "-m", "venv", str(folder)], check=True, timeout=TIMEOUT)
    return folder / "bin/python"


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the source archive from this folder."""
    folder = tmp_path_factory.mktemp("sdist")
    subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--outdir", str(folder), str(ROOT)],
        check=True,
        timeout=TIMEOUT,
    )
    (path,) = folder.glob("*.tar.gz")
    return path


class Wheels:
    """Makes wheels of the source archive alone, with what it says that it needs."""

    def __init__(self, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._sdist = sdist
        self._factory = tmp_path_factory
        self._made: dict[str, Path] = {}

    def make(self, version: str) -> Path:
        """Return the wheel for a Python; built once, without a network."""
        if version not in self._made:
            self._made[version] = self._build(version)
        return self._made[version]

    def _build(self, version: str) -> Path:
        folder = self._factory.mktemp(f"build-{version}")
        with tarfile.open(self._sdist) as archive:
            archive.extractall(folder, filter="data")
        (sources,) = folder.iterdir()
        needs = tomllib.loads((sources / "pyproject.toml").read_text())["build-system"]["requires"]
        pip = [str(make_venv(folder / "venv", version)), "-m", "pip"]
        subprocess.run([*pip, "install", *needs], check=True, timeout=TIMEOUT)
        offline = ["--no-index", "--no-build-isolation", "--no-deps"]
        subprocess.run(
            [*pip, "wheel", *offline, "--wheel-dir", str(folder), str(sources)],
            check=True,
            timeout=TIMEOUT,
        )
        (wheel,) = folder.glob("*.whl")
        return wheel


@pytest.fixture(scope="session")
def wheels(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Wheels:
    return Wheels(sdist, tmp_path_factory)


@dataclass(frozen=True)
class Archives:
    """What a release has for one Python: the source archive and the wheel."""

    sdist: Path
    wheel: Path


@pytest.fixture(scope="session")
def archives(sdist: Path, wheels: Wheels, tmp_path_factory: pytest.TempPathFactory) -> Archives:
    """The source archive, and the wheel as it is released for our Python."""
    folder = tmp_path_factory.mktemp("released")
    subprocess.run(
        [str(ROOT / "tools/release-wheel"), str(wheels.make(OURS)), str(folder)],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        check=True,
        timeout=TIMEOUT,
    )
    (wheel,) = folder.glob("*.whl")
    return Archives(sdist, wheel)


@dataclass(frozen=True)
class Installation:
    """A venv with nothing but the wheel and its dependencies, used from an empty folder."""

    venv: Path
    folder: Path

    def environment(self) -> dict[str, str]:
        """Nothing of which leads to the sources or a compiler."""
        kept = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("PYTHON", "VHOST_RPMB_")) and name not in ("CC", "VIRTUAL_ENV")
        }
        return kept | {"PATH": str(self.venv / "bin")}

    def run(
        self, program: str, *arguments: str, pass_fds: Sequence[int] = ()
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the venv, where neither the sources nor a compiler are found."""
        return subprocess.run(
            [str(self.venv / "bin" / program), *arguments],
            cwd=self.folder,
            env=self.environment(),
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


def install(wheel: Path, version: str, factory: pytest.TempPathFactory) -> Installation:
    """Install a wheel into an empty venv."""
    venv = factory.mktemp("venv")
    make_venv(venv, version)
    installed = Installation(venv, factory.mktemp("empty"))
    done = installed.run("python", "-m", "pip", "install", str(wheel))
    assert done.returncode == 0, done.stderr
    return installed


@pytest.fixture(scope="session")
def installation(archives: Archives, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The released wheel in an empty venv of our Python."""
    return install(archives.wheel, OURS, tmp_path_factory)


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(version, marks=() if version in (OURS, NEWEST) else pytest.mark.long)
        for version in PYTHONS
    ],
)
def each_installation(
    request: pytest.FixtureRequest, wheels: Wheels, tmp_path_factory: pytest.TempPathFactory
) -> Installation:
    """Each Python of the machine in turn, with its wheel; ours with the released one.

    A build takes a minute: make test has ours and the newest one.
    """
    version = request.param
    if version == OURS:
        ours: Installation = request.getfixturevalue("installation")
        return ours
    return install(wheels.make(version), version, tmp_path_factory)


def test_source_archive_is_complete(archives: Archives) -> None:
    with tarfile.open(archives.sdist) as archive:
        top = f"vhost_rpmb-{__version__}/"
        names = {name.removeprefix(top) for name in archive.getnames()}
    sources = {
        str(path.relative_to(ROOT))
        for folder in ("vhost_rpmb", "tests", "bench", "docs", "guest", "tools")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.suffix != ".so"
    }
    assert sources
    assert sources <= names
    assert {
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "Makefile",
        "pyproject.toml",
        "setup.py",
        ".ci/run",
        ".github/ISSUE_TEMPLATE/bug.yml",
        ".github/workflows/ci.yml",
        ".github/workflows/release.yml",
        ".pre-commit-config.yaml",
        ".readthedocs.yaml",
    } <= names
    assert not [
        name for name in names if name.endswith((".so", ".c", ".pyc")) and name not in sources
    ]
    assert not [name for name in names if name.startswith("build/")]


def test_wheel_contains_the_package_only(archives: Archives) -> None:
    with zipfile.ZipFile(archives.wheel) as archive:
        names = archive.namelist()
    assert "vhost_rpmb/py.typed" in names
    for module in FAST:
        assert f"vhost_rpmb/_fast/{module}.pyi" in names
        assert [n for n in names if n.startswith(f"vhost_rpmb/_fast/{module}.cpython-")], module
    assert not [name for name in names if name.endswith((".pyx", ".pxd", ".c", ".h"))]
    top = {name.split("/")[0] for name in names}
    assert top == {"vhost_rpmb"} | {
        f"vhost_rpmb-{__version__}.{kind}" for kind in ("data", "dist-info")
    }


def test_wheel_platform_matches_its_libraries(archives: Archives) -> None:
    """Its name says glibc 2.34, with which OpenSSL 3 came; libcrypto is not in it."""
    tag = f"cp{OURS.replace('.', '')}"
    name = rf"vhost_rpmb-{re.escape(__version__)}-{tag}-{tag}-manylinux_2_34_\w+\.whl"
    assert re.fullmatch(name, archives.wheel.name)
    with zipfile.ZipFile(archives.wheel) as archive:
        libraries = [info for info in archive.infolist() if info.filename.endswith(".so")]
        assert len(libraries) == len(FAST)
        needs_crypto = {
            Path(info.filename).name.split(".")[0]
            for info in libraries
            if b"\0libcrypto.so.3\0" in archive.read(info)
        }
        stripped = [info for info in libraries if b".debug_info" not in archive.read(info)]
    assert needs_crypto == {"batch", "device", "mac"}
    assert stripped == libraries


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


def test_quick_start_installs(sdist: Path, tmp_path: Path) -> None:
    """The commands of the guide as printed, in the unpacked source archive."""
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    (sources,) = tmp_path.iterdir()
    (install,) = blocks_that_begin("quick-start", "python3 -m venv")
    done = subprocess.run(
        ["bash", "-euc", f"{install}\ncommand -v vhost-user-rpmb\nvhost-rpmb-client --version"],
        cwd=sources,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr
    program, version = done.stdout.splitlines()[-2:]
    assert program == str(sources / "venv/bin/vhost-user-rpmb")
    assert version == f"vhost-rpmb-client {__version__}"


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
    features = ["migration-shared", "migration-copy"]
    assert json.loads(done.stdout) == {"type": "rpmb", "features": features}


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
        "lib/systemd/system/vhost-user-rpmb-fleet@.service",
        "lib/systemd/system/vhost-user-rpmb-fleet@.socket",
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


@pytest.mark.parametrize("engine", ["fast", "pure"])
def test_session_on_each_python(engine: str, each_installation: Installation) -> None:
    """The installed client programs, writes and reads the installed daemon's device."""
    installed = each_installation
    folder = installed.folder / engine
    folder.mkdir()
    (folder / "key").write_bytes(b"k" * 32)
    (folder / "data").write_bytes(bytes(range(256)) * 2)
    created = installed.run("vhost-rpmb-client", "create", str(folder / "rpmb.img"))
    assert created.returncode == 0, created.stderr
    device = RunningDevice(folder, "-v")
    options = device.command_line.index("vhost_rpmb") + 1
    device.command_line[:options] = [str(installed.venv / "bin/vhost-user-rpmb")]
    device.environment = installed.environment() | {"VHOST_RPMB_ENGINE": engine}
    with device:
        for verb in (
            ("write-key", "key"),
            ("write-block", "3", "data", "key"),
            ("read-block", "3", "2", "read", "key"),
            ("read-counter", "key"),
        ):
            words = [str(folder / word) if word.isalpha() else word for word in verb[1:]]
            socket_path = f"--socket-path={device.socket_path}"
            done = installed.run("vhost-rpmb-client", socket_path, verb[0], *words)
            assert done.returncode == 0, done.stderr
        assert int(done.stdout.split()[-1], 16) == 1
        assert (folder / "read").read_bytes() == (folder / "data").read_bytes()
    assert "Traceback" not in device.log


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
