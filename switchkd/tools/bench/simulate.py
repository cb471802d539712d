"""Simulates a run of many processes in virtual time: how full they are, who waits, and what limits ten times as many.

In: numbers of processes and stated costs. Out: a table. The loop, dispatcher, replay, router, worker and drafting
policy are the production classes; only models and transport are simulated, so no figure depends on this machine, apart
from the CPU seconds of driver and replay, which are measured here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from switchkd.config.schema import Config
from switchkd.tools.bench import trainer_harness
from switchkd.tools.bench.simulated_actors import SimulatedActors, start_simulated
from switchkd.tools.bench.simulated_teachers import Costs
from switchkd.tools.bench.table import Cell, Options, Table
from switchkd.tools.bench.virtual_time import VirtualClock, VirtualWatchdog
from switchkd.types import Prompt

UNMEASURED = 3
"""Steps at the start, in which the pipeline fills."""
PROMPT_TOKENS = 128
RPC_S = 1e-3
"""Seconds of the replay's or a driver's process for one remote call, beside the measured CPU seconds."""
LINK_BYTES_S = 12.5e9
"""Bytes per second into and out of the replay's process: a link of 100 Gb/s."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Size:
    workers: int
    teachers: int
    ranks: int
    slots: int  # of a worker
    max_new_tokens: int
    teacher_frac: float  # tokens that the teacher writes

    def times(self, factor: int) -> Size:
        return replace(self, workers=factor * self.workers, teachers=factor * self.teachers, ranks=factor * self.ranks)


@dataclass(frozen=True, kw_only=True, slots=True)
class Simulated:
    """The measured steps of a simulation. Seconds are virtual unless they are CPU seconds."""

    occupancy: float  # rows in flight / slots
    calls_per_round: float  # of teacher replicas in a worker's round
    tokens_per_s: float
    staleness_mean: float
    staleness_max: float
    replay_bytes: float  # largest at a step's end
    learner_waits: float  # share of a step
    teacher_waits: float  # share of a worker's calls that waits for teachers
    load: Mapping[str, float]  # busy share of each resource


def config_of(size: Size, *, on_new_weights: str, max_staleness: int, num_steps: int, drafter: str = "auto") -> Config:
    """Return the config: a batch has as many rollouts as all workers have slots."""
    batch = size.workers * size.slots
    backend = {"backend": "fake"}
    return trainer_harness.endless_config(
        {
            "teacher": {**backend, "replicas": size.teachers},
            "student": backend,
            "learner": {**backend, "num_ranks": size.ranks},
            "data": {"max_prompt_tokens": PROMPT_TOKENS},
            "rollout": {
                "rule": {"type": "random", "prob": size.teacher_frac}, "num_workers": size.workers,
                "batch_size": size.slots, "max_new_tokens": size.max_new_tokens, "drafter": drafter,
                "on_new_weights": on_new_weights,
            },
            "replay": {"max_staleness": max_staleness, "capacity": (max_staleness + 2) * batch},
            "train": {"batch_size": batch, "num_steps": num_steps},
        }
    )  # fmt: skip


class _Measure:
    """Takes the counters after UNMEASURED steps and after the last one, where it ends the run."""

    def __init__(self, clock: VirtualClock, num_steps: int) -> None:
        self.clock, self.num_steps = clock, num_steps
        self.actors: SimulatedActors | None = None
        self.rows: list[Mapping[str, Any]] = []
        self.before: dict[str, float] = {}

    def __call__(self, row: Mapping[str, Any]) -> None:
        self.rows.append(row)
        if len(self.rows) == UNMEASURED:
            self.before = self.counters()
        if len(self.rows) == UNMEASURED + self.num_steps:
            raise trainer_harness.StopTraining

    def counters(self) -> dict[str, float]:
        actors = self.actors
        assert actors is not None
        return {
            "now": self.clock.now(),
            "row_s": sum(worker.generator.row_s for worker in actors.workers),
            "rounds": sum(worker.generator.num_rounds for worker in actors.workers),
            "calls": sum(replica.num_calls for replica in actors.replicas),
            "teacher_s": sum(replica.busy_s for replica in actors.replicas),
            "loop_cpu_s": time.thread_time() - self.clock.scheduling_s,
            "replay_cpu_s": actors.replay.cpu_s,
            "replay_calls": actors.replay.num_calls,
        }


