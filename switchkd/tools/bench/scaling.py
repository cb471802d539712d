"""Measures throughput by number of rollout workers and teachers, with models that sleep (`engines/fake.py`).

In: seconds of one student call and of one teacher call. Out: tokens per second against the limits of workers and of
teachers, and how busy this machine's cores are.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, cast

from switchkd.config.schema import Config
from switchkd.tools.bench.process_stats import cpu_seconds
from switchkd.tools.bench.table import Options, Spread, Table, take_turns
from switchkd.tools.bench.trainer_harness import StepLog, endless_config

if TYPE_CHECKING:
    from switchkd.controller.handles import WorkerHandle
    from switchkd.types import RolloutTask, WorkReport

BLOCK, ROWS, NEW_TOKENS = 4, 8, 32
WEIGHTS_MB = 8.0
NEAR = 0.85
"""Share of a limit from which on it is named as the reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measurement:
    """One turn of a group of workers."""

    elapsed_s: float
    num_calls: int  # of teachers
    busy_cores: float  # of all processes


def run(options: Options, *, student_s: float, teacher_s: float) -> Table:
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.actors.launch import start_actors
    from switchkd.tools.bench.ray_cluster import cluster

    log = cast(Any, StepLog(lambda _: None))
    num_workers, num_teachers = ((1, 2), (1,)) if options.smoke else ((1, 2, 4, 8, 16), (1, 2, 4))
    waves = 1 if options.smoke else 2
    by_teachers: dict[int, dict[int, list[Measurement]]] = {}
    latency = {"student_s": student_s, "teacher_s": teacher_s}
    with cluster(os.cpu_count() or 1, 200):
        for num in num_teachers:
            with tempfile.TemporaryDirectory() as folder:
                config = sleeping_config(max(num_workers), num, latency)
                handles = start_actors(config, Path(folder), frozenset(), log)
                try:
                    by_teachers[num] = measure(handles.workers, num_workers, waves, options.repeats)
                finally:
                    handles.close()
    return Table(
        title="Rollouts by workers and teachers (models that sleep)",
        rows=[row for num, measured in by_teachers.items() for row in table_rows(num, measured, waves, teacher_s)],
        notes=options.notes(
            student_ms=1e3 * student_s, teacher_ms=1e3 * teacher_s, block=BLOCK, rows=ROWS, new_tokens=NEW_TOKENS
        ),
        remarks=_remarks(by_teachers[num_teachers[0]][1], student_s, teacher_s),
    )


def sleeping_config(
    num_workers: int, replicas: int, latency: Mapping[str, float], **sections: Mapping[str, Any]
) -> Config:
    """Return a config whose processes request almost no CPUs from Ray, since they sleep. The models agree on every
    token, so each round emits whole blocks."""
    little = {"num_cpus": 0.01, "threads": 1}
    base: dict[str, Mapping[str, Any]] = {
        "teacher": {"backend": "fake", "replicas": replicas},
        "student": {"backend": "fake"},
        "learner": {"backend": "fake"},
        "fake": {"agreement": 1.0, "weights_mb": WEIGHTS_MB, **latency},
        "rollout": {
            "rule": {"type": "random", "prob": 0.5}, "num_workers": num_workers, "batch_size": ROWS, "save": False,
            "max_new_tokens": NEW_TOKENS, "max_draft_tokens": BLOCK, "drafter": "student", "overlap": False,
        },
        "replay": {"capacity": 1_000_000},
        "resources": {"teacher": little, "rollout": little, "learner": little},
    }  # fmt: skip
    return endless_config({key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}})


def measure(
    handles: Sequence[WorkerHandle], num_workers: Sequence[int], waves: int, repeats: int
) -> dict[int, list[Measurement]]:
    """Measure the first `n` workers for each `n`, in turns, each worker with the same load."""
    ids = count()
    sides = {str(num): partial(_measure_once, list(handles)[:num], waves * ROWS, ids) for num in num_workers}
    return {int(num): measured for num, measured in take_turns(sides, repeats).items()}


def _measure_once(handles: Sequence[WorkerHandle], num_tasks: int, ids: Iterator[int]) -> Measurement:
    shares = [[fake_task(next(ids)) for _ in range(num_tasks)] for _ in handles]
    start, cpu_before = time.perf_counter(), cpu_seconds()
    futures = [handle.generate(share, None) for handle, share in zip(handles, shares, strict=True)]
    reports: list[WorkReport] = [future.result() for future in futures]
    elapsed = time.perf_counter() - start
    return Measurement(
        elapsed_s=elapsed,
        num_calls=sum(report.num_teacher_calls for report in reports),
        busy_cores=(cpu_seconds() - cpu_before) / elapsed,
    )


def fake_task(rollout_id: int) -> RolloutTask:
    import numpy as np

    from switchkd.types import CompletionSource, Prompt, RolloutTask

    source, prompt = CompletionSource.ROLLOUT, Prompt(prompt_id="", text="", token_ids=np.ones(4, np.int32))
    return RolloutTask(rollout_id=rollout_id, batch=0, stage=0, completion_source=source, prompt=prompt)


def table_rows(
    num_teachers: int, by_workers: dict[int, list[Measurement]], waves: int, teacher_s: float
) -> list[dict[str, Any]]:
    """Return rows with both limits: n times one worker's throughput, and the calls that sleeping teachers can serve."""
    per_worker = waves * ROWS * NEW_TOKENS
    alone_per_s = per_worker / median(one.elapsed_s for one in by_workers[1])
    rows = []
    for num, measured in by_workers.items():
        speed = Spread.from_values([num * per_worker / one.elapsed_s for one in measured])
        tokens_per_call = num * per_worker / median(one.num_calls for one in measured)
        limits = {"workers": num * alone_per_s, "teachers": num_teachers / teacher_s * tokens_per_call}
        rows.append(
            {
                "teachers": num_teachers,
                "workers": num,
                "tokens/s": speed,
                "speed-up": speed.median / alone_per_s,
                "limit of workers": limits["workers"],
                "limit of teachers": limits["teachers"],
                "teacher calls/s": speed.median / tokens_per_call,
                "cores busy": Spread.from_values([one.busy_cores for one in measured]),
                "bound by": bound(speed.median, limits),
            }
        )
    return rows


def bound(speed: float, limits: Mapping[str, float]) -> str:
    """Name the lower limit where it is nearly reached; else the machine's cores and queues are the limit."""
    name = min(limits, key=lambda key: limits[key])
    return name if speed >= NEAR * limits[name] else "cores, queues"


def _remarks(alone: Sequence[Measurement], student_s: float, teacher_s: float) -> tuple[str, ...]:
    round_s = median(one.elapsed_s for one in alone) / median(one.num_calls for one in alone)
    slept = BLOCK * student_s + teacher_s
    cores, busy = os.cpu_count() or 1, median(one.busy_cores for one in alone)
    return (
        f"One worker alone with one teacher: a round of {ROWS} rows and {BLOCK} tokens takes {1e3 * round_s:.1f} ms, "
        f"of which {1e3 * slept:.1f} ms are sleep and {1e3 * (round_s - slept):.1f} ms drawing, deciding and the call.",
        f"Limit of workers: their number times one alone. Limit of teachers: {1 / teacher_s:.0f} calls/s each (one "
        f"over its sleep), times tokens per call. A teacher saturates at {round_s / teacher_s:.1f} workers.",
        f"One worker keeps {busy:.2f} cores busy, so {cores} cores carry about {cores / busy:.0f} of them at this "
        "pace; longer sleeps (--student-ms, --teacher-ms) move that limit.",
    )
