"""Without a run: an evaluation, a few rollouts to look at."""

from __future__ import annotations

from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.controller import local
from switchkd.controller.build import build_evaluator, build_schedule
from switchkd.controller.evaluation import aggregate
from switchkd.controller.preflight import PreparedRun, prepare
from switchkd.rollout.build import make_worker
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import EvalRow, Prompt, Rollout


def evaluate(config: Config) -> dict[str, float]:
    """Scores of the student that the config names, by metric, on `eval.data`, in this process."""
    rows, prompts = evaluate_rows(config)
    scores = aggregate(rows, config.eval.metrics, prompts)
    by_metric = {name.removeprefix("eval/"): value for name, value in scores.items()}
    return {**by_metric, "num_prompts": len(prompts)}


def evaluate_rows(config: Config) -> tuple[list[EvalRow], list[Prompt]]:
    """What that student wrote on `eval.data`, text by text, and the prompts that `EvalRow.index` counts."""
    if not config.eval.data:
        raise ConfigError("eval.data is empty; name a JSONL or parquet file with prompts and references")
    ready = prepare(config)
    evaluator = build_evaluator(ready)
    return evaluator.rows([local.LocalWorkerHandle(_local_worker(ready), None)]), evaluator.prompts


def sample_rollouts(config: Config, num: int, stage: int) -> tuple[list[tuple[Prompt, Rollout]], RolloutWorker]:
    """The first rollouts of a stage, each with its prompt, and who wrote them. In this process, and written anew also
    where the run trains on recorded ones."""
    anew = config.rollout.model_copy(update={"recorded": ""})
    ready = prepare(config.model_copy(update={"rollout": anew}))
    worker = _local_worker(ready)
    return first_rollouts(ready, worker, num, stage), worker


def first_rollouts(ready: PreparedRun, worker: RolloutWorker, num: int, stage: int) -> list[tuple[Prompt, Rollout]]:
    """The first rollouts of a stage as a run with the student's present weights makes them (more of them where the
    stage is shorter), each with its prompt."""
    stages = ready.config.train.stages[: stage + 1]
    steps = max(stages[-1].steps, -(-num // stages[-1].batch_size))
    schedule = build_schedule(ready, (*stages[:-1], stages[-1].model_copy(update={"steps": steps})))
    tasks = [schedule.task(schedule.first_id(schedule.num_steps - steps) + i) for i in range(num)]
    found: dict[int, Rollout] = {}
    worker.generate(tasks, lambda rollouts: found.update({rollout.rollout_id: rollout for rollout in rollouts}))
    return [(task.prompt, found[task.rollout_id]) for task in tasks]


def _local_worker(ready: PreparedRun) -> RolloutWorker:
    """One that has this process, and with it all cores, to itself."""
    run = ready.config.run.model_copy(update={"mode": "inprocess"})
    config = ready.config.model_copy(update={"run": run})
    return make_worker(config, 0, local.make_teachers(config), ready.stop_ids)
