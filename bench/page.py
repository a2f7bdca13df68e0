# SPDX-License-Identifier: Apache-2.0
"""What docs/performance.md shows of a run: a small JSON, and tables made from it.

``python -m bench.page build/bench.json`` keeps a run of ``make bench`` as docs/performance.json and
renews the tables of the page; ``--compare`` prints the table of ``make bench-peer``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parents[1] / "docs"
PAGE, RUN = DOCS / "performance.md", DOCS / "performance.json"

Run = dict[str, Any]
Row = dict[str, Any]


def reduced(full: Run) -> Run:
    """What pytest-benchmark saved, without the single times and with four digits."""
    machine = full["machine_info"]
    return {
        "date": full["datetime"][:10],
        "commit": full["commit_info"]["id"][:12],
        "machine": (
            f"{machine['cpu']['brand_raw']}, {machine['cpu']['count']} processors, "
            f"Linux {machine['release']}, Python {machine['python_version']}"
        ),
        "load_average": round(full["load_average"], 1),
        "rows": [
            {"test": each["fullname"], "group": each["group"]}
            | (each["params"] or {})
            | {name: _short(value) for name, value in each["extra_info"].items()}
            for each in full["benchmarks"]
            if "p50_us" in each["extra_info"]
        ],
        "goals": [goal | {"reached": _short(goal["reached"])} for goal in full["goals"]],
    }


def _short(value: Any) -> Any:
    return float(f"{value:.4g}") if isinstance(value, float) else value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def limit(goal: Row) -> str:
    return f"{'≥' if goal['at_least'] else '≤'} {goal['limit']:g}"


def number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def goals(run: Run) -> str:
    return table(
        ("goal", "limit", "reached", "measured"),
        (
            [each["name"], limit(each), number(each["reached"]), each["how"]]
            for each in run["goals"]
        ),
    )


def rows_of(run: Run, test: str) -> list[Row]:
    """The rows of one test."""
    return [row for row in run["rows"] if f"::{test}[" in row["test"] + "["]


def kinds(run: Run) -> dict[tuple[str, int, str], dict[str, Row]]:
    """The rows of each kind of request, by who answered."""
    found: dict[tuple[str, int, str], dict[str, Row]] = {}
    for row in rows_of(run, "test_latency"):
        found.setdefault((row["work"], row["depth"], row["placement"]), {})[row["who"]] = row
    return found


def latency(run: Run) -> str:
    return table(
        (
            *("work", "engine", "in flight", "placement", "p50 µs", "p99 µs"),
            *("floor µs", "ratio", "generator"),
        ),
        (
            [
                *(row["work"], row["who"], str(row["depth"]), row["placement"]),
                *(number(row[name]) for name in ("p50_us", "p99_us", "floor_us", "ratio")),
                number(row["generator_us"]),
            ]
            for row in rows_of(run, "test_latency")
        ),
    )


def compared(run: Run) -> str:
    """Ours and a peer's, in one line each kind of request."""
    return table(
        ("work", "in flight", "placement", "ours p50 µs", "peer p50 µs", "peer / ours"),
        (
            [
                *(work, str(depth), placement),
                *(number(rows[who]["p50_us"]) for who in ("ours", "peer")),
                number(rows["peer"]["p50_us"] / rows["ours"]["p50_us"]),
            ]
            for (work, depth, placement), rows in kinds(run).items()
        ),
    )


def milliseconds(row: Row, name: str) -> float | None:
    return row[f"{name}_us"] / 1e3 if f"{name}_us" in row else None


def waits(run: Run) -> str:
    """What users wait for, in milliseconds."""
    return table(
        ("what", "p50 ms", "p90 ms", "p99 ms", "floor ms", "ratio"),
        (
            [
                row["what"],
                *(number(milliseconds(row, name)) for name in ("p50", "p90", "p99", "floor")),
                number(row.get("ratio")),
            ]
            for row in run["rows"]
            if "what" in row
        ),
    )


def processor(run: Run) -> str:
    rows = rows_of(run, "test_processor_time")
    polls = sorted({row["poll"] for row in rows})
    pauses = sorted({row["pause"] for row in rows}, key=lambda pause: (pause > 0, -pause))
    shares = {(row["poll"], row["pause"]): row["p50_us"] / 1e4 for row in rows}
    return table(
        ("--poll-us", *(f"every {pause / 1e3:g} ms" if pause else "idle" for pause in pauses)),
        ([str(poll), *(f"{shares[poll, pause]:.2f}%" for pause in pauses)] for poll in polls),
    )


def machine(run: Run) -> str:
    return (
        f"`make bench` on {run['date']}, commit {run['commit']}: {run['machine']}, "
        f"load average {run['load_average']:g}.\n"
    )


PARTS: dict[str, Callable[[Run], str]] = {
    part.__name__: part for part in (machine, goals, latency, waits, processor)
}


def filled(text: str, run: Run) -> str:
    """The page with each of its parts made anew."""
    for name, part in PARTS.items():
        begin, end = f"<!-- {name} -->\n\n", f"\n<!-- end of {name} -->\n"
        before, rest = text.split(begin)
        _, after = rest.split(end)
        text = f"{before}{begin}{part(run)}{end}{after}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.page", description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="JSON of a run")
    parser.add_argument("--compare", action="store_true", help="print the table of make bench-peer")
    options = parser.parse_args()
    run = reduced(json.loads(options.run.read_text()))
    if options.compare:
        print(compared(run))
        return
    RUN.write_text(json.dumps(run, indent=1, ensure_ascii=False) + "\n")
    PAGE.write_text(filled(PAGE.read_text(), run))


if __name__ == "__main__":
    main()
