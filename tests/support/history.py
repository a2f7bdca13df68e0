# SPDX-License-Identifier: Apache-2.0
"""Earlier commits, where the sources come with their history."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.support.documents import ROOT


def has_commit(commit: str) -> bool:
    command = ["git", "-C", str(ROOT), "cat-file", "-e", f"{commit}^{{commit}}"]
    if shutil.which("git") is None:
        return False
    return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0


def export(commit: str, names: tuple[str, ...], folder: Path) -> None:
    """Put these files and folders of a commit into a new folder."""
    folder.mkdir()
    archive = ["git", "-C", str(ROOT), "archive", commit, "--", *names]
    packed = subprocess.run(archive, check=True, stdout=subprocess.PIPE)
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=packed.stdout)
