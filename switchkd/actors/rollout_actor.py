"""One rollout worker behind Ray: writes rollouts, puts them into the replay itself, takes new weights."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import ray
from ray import cloudpickle

from switchkd.actors.heartbeat import GROUP, Health
from switchkd.actors.pool_client import PoolDirectory
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.ray_futures import patient
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.config.schema import Config
from switchkd.rollout.build import make_worker
from switchkd.types import EvalRow, Exam, ReplayFull, Rollout, Task, WeightBundle, Weights, WorkReport


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"weights": 1, **GROUP})
class RolloutActor(Health):
    """Calls of the default group run one after another; `offer` comes in between (`reprefill`)."""

    def __init__(
        self,
        config: dict[str, Any],
        index: int,
        handles: bytes,
        stop_ids: frozenset[int],
        secrets: Secrets,
        working_dir: str,
    ) -> None:
        """`handles`: of the teachers' pools, each with the run's number there, and of the replay, pickled."""
        prepare(secrets, working_dir)
        pools, self.replay = cloudpickle.loads(handles)
        routers = {name: _router(pool, namespace, index) for name, (pool, namespace) in pools.items()}
        self.loaded = self.offered_key = (0, 0)  # as Weights.key
        self.offered: WeightBundle | None = None
        teachers = {name: (router, router.head()) for name, router in routers.items()}
        self.worker = make_worker(Config.model_validate(config), index, teachers, stop_ids, self._newer)

    def ready(self) -> bool:
        return True

    @ray.method(concurrency_group="weights")
    def offer(self, weights: Weights) -> None:
        """Seen by the running rollouts at their next round."""
        bundle = pulled(weights)
        if weights.key > self.offered_key:
            self.offered, self.offered_key = bundle, weights.key

    def generate(self, tasks: list[Task], weights: Weights | None) -> WorkReport:
        self._load(weights)
        return self.worker.generate(tasks, self._put)

    def examine(self, exam: Exam, weights: Weights | None) -> list[EvalRow]:
        self._load(weights)
        return self.worker.examine(exam)

    def beats(self) -> int:
        return self.worker.beats

    def _load(self, weights: Weights | None) -> None:
        if weights is not None and weights.key > self.loaded:
            self.worker.load_weights(pulled(weights))
            self.loaded = weights.key

    def _newer(self) -> WeightBundle | None:
        """What was offered, unless it has been loaded since. Whoever asks loads it."""
        offered, key = self.offered, self.offered_key
        if offered is None or key <= self.loaded:
            return None
        self.loaded = key
        return offered

    def _put(self, rollouts: list[Rollout]) -> None:
        """Back-pressure: a full replay makes the worker wait. So does one that is being started again."""
        while rollouts:
            try:
                patient(partial(self.replay.put.remote, rollouts)).result()
                return
            except ReplayFull as full:
                refused = set(full.refused)
                rollouts = [rollout for rollout in rollouts if rollout.rollout_id in refused]
                time.sleep(0.2)


def _router(pool: Any, namespace: int, index: int) -> TeacherRouter:
    return TeacherRouter(PoolDirectory(pool, f"{namespace}/{index}"), namespace=namespace, first=index)


def pulled(weights: Weights) -> WeightBundle:
    """`packed` holds one object reference: this process pulls the weights once, straight from the store."""
    bundle: WeightBundle = ray.get(weights.packed[0])
    return bundle
