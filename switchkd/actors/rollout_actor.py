"""One rollout worker behind Ray: writes rollouts, puts them into the replay itself, takes new weights."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from switchkd.actors.environment import Secrets, prepare
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.assembly import make_worker
from switchkd.evaluate import EvalRow
from switchkd.replay import ReplayFull
from switchkd.sections import Config
from switchkd.types import Exam, Rollout, Task, WeightBundle, WorkReport


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"weights": 1})
class RolloutActor:
    """Calls of the default group run one after another; `offer_weights` comes in between (`reprefill`)."""

    def __init__(
        self,
        config: dict[str, Any],
        index: int,
        teachers: Sequence[Any],
        stop_ids: frozenset[int],
        replay: Any,
        secrets: Secrets,
        working_dir: str,
    ) -> None:
        prepare(secrets, working_dir)
        router = TeacherRouter(teachers, first=index) if teachers else None
        self.replay = replay
        self.offered: WeightBundle | None = None
        head = router.head() if router else None
        self.worker = make_worker(Config.model_validate(config), index, router, head, stop_ids, lambda: self.offered)

    def ready(self) -> bool:
        return True

    def load_weights(self, refs: list[Any]) -> None:
        """`refs` holds one object reference: this process pulls the weights once, straight from the store."""
        self.worker.load_weights(ray.get(refs[0]))

    @ray.method(concurrency_group="weights")
    def offer_weights(self, refs: list[Any]) -> None:
        """Seen by the running rollouts at their next round."""
        self.offered = ray.get(refs[0])

    def generate(self, tasks: list[Task]) -> WorkReport:
        return self.worker.generate(tasks, self._put)

    def examine(self, exam: Exam) -> list[EvalRow]:
        return self.worker.examine(exam)

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
