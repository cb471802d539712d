"""The whole loop by `replay.max_staleness`: rollouts, publishing and learning in turn (0), or beside each other.

In: seconds of one student call, one teacher call and one optimizer step, which sleep (`fake_engines.py`). Out: seconds
per step of the real program with its real actors; a version's bytes are really packed, put, fetched and checked.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from functools import partial
from typing import Any

from switchkd.tools.bench import trainer_harness
from switchkd.tools.bench.scaling import NEW_TOKENS, ROWS, _task, config
from switchkd.tools.bench.table import Spread, Table, paired, surroundings

WORKERS = 2
UNMEASURED = 2
"""Steps at the start of each run: the pipeline fills."""


class StepTimer:
    """Sees steps end, and ends the run after enough of them."""

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps
        self.ends: list[float] = []
        self.rows: list[Mapping[str, Any]] = []

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.ends.append(time.perf_counter())
        self.rows.append(row)
        if len(self.ends) > UNMEASURED + self.num_steps - 1:
            raise trainer_harness.Enough

    @property
    def step_s(self) -> float:
        measured = self.ends[UNMEASURED - 1 :]
        return (measured[-1] - measured[0]) / (len(measured) - 1)

    def mean(self, key: str) -> float:
        found = [float(row[key]) for row in self.rows[UNMEASURED:]]
        return sum(found) / len(found)


def run(*, smoke: bool, repeats: int, student_s: float, teacher_s: float, learner_s: float) -> Table:
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.tools.bench.fake_engines import FakeLatency, install_fakes
    from switchkd.tools.bench.ray_cluster import cluster

    latency = FakeLatency(student=student_s, teacher=teacher_s, learner=learner_s)
    limits, num_steps, workers = ((0, 1), 2, 1) if smoke else ((0, 1, 2), 8, WORKERS)
    watches: dict[str, list[StepTimer]] = {str(limit): [] for limit in limits}
    with cluster(os.cpu_count() or 1, 400, install_fakes(latency)):
        pairs = paired(
            {str(limit): partial(_once, limit, num_steps, workers, watches[str(limit)]) for limit in limits},
            repeats,
            warmup=0,
        )
    tokens = workers * ROWS * NEW_TOKENS
    rows: list[dict[str, Any]] = [
        {
            "max_staleness": name,
            "s/step": pairs.spread[name],
            "tokens/s": pairs.spread[name].map(lambda s: tokens / s),
            "time / strict": pairs.ratios[name],
            "waited for rollouts, s": Spread.of([watch.mean("time/wait_rollouts_s") for watch in seen]),
            "learning, s": Spread.of([watch.mean("time/learn_s") for watch in seen]),
            "staleness": Spread.of([watch.mean("replay/staleness_mean") for watch in seen]),
        }
        for name, seen in watches.items()
    ]
    notes = surroundings("cpu", "float32", student_ms=1e3 * student_s, teacher_ms=1e3 * teacher_s,
                         learner_ms=1e3 * learner_s, workers=workers, teachers=1, rows=ROWS, new_tokens=NEW_TOKENS,
                         weights_mb=latency.weights_mb, steps=num_steps, repeats=repeats)  # fmt: skip
    return Table(
        title="The loop by how stale a rollout may be (models that sleep)", columns=tuple(rows[0]), rows=tuple(rows),
        notes=notes, remarks=_remarks(watches["0"]),
    )  # fmt: skip


def _once(limit: int, num_steps: int, workers: int, watches: list[StepTimer]) -> float:
    """One run of new actors; seconds per step after its beginning."""
    from switchkd.actors.launch import start_actors

    watch = StepTimer(num_steps)
    watches.append(watch)
    wanted = config(workers, 1, replay={"max_staleness": limit}, train={"batch_size": workers * ROWS})
    trainer_harness.run(
        wanted,
        [_task(0).prompt],
        lambda config, run_dir, log: start_actors(config, run_dir, frozenset(), log),
        watch,
    )
    return watch.step_s


def _remarks(strict: list[StepTimer]) -> tuple[str, ...]:
    """The bound: what two parts can save that take turns."""
    wait = Spread.of([watch.mean("time/wait_rollouts_s") for watch in strict]).median
    learn = Spread.of([watch.mean("time/learn_s") for watch in strict]).median
    return (
        f"In turn a step is {wait:.3f} s of rollouts (publishing included) and {learn:.3f} s of learning; beside each "
        f"other it cannot for long be shorter than the longer one, {max(wait, learn) / (wait + learn):.2f} of that.",
    )
