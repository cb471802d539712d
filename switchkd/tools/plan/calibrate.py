"""`switchkd plan --calibrate`: the costs of calls, taken from the run's own models on this machine.

In: a config. Out: `Costs`. The same engines as in a run, one after the other in this process: steps and blocks of full
batches (`bench/bound.py`), a batch of rollouts each way to see how often blocks break, and an optimizer step on them.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from switchkd.algo.sampling import Purpose
from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config, MixConfig, StageConfig
from switchkd.controller.preflight import PreparedRun, prepare
from switchkd.engines.build import make_teacher, max_len, set_threads
from switchkd.learner.batching import assign_batch
from switchkd.learner.rank import LearnerRank, RankInfo
from switchkd.rollout.build import make_worker
from switchkd.rollout.worker import RolloutWorker
from switchkd.tools.bench.lower_bound import StepCosts, measure_costs
from switchkd.tools.offline import first_rollouts
from switchkd.tools.plan.costs import USUAL_BREAK_RATE, Costs, parse_costs, read_costs
from switchkd.types import CompletionSource, Prompt, Rollout

if TYPE_CHECKING:
    from switchkd.engines.hf.teacher import HFTeacher

_ROOM = 24
"""Positions that `measure_costs` adds to a prompt, to stand in the middle of a completion."""


def calibrate(config: Config, index: int, *, learner: bool = True) -> Costs:
    """Of stage `index`. Loads teacher and student, and the `learner` where its costs are not known. Raises ConfigError
    where there is no teacher to measure."""
    if learner and config.teacher.backend == "vllm":
        raise ConfigError(
            "--calibrate: vLLM and DeepSpeed do not bear each other in one process; add --learner-ms, or measure with "
            "teacher.backend=hf"
        )
    with redirect_stdout(sys.stderr):  # DeepSpeed says things
        return _calibrate(config, index, learner)


def _calibrate(config: Config, index: int, learner: bool) -> Costs:
    stage = config.train.stages[index]
    if not stage.needs_teacher:
        raise ConfigError(f"--calibrate: stage {stage.name} has no teacher; give --learner-ms, or another --stage")
    ready = prepare(config)
    run = ready.config.run.model_copy(update={"mode": "inprocess"})
    alone = ready.config.model_copy(update={"run": run})
    teacher: Any = make_teacher(alone)
    worker = make_worker(alone, 0, {"": (teacher, teacher.lm_head_state())}, ready.stop_ids)
    set_threads(resources.of_role(config, "rollout").threads)
    steps = _steps(ready, worker, teacher, stage)
    references = [len(prompt.reference_ids) for prompt in ready.prompts.prompts]
    ready = _rollouts_only(ready, index)
    rows = _rows(ready.config)
    _rollouts(ready, worker, index, "student")  # the first calls of a shape also pay for its setting up
    seen = _rollouts(ready, worker, index, "student")
    breaks = {"student": _break_rate(seen.rollouts)}
    if _teacher_may_lead(worker, index):
        breaks["teacher"] = _break_rate(_rollouts(ready, worker, index, "teacher").rollouts)
    learner_ms = publish_ms = 0.0
    if learner:
        learner_ms, publish_ms = _learner(ready, worker, teacher, stage, index, seen.rollouts)
    per_call = 1e3 * rows
    costs = Costs(
        student_ms=steps.student * per_call,
        teacher_ms={size: value * per_call for size, value in steps.read.items()},
        teacher_step_ms=steps.write * per_call,
        student_block_ms={size: value * per_call for size, value in steps.check.items()},
        settle_ms=1e3 * steps.settle,
        prompt_ms=1e3 * steps.prompt * float(np.mean([len(rollout.prompt_ids) for rollout in seen.rollouts])),
        learner_ms=learner_ms,
        publish_ms=publish_ms,
        rejection_rate=breaks["student"],
        teacher_rejection_rate=breaks.get("teacher"),
        tokens=_mean_tokens(stage, seen, references),
        rows_per_token=sum(rollout.stats.num_scored_rows for rollout in seen.rollouts) / seen.tokens,
        measured_tokens_per_s=seen.tokens / seen.time_s,
    )
    return costs.model_copy(update={"call_ms": _rest_ms(costs, seen, steps, rows)})


def _rollouts_only(ready: PreparedRun, index: int) -> PreparedRun:
    """A batch is small: what the stage takes from the data set would leave few tokens to look at."""
    config = ready.config
    stages = list(config.train.stages)
    if stages[index].mix.rollout > 0:
        stages[index] = stages[index].model_copy(update={"mix": MixConfig(rollout=1.0)})
    train = config.train.model_copy(update={"stages": tuple(stages)})
    return replace(ready, config=config.model_copy(update={"train": train}))


def _mean_tokens(stage: StageConfig, seen: _Seen, references: list[int]) -> float:
    """Of a step's completions: those of the data set have their own length."""
    data = stage.mix.dataset / (stage.mix.rollout + stage.mix.dataset + stage.mix.teacher)
    return data * float(np.mean(references)) + (1 - data) * seen.tokens / len(seen.rollouts)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """One batch of a worker's."""

    rollouts: list[Rollout]
    time_s: float
    num_calls: int  # of the teacher

    @property
    def tokens(self) -> int:
        return sum(rollout.num_tokens for rollout in self.rollouts)


