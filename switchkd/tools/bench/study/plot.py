"""Draws a study's table: the gain or score that ranks with its intervals, and the main methods' scores by part.

In: a QualityTable. Out: a PNG.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import write_atomic
from switchkd.tools.bench.study.table import QualityTable

MARKS = "osv^D<>Ph*Xpd"


def draw(table: QualityTable, main: tuple[str, ...], path: Path) -> None:
    """Write the picture to `path`. Curves are drawn for `main`, or for all methods where it is empty."""
    figure = check_matplotlib()(figsize=(13, 1.5 + 0.33 * max(len(table.rows), 12)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.1))
    _ranking(left, table)
    _curves(right, table, main or tuple(row.method for row in table.rows))
    figure.suptitle(table.name)
    write_atomic(path, lambda beside: figure.savefig(beside, format="png", dpi=120))


def _ranking(axes: Any, table: QualityTable) -> None:
    """Draw gains where the starts are known: seeds differ more in their starts than methods do in their gains."""
    rows = table.rows[::-1]  # the best on top
    by_gain = all(row.gain for row in rows)
    means = [row.gain if by_gain and row.gain else row.scores[table.rank_by] for row in rows]
    seeds = [list((row.gains if by_gain else row.by_seed).values()) for row in rows]
    places = list(range(len(rows)))
    axes.errorbar([mean.mean for mean in means], places, xerr=[mean.half or 0 for mean in means], fmt="o", capsize=3)
    for scores, place in zip(seeds, places, strict=True):
        axes.plot(scores, [place] * len(scores), "|", color="gray", markersize=6)
    axes.set_yticks(places, [f"{table.title(row)} ({len(row.by_seed)})" for row in rows])
    axes.set_xlim(*_around([score for scores in seeds for score in scores] + ([0.0] if by_gain else [])))
    if by_gain:
        axes.axvline(0.0, linestyle=":", color="gray")
    axes.set_xlabel(f"{'gain in ' if by_gain else ''}{table.rank_by}: mean, 95% interval; strokes: seeds")
    axes.grid(axis="x", alpha=0.3)


def _curves(axes: Any, table: QualityTable, main: tuple[str, ...]) -> None:
    parts = table.parts
    axes.set_ylabel(table.rank_by)
    drawn = [row for row in table.rows if row.method in main]
    if means := [mean.mean for row in drawn for part in parts if (mean := table.part(row, part)) is not None]:
        axes.set_ylim(*_around(means))
    for i, row in enumerate(drawn):
        points = [(place, mean) for place, part in enumerate(parts) if (mean := table.part(row, part)) is not None]
        shift = 0.5 * (i / max(len(drawn) - 1, 1) - 0.5)  # side by side instead of overlapping
        axes.errorbar(
            [place + shift for place, _ in points], [mean.mean for _, mean in points],
            yerr=[mean.half or 0 for _, mean in points], marker=MARKS[i % len(MARKS)], color=f"C{i % 10}",
            linestyle="-" if i < 10 else "--", capsize=2, linewidth=1, label=row.method,
        )  # fmt: skip
    axes.set_xticks(range(len(parts)), parts, rotation=20, ha="right")  # names may be long
    axes.grid(axis="y", alpha=0.3)
    if drawn:
        axes.legend(fontsize="small")


def _around(scores: list[float]) -> tuple[float, float]:
    """Return axis limits that show all scores; the intervals of two seeds may be far wider."""
    low, high = min(scores), max(scores)
    margin = 0.15 * (high - low) or 1.0
    return low - margin, high + margin


def check_matplotlib() -> Any:
    """Return matplotlib's Figure. Raises ConfigError where it is not installed."""
    try:  # of the bench extra
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the plot needs matplotlib: pip install 'switchkd[bench]'") from None
    return Figure
