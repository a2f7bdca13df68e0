# SPDX-License-Identifier: Apache-2.0
"""Measure the daemon against the machine's own floors, as ratios of one run."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from bench.measure import Bench
from bench.report import cpu_time, gate, requests_of_optee, table


def main() -> int:
    """Measure and print; with --gate return 1 where a goal was missed."""
    parser = argparse.ArgumentParser(prog="bench", description=__doc__.splitlines()[0])
    parser.add_argument("--gate", action="store_true", help="check the goals instead of the table")
    parser.add_argument(
        "--stable", action="store_true", help="let only those goals fail that hold on any machine"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("build"), help="where images and logs go, on a disk"
    )
    options = parser.parse_args()
    folder = options.folder.resolve()
    folder.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as name:
        bench = Bench(Path(name))
        if not options.gate:
            table(bench)
            requests_of_optee(bench)
            cpu_time(bench)
            return 0
        missed = list(gate(bench, options.stable))
    for goal in missed:
        print(f"bench: missed: {goal}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
