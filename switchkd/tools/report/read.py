"""Read a run folder in any state: finished, still being written, half empty or damaged.

In: the folder. Out: a `RunData` with what could be read, and one sentence for everything that could not.
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
from switchkd.controller.metrics import METRICS
from switchkd.controller.resume import written_format
from switchkd.data.atomic_files import CONFIG
from switchkd.tools.report.rollout_statistics import RolloutStatistics

ROLLOUTS = "rollouts.jsonl"
SUMMARY = "summary.json"


@dataclass(slots=True)
class RunData:
    """What a folder holds. `rollouts` are a part of them, spread evenly over the file."""

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
        """A section of the config; empty where it is missing."""
        section = self.config.get(name)
        return section if isinstance(section, dict) else {}

    @property
    def stage_scores(self) -> list[tuple[str, dict[str, float]]]:
        """The evaluation at each stage's end."""
        return [(row["stage_end"], row) for row in self.evaluations if isinstance(row.get("stage_end"), str)]


def read_run(path: Path, name: str, max_rollouts: int) -> RunData:
    """Read what can be read; `missing` says what could not. Nothing in the folder makes it fail."""
    run = RunData(path=path, name=name)
    if not any((path / file).exists() for file in (CONFIG, METRICS, ROLLOUTS, SUMMARY)):
        run.missing.append("this folder holds nothing of a run yet")
        return run
    _read_config(run)
    _read_metrics(run)
    _read_rollouts(run, max_rollouts)
    _read_summary(run)
    return run


def _read_config(run: RunData) -> None:
    try:  # it may be anything
        run.config_text = (run.path / CONFIG).read_text(encoding="utf-8")
        config = yaml.safe_load(run.config_text)
    except FileNotFoundError:
        run.missing.append(f"{CONFIG} is missing: the settings cannot be shown")
        return
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        config = None
    if isinstance(config, dict):
        run.config = config
        if written_format(config) != FORMAT:
            run.missing.append(
                f"the run was written in format {written_format(config)}, this page is made for format {FORMAT}: "
                "metrics that have another name since are not drawn"
            )
    else:
        run.missing.append(f"{CONFIG} cannot be read: the settings cannot be shown")


def _read_metrics(run: RunData) -> None:
    for row in _rows(run, METRICS):
        if not isinstance(row.get("step"), int):
            continue
        (run.steps if "stage" in row else run.evaluations).append(row)
    if not run.steps:
        run.missing.append(f"{METRICS} has no steps yet: there is nothing to draw over time")
    if not run.evaluations:
        run.missing.append("no evaluation yet: agreement, KL and scores on held-out data are not known (eval.data)")


def _read_rollouts(run: RunData, limit: int) -> None:
    """One pass; every `stride`-th is kept, and the stride doubles whenever there are too many."""
    stride, plain = 1, 0
    for row in _rows(run, ROLLOUTS):
        if not run.statistics.add(row):
            plain += 1
            continue
        if run.num_rollouts % stride == 0:
            run.rollouts.append(row)
        run.num_rollouts += 1
        if len(run.rollouts) > 2 * max(limit, 1):
            run.rollouts, stride = run.rollouts[::2], 2 * stride
    if len(run.rollouts) > limit:
        run.rollouts = [run.rollouts[i * len(run.rollouts) // limit] for i in range(limit)]
    if plain:
        run.missing.append(f"{plain} lines of {ROLLOUTS} are not rollouts and are left out")
    if not run.num_rollouts:
        off = run.section("rollout").get("save") is False
        why = "rollout.save is false" if off else "none was trained on"
        run.missing.append(f"{ROLLOUTS} has no rollouts yet ({why}): who wrote what cannot be shown")
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
    """The JSON object in a text; None for anything else."""
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    return tree if isinstance(tree, dict) else None


def _since(path: Path) -> str:
    times = [(path / file).stat().st_mtime for file in (METRICS, ROLLOUTS) if (path / file).exists()]
    return f" (last written {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(max(times)))})" if times else ""


def _rows(run: RunData, name: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file that may be growing while it is read."""
    damaged = 0
    try:
        file = (run.path / name).open("rb")
    except FileNotFoundError:
        run.missing.append(f"{name} is missing")
        return
    except OSError as error:
        run.missing.append(f"{name} cannot be read ({error.strerror})")
        return
    with file:
        for line in file:
            if not line.endswith(b"\n"):
                run.missing.append(f"the last line of {name} is incomplete: it is being written, or its writer died")
            elif (row := _object(line)) is None:
                damaged += 1
            else:
                yield row
    if damaged:
        run.missing.append(f"{damaged} lines of {name} cannot be read and are left out")
