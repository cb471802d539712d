"""What every bench answers with: a table, and how its numbers are taken.

In: sides to compare, as functions that do one piece of work and say how long it took. Out: medians of alternating
runs with their spread, and a `Table` for the terminal and for a JSON file.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import write_json_atomic

VERSIONS = ("switchkd", "torch", "transformers", "ray", "deepspeed", "trl")


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Several measurements of one thing: the median, and how far they lie apart."""

    median: float
    low: float  # of four and more the quartiles, of fewer the extremes
    high: float
    num: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError without values."""
        if not values:
            raise ValueError("no measurements: repeats must be at least 1")
        if len(values) < 4:
            low, high = min(values), max(values)
        else:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=statistics.median(values), low=low, high=high, num=len(values))

    def map(self, function: Callable[[float], float]) -> Spread:
        """The spread of a monotonous function of the values, such as a rate of a time."""
        low, high = sorted((function(self.low), function(self.high)))
        return Spread(median=function(self.median), low=low, high=high, num=self.num)

    def __str__(self) -> str:
        if self.num == 1:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Sides that were measured in turns."""

    values: dict[str, list[float]]
    spread: dict[str, Spread]
    ratios: dict[str, Spread]
    """Each side's value divided by that of the first side in the same turn."""


Cell = str | int | float | Spread | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Columns are named with their unit; the first says what a row is. `notes` say on what and with what it ran."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[Mapping[str, Cell], ...]
    notes: Mapping[str, Any]
    remarks: tuple[str, ...] = ()  # sentences for the reader

    def __post_init__(self) -> None:
        for row in self.rows:
            if unknown := set(row) - set(self.columns):
                raise ValueError(f"{self.title}: no column for {sorted(unknown)}")

    def to_json(self) -> dict[str, Any]:
        rows = [
            {name: asdict(cell) if isinstance(cell, Spread) else cell for name, cell in row.items()}
            for row in self.rows
        ]
        notes, remarks = dict(self.notes), list(self.remarks)
        return {"title": self.title, "columns": list(self.columns), "rows": rows, "notes": notes, "remarks": remarks}

    def write(self, path: Path) -> None:
        """One JSON object, whole or not at all."""
        write_json_atomic(path, self.to_json())

    def show(self) -> None:
        """To the terminal. Too wide for it, a table is printed on long lines: never with numbers cut off."""
        from rich.console import Console
        from rich.table import Table as RichTable

        shown = RichTable(title=self.title, title_justify="left")
        for i, name in enumerate(self.columns):
            shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in self.rows:
            shown.add_row(*(_text(row.get(name)) for name in self.columns))
        console = Console()
        Console(
            width=max(console.width, console.measure(shown, options=console.options.update(max_width=10_000)).maximum)
        ).print(shown)
        for remark in self.remarks:
            console.print(remark, highlight=False, markup=False, soft_wrap=True)
        told = "; ".join(f"{key} {_text(value)}" for key, value in self.notes.items())
        console.print(told, highlight=False, markup=False, soft_wrap=True)


def paired(sides: Mapping[str, Callable[[], float]], repeats: int, warmup: int = 1) -> Pairs:
    """Measure all sides in turns, there and back again (A B C, C B A, ...), so that a machine that warms up or is
    shared weighs on all alike. A side does its work once and returns what it measured, seconds as a rule.

    The first side is the one that ratios are taken against. Raises ValueError for no sides or no repeats.
    """
    if not sides or repeats < 1 or warmup < 0:
        raise ValueError(f"{len(sides)} sides, repeats {repeats}, warmup {warmup}: nothing to measure")
    names = list(sides)
    values: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(-warmup, repeats):
        for name in names if turn % 2 == 0 else reversed(names):
            value = sides[name]()
            if turn >= 0:
                values[name].append(value)
    first = values[names[0]]
    return Pairs(
        values=values,
        spread={name: Spread.of(found) for name, found in values.items()},
        ratios={
            name: Spread.of([own / other for own, other in zip(found, first, strict=True)])
            for name, found in values.items()
        },
    )


def check_device(device: str) -> None:
    """ConfigError where a bench would have to fall back to another device."""
    if device == "cpu":
        return
    if device != "cuda":
        raise ConfigError(f"--device {device}: choose cpu or cuda")
    import torch

    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch sees no CUDA device here; take --device cpu")


def surroundings(device: str, dtype: str, **more: Any) -> dict[str, Any]:
    """The notes of a table: machine, versions, date, and what the bench adds."""
    return {
        "device": device_name(device),
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 1,
        "dtype": dtype,
        **more,
        **{name: _version(name) for name in VERSIONS if _version(name)},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def device_name(device: str) -> str:
    """`cpu`, or the GPU's own name: what a number was really measured on."""
    if device == "cpu":
        return "cpu"
    import torch

    return f"cuda ({torch.cuda.get_device_name()})"


def cpu_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _text(value: Any) -> str:
    if value is None:
        return "-"
    return _short(value) if isinstance(value, float) else str(value)


def _short(value: float) -> str:
    """Three digits that matter, and no exponent where a reader would stumble over it."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
