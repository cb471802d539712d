"""One rollout worker behind Ray: generates rollouts, puts them into the replay, fetches new weights."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import ray
from ray import cloudpickle

from switchkd.actors.heartbeat import HEARTBEAT_GROUP, HeartbeatActor, waiting_for
from switchkd.actors.pool_client import PoolClient
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.replay_actor import RayReplayHandle
from switchkd.actors.teacher_router import TeacherRouter
from switchkd.config.schema import Config
from switchkd.rollout.build import make_worker
from switchkd.types import EvalRow, EvalShard, PackedWeights, ReplayFull, Rollout, RolloutTask, WeightRef, WorkReport


@ray.remote(max_restarts=-1, max_task_retries=0, concurrency_groups={"weights": 1, **HEARTBEAT_GROUP})
class RolloutActor(HeartbeatActor):
    """Calls of the default group run one after another; `push_weights` runs beside them (`reprefill`)."""

    def __init__(
        self,
        config: dict[str, Any],
        index: int,
        handles: bytes,
        stop_ids: frozenset[int],
        secrets: Secrets,
        working_dir: str,
    ) -> None:
        """`handles`, pickled: the teachers' pools, each with the run's number there, and the replay."""
        prepare(secrets, working_dir)
        pools, replay = cloudpickle.loads(handles)
        self.replay = RayReplayHandle(replay)
        self.pushed: PackedWeights | None = None
        routers = {
            name: TeacherRouter(PoolClient(pool, f"{namespace}/{index}"), namespace=namespace, first=index)
            for name, (pool, namespace) in pools.items()
        }
        teachers = {name: (router, router.lm_head_state()) for name, router in routers.items()}
        self.worker = make_worker(Config.model_validate(config), teachers, stop_ids, self._newer)

    @ray.method(concurrency_group="weights")
    def push_weights(self, weights: WeightRef) -> None:
        """Fetch weights that the running rollouts load at their next round. Calls may arrive out of order."""
        packed = fetch_weights(weights)
        if self.pushed is None or packed.order > self.pushed.order:
            self.pushed = packed

    def generate(self, tasks: list[RolloutTask], weights: WeightRef | None) -> WorkReport:
        self.worker.load_weights(weights, fetch_weights)
        return self.worker.generate(tasks, self._put)

    def evaluate(self, shard: EvalShard, weights: WeightRef | None) -> list[EvalRow]:
        self.worker.load_weights(weights, fetch_weights)
        return self.worker.evaluate(shard)

    def progress_counter(self) -> int:
        return self.worker.progress_counter

    def _newer(self) -> PackedWeights | None:
        """Return the pushed weights, if they are newer than those in use."""
        pushed = self.pushed
        return pushed if pushed is not None and pushed.order > self.worker.order else None

    def _put(self, rollouts: list[Rollout]) -> None:
        """Put rollouts into the replay; wait while it is full or restarting."""
        with waiting_for("the replay"):
            while rollouts:
                try:
                    self.replay.put(rollouts).result()
                    return
                except ReplayFull as full:
                    rollouts = [rollout for rollout in rollouts if rollout.rollout_id in full.refused]
                    time.sleep(0.2)


@waiting_for("weights")
def fetch_weights(weights: WeightRef) -> PackedWeights:
    """Fetch the weights from the object store; `weights.ref` holds one reference."""
    packed: PackedWeights = ray.get(weights.ref[0])
    return replace(packed, incarnation=weights.incarnation)
