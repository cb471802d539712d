"""The house on a Ray cluster: connect, check that it fits, start every actor, hand out the handles.

In: a resolved config. Out: a House for `train.py`. What does not fit is said before anything starts.
"""

from __future__ import annotations

import logging
import os
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from switchkd.actors import environment
from switchkd.actors.environment import Secrets
from switchkd.actors.futures import gathered, of_worker
from switchkd.actors.learner_actor import LearnerActor, LearnerGroup
from switchkd.actors.placement import bundles, totals, wait_for_resources
from switchkd.actors.replay_actor import ReplayActor
from switchkd.actors.rollout_actor import RolloutActor
from switchkd.actors.teacher_actor import TeacherActor
from switchkd.engines.heads import HeadArrays
from switchkd.house import House
from switchkd.metrics import MetricsLog
from switchkd.sections import Config
from switchkd.types import Exam, Task


def connect(config: Config, log: MetricsLog) -> None:
    """Join the job's or the named cluster, or start a private one on this machine, and wait until the run fits."""
    if not ray.is_initialized():
        if environment.is_private(config.cluster.mode):
            _start_private(config)
        else:
            _join(config)
    wait_for_resources(config, ray.cluster_resources, log.note)


def _join(config: Config) -> None:
    address = None if os.environ.get("RAY_ADDRESS") else config.cluster.address
    ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)


def _start_private(config: Config) -> None:
    """A cluster of this process alone (`environment.for_private_cluster` went before), without a dashboard."""
    needed = totals(part for parts in bundles(config).values() for part in parts)
    ray.init(
        address="local",
        # on one's own machine roles may share cores: the operating system divides them
        num_cpus=max(os.cpu_count() or 1, int(needed.get("CPU", 0)) + 1),
        include_dashboard=False,
        object_store_memory=int(config.cluster.object_store_gb * 1e9),
        logging_level=logging.ERROR,
        log_to_driver=False,
    )


class RayWorker:
    """A rollout actor's handle. Ray restarts a dead one by itself; its calls in flight end with WorkerLost."""

    def __init__(self, actor: Any, reprefill: bool) -> None:
        self.actor, self.reprefill = actor, reprefill

    def generate(self, tasks: list[Task]) -> Future[Any]:
        return of_worker(self.actor.generate.remote(tasks))

    def load_weights(self, weights: Any) -> Future[Any]:
        if self.reprefill:
            self.actor.offer_weights.remote(weights)
        return of_worker(self.actor.load_weights.remote(weights))

    def examine(self, exam: Exam) -> Future[Any]:
        return of_worker(self.actor.examine.remote(exam))


class RayReplay:
    """The replay actor's handle."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.actor, name)
        return lambda *args: gathered([method.remote(*args)])


def build_house(config: Config, run_dir: Path, stop_ids: frozenset[int], log: MetricsLog) -> House:
    """Start all actors of the run. The cluster must be connected."""
    plain, common = config.model_dump(), (Secrets.of_this_process(), os.getcwd())
    roles = {role: parts[0] for role, parts in bundles(config).items()}

    def options(role: str) -> dict[str, float]:
        return {"num_cpus": roles[role]["CPU"], "num_gpus": roles[role]["GPU"]}

    log.note("starting actors")
    replay = _start(ReplayActor, {}, plain, str(run_dir), *common)
    teachers = []
    if config.needs_teacher:
        teachers = [_start(TeacherActor, options("teacher"), plain, *common) for _ in range(config.teacher.replicas)]
    head: HeadArrays | None = ray.get(teachers[0].head.remote()) if teachers else None
    workers = [
        _start(RolloutActor, options("rollout"), plain, i, teachers, stop_ids, replay, *common)
        for i in range(config.rollout.num_workers)
    ]
    ranks = [_start(LearnerActor, options("learner"), plain, replay, *common) for _ in range(config.learner.num_ranks)]
    learner = LearnerGroup(ranks)
    started = learner.start({} if head is None else {"": head})
    gathered([actor.ready.remote() for actor in [replay, *teachers, *workers]]).result()
    started.result()

    def close() -> None:
        for actor in [*workers, *teachers, *ranks, replay]:
            ray.kill(actor)

    return House(
        workers=[RayWorker(actor, config.rollout.on_new_weights == "reprefill") for actor in workers],
        replay=RayReplay(replay),
        learner=learner,
        close=close,
    )


def _start(actor: Any, options: dict[str, float], *args: Any) -> Any:
    return actor.options(**options).remote(*args)
