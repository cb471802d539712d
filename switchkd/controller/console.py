"""Shows a run on a terminal: a progress bar, and one line per role with its current activity.

In: the activities of roles (`now`) and each step's row. Out: lines that rich redraws several times a second, also while
the loop waits.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.filesize import decimal
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

FIGURES = {
    "teacher": (
        ("teacher/calls", "{:.0f} calls a step".format),
        ("time/wait_teacher_s", "awaited for {:.3g} s".format),
    ),
    "rollout": (
        ("rollout/tokens_per_s", "{:,.0f} tokens/s".format),
        ("time/rollout_idle_s", "idle for {:.3g} s".format),
    ),
    "replay": (
        ("replay/bytes", lambda size: f"{decimal(int(size))} held"),
        ("replay/waiting", "{:.0f} rollouts wait".format),
    ),
    "learner": (("time/learn_s", "{:.3g} s a step".format), ("time/wait_rollouts_s", "waited for {:.3g} s".format)),
}
"""By role: its rate in the last step, and its queue or its waiting time."""


class LiveView:
    def __init__(self, console: Console, num_steps: int, first_step: int) -> None:
        columns = (MofNCompleteColumn(), BarColumn(bar_width=24), TextColumn("{task.fields[line]}"))
        self._bar = Progress(*columns, TimeRemainingColumn(), console=console, auto_refresh=False)
        self._task = self._bar.add_task("", total=num_steps, completed=first_step, line="starting")
        self._now: dict[str, tuple[str, float]] = {}  # by role: its activity, and since when
        self._row: Mapping[str, Any] = {}
        self._over = False
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        """Stop redrawing, and leave only the progress bar on the terminal."""
        self._over = True
        self._live.stop()

    def now(self, **doing: str) -> None:
        """Show what roles do from now on; an empty text means no activity."""
        for role, text in doing.items():
            if self._now.get(role, ("", 0.0))[0] != text:
                self._now[role] = (text, time.monotonic())

    def step(self, num_done: int, row: Mapping[str, Any], line: str) -> None:
        self._row = row
        self._bar.update(self._task, completed=num_done, line=line)
        self._live.refresh()

    def _render(self) -> Group:
        table = Table.grid(padding=(0, 2))
        for _ in range(4):
            table.add_column(overflow="ellipsis", no_wrap=True)
        for role, figures in FIGURES.items():
            text, since = self._now.get(role, ("", 0.0))
            seconds = int(time.monotonic() - since)
            doing = f"{text} ({seconds} s)" if text and seconds >= 2 else text or "-"
            shown = ["" if self._row.get(key) is None else text_of(self._row[key]) for key, text_of in figures]
            table.add_row(role, doing, *shown)
        return Group(self._bar) if self._over else Group(self._bar, table)
