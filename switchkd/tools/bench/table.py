"""Measures the sides of a bench in turns, and prints the results as a table.

In: sides to compare, as functions that do one piece of work and return a measurement. Out: medians of alternating runs
with their spread, and a `Table` for the terminal and for a JSON file.
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
from typing import Any, TypeVar

from switchkd.config.errors import ConfigError
from switchkd.data.atomic_files import write_json_atomic

VERSIONS = ("switchkd", "torch", "transformers", "ray", "deepspeed", "trl")
INSTRUCTION_SETS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
"""Those that decide how fast a CPU multiplies in float32 and in bfloat16."""
CPUINFO = Path("/proc/cpuinfo")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """Options of the measurement itself."""

    smoke: bool
    repeats: int
    device: str
    dtype: str
    threads: int

    def notes(self, **more: Any) -> dict[str, Any]:
        """Return the notes of a table: machine, versions and settings of the measurement."""
        device = self.device
        if device == "cuda":
            import torch

            device = f"cuda ({torch.cuda.get_device_name()})"
        return surroundings(device=device, dtype=self.dtype, threads=self.threads, repeats=self.repeats, **more)


@dataclass(frozen=True, kw_only=True, slots=True)
class Spread:
    """Median and spread of several measurements of one quantity."""

    median: float
    low: float  # with `high`: the quartiles of four and more values, the extremes of fewer
    high: float
    num: int

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Spread:
        """Compute median and spread. Raises ValueError without values."""
        if not values:
            raise ValueError("no measurements: repeats must be at least 1")
        if len(values) < 4:
            low, high = min(values), max(values)
        else:
            low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median=statistics.median(values), low=low, high=high, num=len(values))

    def map(self, function: Callable[[float], float]) -> Spread:
        """Return the spread of a monotonic function of the values, such as the rate of a time."""
        low, high = sorted((function(self.low), function(self.high)))
        return Spread(median=function(self.median), low=low, high=high, num=self.num)

    def __str__(self) -> str:
        if self.num == 1:
            return _short(self.median)
        return f"{_short(self.median)} ({_short(self.low)} to {_short(self.high)})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Pairs:
    """Seconds of sides measured in turns."""

    values: dict[str, list[float]]
    spread: dict[str, Spread]
    ratios: dict[str, Spread]  # each side's value over the first side's in the same turn


Cell = str | int | float | Spread | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """Rows by column. A column's name has its unit; the first column names the row. `notes` describe the machine."""

    title: str
    rows: Sequence[Mapping[str, Cell]]
    notes: Mapping[str, Any]
    remarks: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row))

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "columns": self.columns}

    def write(self, path: Path) -> None:
        """Write one JSON object atomically."""
        write_json_atomic(path, self.to_json())

    def show(self) -> None:
        """Print the table; where it is wider than the terminal, on longer lines, so that no number is cut off."""
        from rich.console import Console
        from rich.table import Table as RichTable

        shown = RichTable(title=self.title, title_justify="left")
        for i, name in enumerate(self.columns):
            shown.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for row in self.rows:
            shown.add_row(*(_text(row.get(name)) for name in self.columns))
        console = Console()
        needed = console.measure(shown, options=console.options.update(max_width=10_000)).maximum
        Console(width=max(console.width, needed)).print(shown)
        notes = "; ".join(f"{key} {_text(value)}" for key, value in self.notes.items())
        for line in (*self.remarks, notes):
            console.print(line, highlight=False, markup=False, soft_wrap=True)


def take_turns(sides: Mapping[str, Callable[[], T]], repeats: int, warmup: int = 1) -> dict[str, list[T]]:
    """Call all sides in turns, forwards and backwards (A B C, C B A, ...), so that a machine's drift affects all alike.
    Returns each side's results without the warm-up. Raises ValueError where there is nothing to measure."""
    if not sides or repeats < 1 or warmup < 0:
        raise ValueError(f"{len(sides)} sides, repeats {repeats}, warmup {warmup}: nothing to measure")
    results: dict[str, list[T]] = {name: [] for name in sides}
    for turn in range(-warmup, repeats):
        for name in sides if turn % 2 == 0 else reversed(list(sides)):
            result = sides[name]()
            if turn >= 0:
                results[name].append(result)
    return results


def compare(values: Mapping[str, Sequence[float]]) -> Pairs:
    """Return spreads and, within each turn, ratios against the first side."""
    first = next(iter(values.values()))
    ratios = {name: [x / base for x, base in zip(numbers, first, strict=True)] for name, numbers in values.items()}
    return Pairs(
        values={name: list(numbers) for name, numbers in values.items()},
        spread={name: Spread.from_values(numbers) for name, numbers in values.items()},
        ratios={name: Spread.from_values(numbers) for name, numbers in ratios.items()},
    )


def check_device(device: str) -> None:
    """Raise ConfigError for a device that is not available."""
    if device not in ("cpu", "cuda"):
        raise ConfigError(f"--device {device}: choose cpu or cuda")
    if device == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("--device cuda: torch sees no CUDA device here; take --device cpu")


def surroundings(**more: Any) -> dict[str, Any]:
    """Return machine, versions, date, and the bench's own notes."""
    versions = {name: _version(name) for name in VERSIONS}
    return {
        "cpu": _cpuinfo("model name") or platform.processor() or platform.machine(),
        "instruction sets": instruction_sets(),
        "cores": os.cpu_count() or 1,
        **more,
        **{name: version for name, version in versions.items() if version},
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def instruction_sets() -> str:
    """Return those of INSTRUCTION_SETS that the CPU shows; a virtual machine may hide some."""
    flags = _cpuinfo("flags").split()
    return ", ".join(name for name in INSTRUCTION_SETS if name in flags) or f"none of {', '.join(INSTRUCTION_SETS)}"


def _cpuinfo(key: str) -> str:
    """Return the value of the first processor's line; empty without one."""
    lines = CPUINFO.read_text().splitlines() if CPUINFO.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.lower().startswith(key)), "")


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
    """Format three significant digits; with an exponent only for very small and very large numbers."""
    if value != 0 and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
