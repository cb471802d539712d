"""Reads a run folder in any state: finished, still being written, half empty or damaged.

In: the folder. Out: a `RunData` with the readable part, and one sentence for each missing part.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from switchkd.config.schema import FORMAT
from switchkd.controller.resume import written_format
from switchkd.data.atomic_files import CONFIG, METRICS, ROLLOUTS
from switchkd.tools.report.rollout_statistics import RolloutStatistics

SUMMARY = "summary.json"


@dataclass(slots=True)
class RunData:
    """Content of a run folder. `rollouts` are a sample, spread evenly over the file."""

    path: Path
    name: str
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    rollouts: list[dict[str, Any]] = field(default_factory=list)
    num_rollouts: int = 0
    statistics: RolloutStatistics = field(default_factory=RolloutStatistics)
    missing: list[str] = field(default_factory=list)

    def section(self, name: str) -> dict[str, Any]:
        """Return a section of the config; empty where it is missing."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def stage_scores(self) -> list[tuple[str, dict[str, float]]]:
        """Return the evaluation at each stage's end."""
        return [(row["stage_end"], row) for row in self.evaluations if isinstance(row.get("stage_end"), str)]


def read_run(path: Path, name: str, max_rollouts: int) -> RunData:
    """Read the folder; `missing` names what cannot be read. No content of the folder raises an error."""
    run = RunData(path=path, name=name)
    _read_config(run)
    _read_metrics(run)
    _read_rollouts(run, max_rollouts)
    _read_summary(run)
    return run


def _read_config(run: RunData) -> None:
    try:  # the file may have been edited
        run.config_text = (run.path / CONFIG).read_text(encoding="utf-8")
        config = yaml.safe_load(run.config_text)
    except FileNotFoundError:
        run.missing.append(f"{CONFIG} is missing: the settings cannot be shown")
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    if not isinstance(config, dict):
        run.missing.append(f"{CONFIG} cannot be read: the settings cannot be shown")
        return
    run.config = config
    if written_format(config) != FORMAT:
        run.missing.append(
            f"the run was written in format {written_format(config)}, this page is made for format {FORMAT}: "
            "metrics that have another name since are not drawn"
        )


def _read_metrics(run: RunData) -> None:
    for row in _rows(run, METRICS):
        if isinstance(row.get("step"), int):
            (run.steps if "stage" in row else run.evaluations).append(row)
    if not run.steps:
        run.missing.append(f"{METRICS} has no steps yet: there is nothing to draw over time")
    if not run.evaluations:
        run.missing.append("no evaluation yet: agreement, KL and scores on held-out data are not known (eval.data)")


def _read_rollouts(run: RunData, limit: int) -> None:
    """Keep every `stride`-th rollout in one pass; the stride doubles whenever too many are kept."""
    stride, num_invalid = 1, 0
    for row in _rows(run, ROLLOUTS):
        if not run.statistics.add(row):
            num_invalid += 1
            continue
        if run.num_rollouts % stride == 0:
            run.rollouts.append(row)
        run.num_rollouts += 1
        if len(run.rollouts) > 2 * max(limit, 1):
            run.rollouts, stride = run.rollouts[::2], 2 * stride
    if len(run.rollouts) > limit:
        run.rollouts = [run.rollouts[i * len(run.rollouts) // limit] for i in range(limit)]
    if num_invalid:
        run.missing.append(f"{num_invalid} lines of {ROLLOUTS} are not rollouts and are left out")
    if not run.num_rollouts:
        reason = "rollout.save is false" if run.section("rollout").get("save") is False else "none was trained on"
        run.missing.append(f"{ROLLOUTS} has no rollouts yet ({reason}): who wrote what cannot be shown")
    elif run.rollouts and not any("pieces" in row for row in run.rollouts):
        run.missing.append(f"{ROLLOUTS} has no texts of single tokens: they are shown in runs of one writer")


def _read_summary(run: RunData) -> None:
    if not (run.path / SUMMARY).exists():
        run.missing.append(f"{SUMMARY} is missing: the run is still going on, or was killed{_since(run.path)}")
        return
    run.summary = _object((run.path / SUMMARY).read_bytes()) or {}
    if not run.summary:
        run.missing.append(f"{SUMMARY} cannot be read")
    elif not run.summary.get("finished"):
        run.missing.append(f"the run was stopped after {run.summary.get('steps')} steps; --resume goes on with it")


def _object(text: str | bytes) -> dict[str, Any] | None:
    """Parse a JSON object; None for anything else."""
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _since(path: Path) -> str:
    times = [(path / file).stat().st_mtime for file in (METRICS, ROLLOUTS) if (path / file).exists()]
    return f" (last written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(max(times)))})" if times else ""


def _rows(run: RunData, name: str) -> Iterator[dict[str, Any]]:
    """Yield the objects of a JSONL file that may be growing while it is read."""
    num_damaged = 0
    try:
        file = (run.path / name).open("rb")
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        run.missing.append(f"{name} is missing" if missing else f"{name} cannot be read ({error.strerror})")
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                run.missing.append(f"the last line of {name} is incomplete: it is being written, or its writer died")
            elif (row := _object(line)) is None:
                num_damaged += 1
            else:
                yield row
    if num_damaged:
        run.missing.append(f"{num_damaged} lines of {name} cannot be read and are left out")