def simulate(config: Config, costs: Costs, num_steps: int) -> Simulated:
    """Simulate `num_steps` measured steps."""
    clock = VirtualClock()
    measure = _Measure(clock, num_steps)

    def start_actors(config: Config, *_: Any) -> Any:
        measure.actors = start_simulated(config, costs, clock)
        return measure.actors.handles

    prompt = Prompt(prompt_id="", text="", token_ids=np.ones(PROMPT_TOKENS, np.int32))
    watchdog = VirtualWatchdog(clock)
    try:
        trainer_harness.run(config, [prompt], start_actors, measure, watchdog=watchdog, now=clock.now)
        return _results(config, measure)
    finally:
        clock.close()


def _results(config: Config, measure: _Measure) -> Simulated:
    after, rows = measure.counters(), measure.rows[UNMEASURED:]
    spent = {key: after[key] - measure.before[key] for key in after}
    assert measure.actors is not None
    seconds, num_workers = spent["now"], len(measure.actors.workers)

    def total(key: str) -> float:
        return sum(float(row[key]) for row in rows)

    step_bytes = fmean(row["rollout/shared_tokens"] for row in rows) * (measure.actors.learner.costs.row_bytes)
    teacher_waits = total("time/wait_teacher_s") / total("time/rollout_s")
    busy = total("time/rollout_s") / (total("time/rollout_s") + total("time/rollout_idle_s"))
    return Simulated(
        occupancy=spent["row_s"] / (seconds * num_workers * config.rollout.batch_size),
        calls_per_round=spent["calls"] / spent["rounds"],
        tokens_per_s=total("rollout/shared_tokens") / seconds,
        staleness_mean=fmean(row["replay/staleness_mean"] for row in rows),
        staleness_max=max(row["replay/staleness_max"] for row in rows),
        replay_bytes=max(row["replay/bytes"] for row in rows),
        learner_waits=total("time/wait_rollouts_s") / total("time/step_s"),
        teacher_waits=teacher_waits,
        load={
            "rollout workers": busy * (1 - teacher_waits),
            "teachers": spent["teacher_s"] / (seconds * len(measure.actors.replicas)),
            "learner": total("time/learn_s") / seconds,
            # the loop's thread also runs those calls of the replay that it makes
            "driver": spent["loop_cpu_s"] / seconds,
            "replay's process": (spent["replay_cpu_s"] + RPC_S * spent["replay_calls"]) / seconds,
            "replay's link": 2 * step_bytes * len(rows) / seconds / LINK_BYTES_S,
        },
    )


MODES = (("finish", 0), ("finish", 2), ("reprefill", 0), ("reprefill", 2))
"""`rollout.on_new_weights`, `replay.max_staleness`."""


def run(options: Options, size: Size, costs: Costs, *, num_steps: int, times: int) -> Table:
    """Simulate each of MODES, and one step of the last one with `times` as many processes and rollouts (1: not)."""
    if options.smoke:
        size, num_steps = replace(size, workers=2, teachers=1, ranks=1, slots=2), 1

    def side(size: Size, mode: str, limit: int, num_measured: int) -> Simulated:
        num = UNMEASURED + num_measured + limit + 2  # steps are left when the measurement ends
        return simulate(config_of(size, on_new_weights=mode, max_staleness=limit, num_steps=num), costs, num_measured)

    measured = [side(size, mode, limit, num_steps) for mode, limit in MODES]
    rows = [_row(size, mode, limit, one) for (mode, limit), one in zip(MODES, measured, strict=True)]
    notes = {**asdict(size), **asdict(costs), "steps": num_steps}
    remarks = [_limits(size, measured[-1])]
    if times > 1:
        large = side(size.times(times), *MODES[-1], 1)
        rows.append(_row(size.times(times), *MODES[-1], large))
        remarks.append(_limits(size.times(times), large))
    return Table(title="The control plane in virtual time", rows=rows, notes=notes, remarks=tuple(remarks))


def _row(size: Size, mode: str, limit: int, one: Simulated) -> dict[str, Cell]:
    return {
        "workers": size.workers,
        "on_new_weights": mode,
        "max_staleness": limit,
        "rows / slots": one.occupancy,
        "calls / round": one.calls_per_round,
        "tokens/s": one.tokens_per_s,
        "staleness": one.staleness_mean,
        "at most": one.staleness_max,
        "replay MB": one.replay_bytes / 1e6,
        "learner waits": one.learner_waits,
        "workers wait for teachers": one.teacher_waits,
    }


def _limits(size: Size, one: Simulated) -> str:
    """Say how busy each resource is, and which one is full first."""
    by_load = sorted(one.load.items(), key=lambda item: -item[1])
    busy = ", ".join(f"{name} {share:.2f}" for name, share in by_load)
    return f"{size.workers} workers, {size.teachers} teachers, {size.ranks} ranks: first full {by_load[0][0]} ({busy})"
