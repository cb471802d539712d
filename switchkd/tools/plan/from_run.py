"""`switchkd plan --from-run`: who waits for whom in a run, and which process to add.

In: a run folder's config.yaml and metrics.jsonl. Out: a `WaitReport`. The mean number of calls that wait at a teacher
replica or are served there is the share of the workers' time that waits, times workers per replica (Little's law):
near or above 1, the replicas are always busy, and more workers would only wait longer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from switchkd.config.errors import ConfigError
from switchkd.config.loader import load
from switchkd.config.resources import key_of, spans
from switchkd.config.schema import Config
from switchkd.controller.metrics import read_rows
from switchkd.data.atomic_files import CONFIG, METRICS

WARM_UP = 1
"""Steps at the start of a stage that do not count: the pipeline fills."""
LITTLE = 0.1
"""Share of the time below which a wait is not worth a process."""
FULL = 0.8
"""Calls at a replica from which on it counts as always busy."""


@dataclass(frozen=True, kw_only=True, slots=True)
class WaitReport:
    """Shares of the time, over the last stage that generated tokens."""

    stage: str
    num_steps: int
    learner_waits: float  # for rollouts
    workers_wait_teacher: float  # of their calls
    workers_idle: float  # without a task
    teacher_calls: float  # that wait or are served at a replica while workers generate; 0 without own replicas
    limited_by: str  # learner, teacher or rollout
    advice: str


def wait_report(run_dir: Path) -> WaitReport:
    """Read a run of this version. Raises ConfigError where it has too few steps, or none that generate."""
    if not (run_dir / CONFIG).is_file() or not (run_dir / METRICS).is_file():
        raise ConfigError(f"--from-run {run_dir}: there is no {CONFIG} or no {METRICS}; name the folder of a run")
    config = load(run_dir / CONFIG)
    generated = [row for row in read_rows(run_dir / METRICS) if row.get("rollout/tokens")]
    stage = str(generated[-1]["stage"]) if generated else ""
    rows = [row for row in generated if row["stage"] == stage][WARM_UP:]
    if not rows:
        raise ConfigError(
            f"--from-run {run_dir}: {METRICS} has no stage with {WARM_UP + 1} steps that generated; train it longer"
        )
    return _report(config, stage, rows)


def _report(config: Config, stage: str, rows: Sequence[Mapping[str, Any]]) -> WaitReport:
    def total(key: str) -> float:
        return sum(float(row[key]) for row in rows)

    numbers = {role: span.max for role, span in spans(config).items()}
    num_teachers = sum(num for role, num in numbers.items() if role.startswith("teacher"))
    work_s = max(total("time/rollout_s"), 1e-9)
    learner_waits = total("time/wait_rollouts_s") / max(total("time/step_s"), 1e-9)
    waits, idle = total("time/wait_teacher_s") / work_s, total("time/rollout_idle_s")
    calls = waits * numbers["rollout"] / num_teachers if num_teachers else 0.0
    limited_by, advice = _advice(config, numbers, learner_waits, waits, calls)
    return WaitReport(
        stage=stage,
        num_steps=len(rows),
        learner_waits=learner_waits,
        workers_wait_teacher=waits,
        workers_idle=idle / (idle + work_s),
        teacher_calls=calls,
        limited_by=limited_by,
        advice=advice,
    )


def _advice(
    config: Config, numbers: Mapping[str, int], learner_waits: float, waits: float, calls: float
) -> tuple[str, str]:
    """Return the role that limits the run, and what to change first."""
    strict = config.replay.max_staleness == 0
    ahead = "replay.max_staleness=1 first lets workers and learner work at the same time; then " if strict else ""
    if learner_waits < LITTLE or (strict and learner_waits < 0.5):
        return "learner", f"{ahead}one more learner rank: {_more(numbers, 'learner')}"
    ahead = ahead if learner_waits < 1 - LITTLE else ""
    teachers = [role for role in numbers if role.startswith("teacher")]
    # no more workers than replicas could not keep one more of them busy
    enough = numbers["rollout"] > sum(numbers[role] for role in teachers)
    worker = "" if enough else f" and one more worker: {_more(numbers, 'rollout')}"
    if calls >= FULL:
        return "teacher", f"{ahead}one more teacher: {_more(numbers, *teachers)}{worker}"
    if not teachers and waits >= 0.5:
        return "teacher", f"{ahead}the teacher is served elsewhere: give it one more replica there"
    return "rollout", f"{ahead}one more rollout worker: {_more(numbers, 'rollout')}"


def _more(numbers: Mapping[str, int], *roles: str) -> str:
    return " or ".join(f"{key_of(role)}={numbers[role] + 1}" for role in roles)


def show(report: WaitReport, as_json: bool) -> None:
    """Print one JSON object, or lines."""
    if as_json:
        print(json.dumps(asdict(report)))
        return
    print(f"stage {report.stage}, {report.num_steps} steps")
    print(f"learner: waits for rollouts in {report.learner_waits:.0%} of the time")
    print(f"rollout workers: wait for the teacher in {report.workers_wait_teacher:.0%} of their calls' time")
    print(f"rollout workers: have no task in {report.workers_idle:.0%} of the time")
    if report.teacher_calls:
        num = f"{report.teacher_calls:.2f}"
        print(f"teachers: while workers generate, {num} calls wait or are served at each replica")
    print(f"limited by the {report.limited_by}: {report.advice}")
