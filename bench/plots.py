# SPDX-License-Identifier: Apache-2.0
"""The plots of docs/performance.md, which docs/conf.py has drawn from docs/performance.json.

Each is drawn twice, transparent, in colours for a light and for a dark page.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.page import Run, kinds, limit, number

ROW_HEIGHT = 0.27  # inches


class Colours(NamedTuple):
    text: str
    grid: str
    fast: str
    pure: str
    floor: str
    missed: str


THEMES = {
    "light": Colours("#1f2328", "#d0d7de", "#0969da", "#8250df", "#57606a", "#cf222e"),
    "dark": Colours("#e6edf3", "#373e47", "#58a6ff", "#bc8cff", "#9da7b3", "#ff7b72"),
}


def _axes(rows: int, colours: Colours) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.5, 0.9 + ROW_HEIGHT * rows), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.set_ylim(rows - 0.4, -0.6)
    axes.tick_params(colors=colours.text, length=0, labelsize=9)
    axes.grid(axis="x", color=colours.grid, linewidth=0.7)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def goals(run: Run, colours: Colours) -> Figure:
    """How much of each limit is used; more than all of it misses the goal."""
    shown = run["goals"]
    figure, axes = _axes(len(shown), colours)
    for place, goal in enumerate(shown):
        reached, most = goal["reached"], goal["limit"]
        if goal["at_least"]:
            reached, most = most, reached
        used = reached / most if most else float(reached > 0)
        colour = colours.fast if goal["good"] else colours.missed
        axes.barh(place, min(used, 1.6), color=colour, height=0.62)
        text = f"{number(goal['reached'])} ({limit(goal)})"
        axes.text(1.64, place, text, color=colours.text, va="center", fontsize=8)
    axes.axvline(1, color=colours.floor, linewidth=1.2)
    axes.set_yticks(range(len(shown)), [goal["name"] for goal in shown])
    axes.set_xticks([0, 0.5, 1], ["0", "half of the limit", "limit"])
    axes.set_xlim(0, 2)
    return figure


def latency(run: Run, colours: Colours) -> Figure:
    """Of each kind of request: p50 as a dot, p99 as the end of its line, the floor as a tick."""
    shown = kinds(run)
    figure, axes = _axes(2 * len(shown), colours)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    labels = []
    for place, (kind, rows) in enumerate(shown.items()):
        labels.append(f"{kind[0]}, {kind[1]} in flight, {kind[2]}")
        for line, (who, row) in enumerate(rows.items()):
            colour = colours.fast if who == "fast" else colours.pure
            y = 2 * place + 0.6 * line
            axes.hlines(y, row["p50_us"], row["p99_us"], color=colour, linewidth=1.6)
            axes.plot(row["p50_us"], y, "o", color=colour, markersize=5.5)
            axes.plot(row["floor_us"], y, "|", color=colours.floor, markersize=11)
            text = f"{number(row['p50_us'])} µs"
            place_of_text = max(row["p99_us"], row["floor_us"]) * 1.12
            axes.text(place_of_text, y, text, color=colours.text, va="center", fontsize=8)
    axes.set_yticks([2 * place + 0.3 for place in range(len(shown))], labels)
    axes.margins(x=0.12)
    axes.set_xlabel("microseconds a request, logarithmic", color=colours.text, fontsize=9)
    for name, marker, colour in (
        ("compiled engine: p50 to p99", "o-", colours.fast),
        ("pure engine: p50 to p99", "o-", colours.pure),
        ("floor of the machine", "|", colours.floor),
    ):
        axes.plot([], [], marker, color=colour, label=name)
    legend = axes.legend(
        loc="lower right", fontsize=8, framealpha=0, ncols=3, bbox_to_anchor=(1, 1)
    )
    for entry in legend.get_texts():
        entry.set_color(colours.text)
    return figure


PLOTS = {plot.__name__: plot for plot in (goals, latency)}


def draw(run: Run, folder: Path) -> None:
    """Write NAME-THEME.svg for each plot; its text stays text."""
    folder.mkdir(exist_ok=True)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "vhost-rpmb"}):
        for name, plot in PLOTS.items():
            for theme, colours in THEMES.items():
                path = folder / f"{name}-{theme}.svg"
                plot(run, colours).savefig(path, transparent=True, metadata={"Date": None})
