"""Throughput by number of rollout workers and teachers: the real actors, with models that sleep (`fake_engines.py`).

In: seconds of one student call and of one teacher call. Out: tokens per second against what workers and teachers could
do at most, and how busy this machine's cores were, so that it shows what bends the curve.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from switchkd.config.schema import Config
from switchkd.tools.bench.process_stats import cpu_seconds
from switchkd.tools.bench.table import Spread, Table, paired, surroundings
from switchkd.tools.bench.trainer_harness import StepLog, config_of

if TYPE_CHECKING:
    from switchkd.controller.handles import ActorHandles, WorkerHandle
    from switchkd.types import RolloutTask, WorkReport

BLOCK, ROWS, NEW_TOKENS = 4, 8, 32
NEAR = 0.85
"""A limit is named as the reason where so much of it was reached."""


@dataclass(slots=True)
class Runs:
    """What a number of workers did in each of its turns."""

    elapsed_s: list[float] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)  # busy, of all processes


def run(*, smoke: bool, repeats: int, student_s: float, teacher_s: float) -> Table:
    from switchkd.actors import process_setup

    process_setup.for_private_cluster()
    from switchkd.tools.bench.fake_engines import FakeLatency, install_fakes
    from switchkd.tools.bench.ray_cluster import cluster

    workers, teachers = ((1, 2), (1,)) if smoke else ((1, 2, 4, 8, 16), (1, 2, 4))
    waves = 1 if smoke else 2
    found: dict[int, dict[int, Runs]] = {}
    latency = FakeLatency(student=student_s, teacher=teacher_s)
    with cluster(os.cpu_count() or 1, 200, install_fakes(latency)):
        for num in teachers:
            with tempfile.TemporaryDirectory() as folder:
                handles = _start_actors(num, max(workers), Path(folder))
                try:
                    found[num] = measure(handles.workers, workers, waves, repeats)
                finally:
                    handles.close()
    rows = [row for num, by_workers in found.items() for row in rows_of(num, by_workers, waves, teacher_s)]
    notes = surroundings("cpu", "float32", student_ms=1e3 * student_s, teacher_ms=1e3 * teacher_s, block=BLOCK,
                         rows=ROWS, new_tokens=NEW_TOKENS, repeats=repeats)  # fmt: skip
    first = min(found)
    return Table(
        title="Rollouts by workers and teachers (models that sleep)", columns=tuple(rows[0]), rows=tuple(rows),
        notes=notes, remarks=_remarks(found[first][1], student_s, teacher_s),
    )  # fmt: skip


def config(num_workers: int, replicas: int, **sections: Mapping[str, Any]) -> Config:
    """Every process asks Ray for next to nothing: they sleep."""
    little = {"num_cpus": 0.01, "threads": 1}
    base: dict[str, Mapping[str, Any]] = {
        "teacher": {"path": "fake", "replicas": replicas},
        "student": {"path": "fake"},
        "rollout": {
            "rule": {"type": "random", "prob": 0.5}, "num_workers": num_workers, "batch_size": ROWS, "save": False,
            "max_new_tokens": NEW_TOKENS, "max_draft_tokens": BLOCK, "drafter": "student", "overlap": False,
        },
        "replay": {"capacity": 1_000_000},
        "resources": {"teacher": little, "rollout": little, "learner": little},
    }  # fmt: skip
    return config_of({key: {**base.get(key, {}), **sections.get(key, {})} for key in {*base, *sections}})


def _start_actors(replicas: int, num_workers: int, folder: Path) -> ActorHandles:
    from switchkd.actors.launch import start_actors

    nobody = cast(Any, StepLog(lambda _: None))
    return start_actors(config(num_workers, replicas), folder, frozenset(), nobody)


def measure(handles: Sequence[WorkerHandle], workers: tuple[int, ...], waves: int, repeats: int) -> dict[int, Runs]:
    """The first `n` workers for each `n`, in turns, all with the same load each."""
    found = {num: Runs() for num in workers}
    ids = count()
    sides: dict[str, Callable[[], float]] = {
        str(num): partial(_once, handles[:num], found[num], waves * ROWS, ids) for num in workers
    }
    paired(sides, repeats, warmup=1)
    for runs in found.values():
        for numbers in (runs.elapsed_s, runs.calls, runs.cores):
            del cast(list[Any], numbers)[:-repeats]  # the warm-up
    return found


def _once(handles: Sequence[WorkerHandle], runs: Runs, num: int, ids: Iterator[int]) -> float:
    shares = [[_task(next(ids)) for _ in range(num)] for _ in handles]
    start, busy = time.perf_counter(), cpu_seconds()
    futures = [handle.generate(share, None) for handle, share in zip(handles, shares, strict=True)]
    reports: list[WorkReport] = [future.result() for future in futures]
    elapsed = time.perf_counter() - start
    runs.elapsed_s.append(elapsed)
    runs.calls.append(sum(report.num_teacher_calls for report in reports))
    runs.cores.append((cpu_seconds() - busy) / elapsed)
    return elapsed


def _task(rollout_id: int) -> RolloutTask:
    import numpy as np

    from switchkd.types import CompletionSource, Prompt, RolloutTask

    prompt = Prompt(prompt_id="", text="", token_ids=np.ones(4, np.int32))
    return RolloutTask(
        rollout_id=rollout_id, batch=0, stage=0, completion_source=CompletionSource.ROLLOUT, prompt=prompt
    )


def rows_of(teachers: int, by_workers: dict[int, Runs], waves: int, teacher_s: float) -> list[dict[str, Any]]:
    """With the two limits: as many workers as one alone does, and as many calls as sleeping teachers can take."""
    per_worker = waves * ROWS * NEW_TOKENS
    alone = by_workers[1]
    alone_per_s = per_worker / Spread.of(alone.elapsed_s).median
    rows = []
    for num, runs in by_workers.items():
        speed = Spread.of(runs.elapsed_s).map(lambda s, num=num: num * per_worker / s)  # type: ignore[misc]
        calls = Spread.of([float(n) for n in runs.calls]).median
        tokens_per_call = num * per_worker / calls
        limits = {"workers": num * alone_per_s, "teachers": teachers / teacher_s * tokens_per_call}
        rows.append(
            {
                "teachers": teachers,
                "workers": num,
                "tokens/s": speed,
                "speed-up": speed.median / alone_per_s,
                "limit of workers": limits["workers"],
                "limit of teachers": limits["teachers"],
                "teacher calls/s": calls * speed.median / (num * per_worker),
                "cores busy": Spread.of(runs.cores),
                "bound by": bound(speed.median, limits),
            }
        )
    return rows


def bound(speed: float, limits: Mapping[str, float]) -> str:
    """The lower limit, or neither: then it is what the table does not vary, the machine's cores, and queues."""
    name = min(limits, key=lambda key: limits[key])
    return name if speed >= NEAR * limits[name] else "cores, queues"


def _remarks(alone: Runs, student_s: float, teacher_s: float) -> tuple[str, ...]:
    median = Spread.of(alone.elapsed_s).median
    round_s = median / Spread.of([float(n) for n in alone.calls]).median
    slept = BLOCK * student_s + teacher_s
    cores, busy = os.cpu_count() or 1, Spread.of(alone.cores).median
    return (
        f"One worker alone with one teacher: a round of {ROWS} rows and {BLOCK} tokens takes {1e3 * round_s:.1f} ms, "
        f"of which {1e3 * slept:.1f} ms are sleep and {1e3 * (round_s - slept):.1f} ms drawing, deciding and the call.",
        f"Limit of workers: their number times one alone. Limit of teachers: {1 / teacher_s:.0f} calls/s each (one "
        f"over its sleep), times tokens per call. A teacher saturates at {round_s / teacher_s:.1f} workers.",
        f"One worker keeps {busy:.2f} cores busy, so {cores} cores carry about {cores / busy:.0f} of them at this "
        "pace; longer sleeps (--student-ms, --teacher-ms) move that limit.",
    )
