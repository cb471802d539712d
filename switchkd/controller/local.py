"""Runs all actors in one process, without Ray: teachers, one worker, one learner rank. For tests and debugging.

Every handle runs its call at once and returns a completed future.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from switchkd.config import resources
from switchkd.config.errors import ConfigError
from switchkd.config.schema import Config
from switchkd.controller.handles import ActorHandles, Heartbeat
from switchkd.data.build import make_replay
from switchkd.data.recorded import heads_for
from switchkd.data.replay import Replay
from switchkd.engines.build import make_teacher
from switchkd.learner.rank import RankInfo, make_rank
from switchkd.rollout.build import Teachers, make_worker
from switchkd.rollout.worker import RolloutWorker
from switchkd.types import EvalShard, RolloutTask, WeightRef


def completed(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Call the function, and return its result or error as a future."""
    future: Future[Any] = Future()
    try:
        future.set_result(function(*args))
    except Exception as error:
        future.set_exception(error)
    return future


class LocalHandle:
    """A handle of an object in this process. It has no `restart`: the object does not fail alone."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Callable[..., Future[Any]]:
        method = getattr(self._target, name)
        return lambda *args: completed(method, *args)


class LocalWorkerHandle:
    """A worker that puts its rollouts into a replay of the same process; without a replay it only evaluates."""

    def __init__(self, worker: RolloutWorker, replay: Replay | None) -> None:
        self.worker, self.replay = worker, replay

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> Future[Any]:
        assert self.replay is not None, "this worker only evaluates"
        self.push_weights(weights)
        return completed(self.worker.generate, tasks, self.replay.put)

    def push_weights(self, weights: WeightRef | None) -> None:
        self.worker.load_weights(weights, lambda weights: replace(weights.ref, incarnation=weights.incarnation))

    def evaluate(self, shard: EvalShard, weights: WeightRef | None) -> Future[Any]:
        self.push_weights(weights)
        return completed(self.worker.evaluate, shard)

    def back(self) -> Future[None]:
        return completed(lambda: None)


def check_single(config: Config) -> None:
    """Raise ConfigError for runs that one process cannot hold."""
    numbers = resources.counts(config)
    if max(numbers.values()) > 1:
        requested = ", ".join(f"{resources.key_of(role)}={num}" for role, num in reversed(numbers.items()))
        raise ConfigError(f"run.mode=inprocess is one process: {requested} must be 1; take run.mode=ray")
    for name in config.teacher_names:
        if config.of_teacher(name).teacher.backend == "vllm":  # both initialise torch.distributed
            raise ConfigError(
                "run.mode=inprocess puts vLLM and DeepSpeed into one process, which they do not share; take "
                f"run.mode=ray, or {resources.role_of(name)}.backend=hf"
            )


def this_machine() -> dict[str, float]:
    """CPUs and GPUs, as Ray counts them."""
    return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}


def make_teachers(config: Config) -> Teachers:
    """Make all teachers in this process, by name, each with its LM head."""
    teachers = {name: make_teacher(config.of_teacher(name)) for name in config.teacher_names}
    return {name: (teacher, teacher.lm_head_state()) for name, teacher in teachers.items()}


def start_actors(config: Config, run_dir: Path, stop_ids: frozenset[int]) -> ActorHandles:
    teachers = make_teachers(config)
    heads = heads_for(config, run_dir, {name: head for name, (_, head) in teachers.items() if head is not None})
    replay = make_replay(config, run_dir)
    workers = [] if config.rollout.recorded else [make_worker(config, teachers, stop_ids)]
    learner = make_rank(config, RankInfo(), heads, replay.fetch)

    def close() -> None:
        learner.close()
        replay.close()

    return ActorHandles(
        workers=[LocalWorkerHandle(worker, replay) for worker in workers],
        replay=LocalHandle(replay),
        learner=LocalHandle(learner),
        heartbeats=lambda: [
            Heartbeat(name=f"rollout worker {i}", progress_counter=worker.progress_counter)
            for i, worker in enumerate(workers)
        ],
        close=close,
    )
