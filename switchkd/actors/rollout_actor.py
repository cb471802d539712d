"""One rollout worker behind Ray: writes rollouts, puts them into the replay itself, takes new weights."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray import cloudpickle

from switchkd.actors.environment import Secrets, prepare
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.assembly import make_worker
from switchkd.evaluate import EvalRow
from switchkd.house import Weights
from switchkd.replay import ReplayFull
from switchkd.sections import Config
from switchkd.types import Exam, Rollout, Task, WeightBundle, WorkReport


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"weights": 1})
class RolloutActor:
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
        """`handles`: of the teachers and of the replay, pickled."""
        prepare(secrets, working_dir)
        teachers, self.replay = cloudpickle.loads(handles)
        router = TeacherRouter(teachers, first=index) if teachers else None
        self.offered: WeightBundle | None = None
        head = router.head() if router else None
        self.worker = make_worker(Config.model_validate(config), index, router, head, stop_ids, self._newer)

    def ready(self) -> bool:
        return True

    @ray.method(concurrency_group="weights")
    def offer(self, weights: Weights) -> None:
        """Seen by the running rollouts at their next round."""
        self.offered = _pulled(weights)

    def generate(self, tasks: list[Task], weights: Weights | None) -> WorkReport:
        self._load(weights)
        return self.worker.generate(tasks, self._put)

    def examine(self, exam: Exam, weights: Weights | None) -> list[EvalRow]:
        self._load(weights)
        return self.worker.examine(exam)

    def _load(self, weights: Weights | None) -> None:
        if weights is not None and weights.version > self.worker.version:
            self.worker.load_weights(_pulled(weights))

    def _newer(self) -> WeightBundle | None:
        """What was offered, unless it has been loaded since."""
        offered = self.offered
        return offered if offered is not None and offered.version > self.worker.version else None

    def _put(self, rollouts: list[Rollout]) -> None:
        """Back-pressure: a full replay makes the worker wait."""
        while rollouts:
            try:
                ray.get(self.replay.put.remote(rollouts))
                return
            except ReplayFull as full:
                refused = set(full.refused)
                rollouts = [rollout for rollout in rollouts if rollout.rollout_id in refused]
                time.sleep(0.2)


def _pulled(weights: Weights) -> WeightBundle:
    """`packed` holds one object reference: this process pulls the weights once, straight from the store."""
    bundle: WeightBundle = ray.get(weights.packed[0])
    return bundle
