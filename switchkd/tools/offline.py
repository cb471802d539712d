"""Runs the checks, the evaluation or a few rollouts of a config in this process.

In: a config. Out: scores or rollouts.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

from switchkd.config.errors import ConfigError
from switchkd.config.loader import dump_yaml
from switchkd.config.schema import Config
from switchkd.controller import local
from switchkd.controller.build import build_evaluator, build_schedule
from switchkd.controller.evaluation import aggregate, text_rows
from switchkd.controller.preflight import PreparedRun, prepare
from switchkd.data.atomic_files import json_lines, json_safe, write_text_atomic
from switchkd.rollout.build import make_worker
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import EvalRow, Prompt, Rollout


def show_dry_run(config: Config) -> None:
    """Print the config with its defaults to stdout, and the steps and data to stderr. Raises ConfigError."""
    ready = prepare(config)
    print(dump_yaml(config), end="")
    held_out = f"; held out: {ready.eval_prompts.report()}" if ready.eval_prompts else ""
    steps = f"{config.num_steps} steps in {len(config.train.stages)} stages"
    data = config.rollout.recorded or ready.prompts.report()
    print(f"switchkd: this can run: {steps}; {data}{held_out}", file=sys.stderr)


def stage_index(config: Config, name: str | None) -> int:
    """Return the index of the stage `name`, by default the last that generates rollouts. Raises ConfigError."""
    names = [stage.name for stage in config.train.stages]
    if name is None:
        return max((i for i, stage in enumerate(config.train.stages) if stage.mix.rollout > 0), default=len(names) - 1)
    if name not in names:
        raise ConfigError(f"--stage {name}: there is no such stage; choose one of {', '.join(names)}")
    return names.index(name)


def evaluate(config: Config, out: Path | None = None) -> dict[str, float]:
    """Score the config's student on `eval.data`, by metric, and write each row's texts and scores to `out`. Raises
    ConfigError."""
    if out is not None and (out.is_dir() or not out.resolve().parent.is_dir()):
        raise ConfigError(f"--out {out} is a folder, or its folder does not exist; give a file such as texts.jsonl")
    rows, prompts = evaluate_rows(config)
    if out is not None:
        write_text_atomic(out, json_lines(text_rows(rows, config.eval.metrics, prompts)))
    scores = aggregate(rows, config.eval.metrics, prompts)
    return {**{name.removeprefix("eval/"): value for name, value in scores.items()}, "num_prompts": len(prompts)}


def evaluate_rows(config: Config) -> tuple[list[EvalRow], list[Prompt]]:
    """Return the student's completions on `eval.data`, and the prompts that `EvalRow.index` counts."""
    if not config.eval.data:
        raise ConfigError("eval.data is empty; name a JSONL or parquet file with prompts and references")
    ready = prepare(config)
    evaluator = build_evaluator(ready)
    return evaluator.rows([local.LocalWorkerHandle(_local_worker(ready), None)]), evaluator.prompts


def show_scores(scores: dict[str, float], as_json: bool) -> None:
    """Print one JSON object, or one score a line."""
    if as_json:
        print(json.dumps(json_safe(scores)))
        return
    for name, value in scores.items():
        print(f"{name:<28} {value:.4f}" if isinstance(value, float) else f"{name:<28} {value}")


def sample_rollouts(config: Config, num: int, stage: int) -> tuple[list[tuple[Prompt, Rollout]], Callable[..., str]]:
    """Generate the first rollouts of a stage, also where the run trains on recorded ones. Returns the tokenizer's
    `decode` too."""
    rollout = config.rollout.model_copy(update={"recorded": ""})
    ready = prepare(config.model_copy(update={"rollout": rollout}))
    return first_rollouts(ready, _local_worker(ready), num, stage), ready.tokenizer.decode


def first_rollouts(ready: PreparedRun, worker: RolloutWorker, num: int, stage: int) -> list[tuple[Prompt, Rollout]]:
    """Generate the first `num` rollouts of a stage, each with its prompt; a stage with fewer is made longer."""
    stages = ready.config.train.stages[: stage + 1]
    steps = max(stages[-1].steps, -(-num // stages[-1].batch_size))
    schedule = build_schedule(ready, (*stages[:-1], stages[-1].model_copy(update={"steps": steps})))
    tasks = [schedule.task(schedule.first_id(schedule.num_steps - steps) + i) for i in range(num)]
    by_id: dict[int, Rollout] = {}
    worker.generate(tasks, lambda rollouts: by_id.update({rollout.rollout_id: rollout for rollout in rollouts}))
    return [(task.prompt, by_id[task.rollout_id]) for task in tasks]


def _local_worker(ready: PreparedRun) -> RolloutWorker:
    """Make a worker with teachers in this process, which may use all cores."""
    run = ready.config.run.model_copy(update={"mode": "inprocess"})
    config = ready.config.model_copy(update={"run": run})
    return make_worker(config, local.make_teachers(config), ready.stop_ids)
