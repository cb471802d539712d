"""Times the whole loop by `replay.max_staleness`: rollouts, publishing and learning in turn (0), or concurrently.

In: seconds of one student call, one teacher call and one optimizer step, which sleep (`engines/fake.py`). Out: seconds
per step with the real actors, which pack, put, fetch and check a version's bytes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from functools import partial
from statistics import fmean
from typing import Any

from switchkd.tools.bench import trainer_harness
from switchkd.tools.bench.scaling import NEW_TOKENS, ROWS, WEIGHTS_MB, fake_task, sleeping_config
from switchkd.tools.bench.table import Cell, Options, Spread, Table, compare, take_turns

UNMEASURED = 2
"""Steps at the start of each run, in which the pipeline fills."""


class StepTimer:
    """Records the ends of steps, and ends the run after `num_steps` measured ones."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.ends: list[float] = []
        self.rows: list[Mapping[str, Any]] = []

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.ends.append(time.perf_counter())
        self.rows.append(row)
        if len(self.ends) == UNMEASURED + self.num_steps:
            raise trainer_harness.StopTraining

    @property
    def step_s(self) -> float:
        return (self.ends[-1] - self.ends[UNMEASURED - 1]) / self.num_steps

    def mean(self, key: str) -> float:
        return fmean(float(row[key]) for row in self.rows[UNMEASURED:])


def run(options: Options, *, student_s: float, teacher_s: float, learner_s: float) -> Table:
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.tools.bench.ray_cluster import cluster

    latency = {"student_s": student_s, "teacher_s": teacher_s, "learner_s": learner_s}
    limits, num_steps, num_workers = ((0, 1), 2, 1) if options.smoke else ((0, 1, 2), 8, 2)
    with cluster(os.cpu_count() or 1, 400):
        sides = {str(limit): partial(_train, limit, num_steps, num_workers, latency) for limit in limits}
        timers = take_turns(sides, options.repeats, warmup=0)
    pairs = compare({limit: [timer.step_s for timer in measured] for limit, measured in timers.items()})
    num_tokens = num_workers * ROWS * NEW_TOKENS
    rows: list[dict[str, Cell]] = [
        {
            "max_staleness": limit,
            "s/step": pairs.spread[limit],
            "tokens/s": pairs.spread[limit].map(lambda s: num_tokens / s),
            "time / strict": pairs.ratios[limit],
            "waited for rollouts, s": _spread(measured, "time/wait_rollouts_s"),
            "learning, s": _spread(measured, "time/learn_s"),
            "staleness": _spread(measured, "replay/staleness_mean"),
        }
        for limit, measured in timers.items()
    ]
    notes = options.notes(
        student_ms=1e3 * student_s, teacher_ms=1e3 * teacher_s, learner_ms=1e3 * learner_s, workers=num_workers,
        teachers=1, rows=ROWS, new_tokens=NEW_TOKENS, weights_mb=WEIGHTS_MB, steps=num_steps,
    )  # fmt: skip
    title = "The loop by how stale a rollout may be (models that sleep)"
    return Table(title=title, rows=rows, notes=notes, remarks=_remarks(timers["0"]))


def _train(limit: int, num_steps: int, num_workers: int, latency: Mapping[str, float]) -> StepTimer:
    """Run `num_steps` measured steps with new actors."""
    from switchkd.actors.launch import start_actors

    timer = StepTimer(num_steps)
    strictness = {"replay": {"max_staleness": limit}, "train": {"batch_size": num_workers * ROWS}}
    config = sleeping_config(num_workers, 1, latency, **strictness)
    trainer_harness.run(config, [fake_task(0).prompt], start_actors, timer)
    return timer


def _spread(timers: Sequence[StepTimer], key: str) -> Spread:
    return Spread.from_values([timer.mean(key) for timer in timers])


def _remarks(strict: Sequence[StepTimer]) -> tuple[str, ...]:
    """Return the bound on what overlap can save."""
    wait, learn = (_spread(strict, key).median for key in ("time/wait_rollouts_s", "time/learn_s"))
    return (
        f"In turn a step is {wait:.3f} s of rollouts (publishing included) and {learn:.3f} s of learning; beside each "
        f"other it cannot for long be shorter than the longer one, {max(wait, learn) / (wait + learn):.2f} of that.",
    )