def _rest_ms(costs: Costs, seen: _Seen, steps: StepCosts, rows: int) -> float:
    """What each round of that batch took beyond its models: the student led with the largest block."""
    block = max(steps.read)
    models = seen.num_calls * (block * costs.student_ms + costs.teacher_ms[block])
    models += seen.tokens * costs.settle_ms + len(seen.rollouts) * costs.prompt_ms
    return max(0.0, 1e3 * seen.time_s - models) / max(seen.num_calls, 1)


def _rows(config: Config) -> int:
    return min(config.rollout.batch_size, config.teacher.max_sessions)


def _steps(ready: PreparedRun, worker: RolloutWorker, teacher: HFTeacher, stage: StageConfig) -> StepCosts:
    """At a prompt of the usual length, cut where the caches are short."""
    config, block = ready.config, min(ready.config.rollout.max_draft_tokens, stage.max_new_tokens)
    prompts = sorted(ready.prompts.prompts, key=lambda prompt: len(prompt.token_ids))
    usual = prompts[len(prompts) // 2]
    room = max(1, max_len(config) - _ROOM - block - 1)
    usual = Prompt(prompt_id=usual.prompt_id, text=usual.text, token_ids=usual.token_ids[:room])
    student: Any = worker.rollouts.student
    head = worker.rollouts.reader.head or student.head
    return measure_costs(student, teacher, head, usual, _rows(config), block)


def _teacher_may_lead(worker: RolloutWorker, index: int) -> bool:
    """As in `pace.py`."""
    rule = worker.stage_params[index].rollout.rule
    return not rule.needs_draft and rule.replacement == Purpose.GUMBEL


def _rollouts(ready: PreparedRun, worker: RolloutWorker, index: int, drafter: str) -> _Seen:
    worker.rollouts.speculation.drafter = drafter
    start, calls = time.perf_counter(), worker.rollouts.calls.num_calls
    found = [rollout for _, rollout in first_rollouts(ready, worker, _rows(ready.config), index)]
    took = time.perf_counter() - start
    return _Seen(rollouts=found, time_s=took, num_calls=worker.rollouts.calls.num_calls - calls)


def _break_rate(rollouts: list[Rollout]) -> float:
    """Breaks per token that was written together; before any the usual rate."""
    own = [rollout for rollout in rollouts if rollout.completion_source == CompletionSource.ROLLOUT]
    tokens = sum(rollout.num_tokens for rollout in own)
    return sum(rollout.stats.num_rejections for rollout in own) / tokens if tokens else USUAL_BREAK_RATE


def _learner(
    ready: PreparedRun,
    worker: RolloutWorker,
    teacher: HFTeacher,
    stage: StageConfig,
    index: int,
    rollouts: list[Rollout],
) -> tuple[float, float]:
    """Milliseconds of an optimizer step of a whole batch on one rank (the second of two, scaled from these rollouts),
    and of handing new weights over. What is trained here is thrown away."""
    section = ready.config.learner.model_copy(update={"num_ranks": 1})
    config = ready.config.model_copy(update={"learner": section})
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    head = teacher.lm_head_state()
    rank = LearnerRank(config, RankInfo(), {} if head is None else {"": head}, lambda ids: [by_id[i] for i in ids])
    try:
        plan = assign_batch(0, index, rollouts, 1, rank.losses[index].hard_frac)
        for _ in range(2):
            start = time.perf_counter()
            rank.step(plan, stage.lr)
            took = time.perf_counter() - start
        start = time.perf_counter()
        bundle = rank.publish(1)
        if bundle is not None:
            worker.load_weights(bundle)
        return 1e3 * took * stage.batch_size / len(rollouts), 1e3 * (time.perf_counter() - start)
    finally:
        rank.close()


def gather(
    config: Config, index: int, *, calibrate: bool, file: Path | None, given: Mapping[str, float | None]
) -> Costs | None:
    """From a measurement or a file, with single numbers laid over it; None where nothing was said. Raises
    ConfigError."""
    if calibrate and file is not None:
        raise ConfigError("--calibrate and --costs: take one of them")
    block = config.rollout.max_draft_tokens
    numbers = {key: value for key, value in given.items() if value is not None}
    told: dict[str, Any] = {}
    if calibrate:
        told = globals()["calibrate"](config, index, learner="learner_ms" not in numbers).model_dump()
    elif file is not None:
        told = read_costs(file, block).model_dump()
    elif not numbers:
        return None
    else:
        missing = [f"--{key.replace('_', '-')}" for key in ("student_ms", "teacher_ms") if key not in numbers]
        if missing:
            raise ConfigError(f"costs need {' and '.join(missing)} too; give both, --costs FILE, or --calibrate")
    return parse_costs(told | numbers, block, "costs")
