"""One learner rank behind Ray, and the gang of them as one handle.

A gang lives and dies together: when a rank is lost its peers cannot continue. `restart` ends them and brings a new gang
together on another port; the run goes on from its last checkpoint.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from switchkd.actors.heartbeat import GROUP, Health
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.ray_futures import gather_ranks, run_in_thread
from switchkd.actors.replay_actor import RayReplayHandle
from switchkd.config.schema import Config
from switchkd.engines.models.lm_head import LMHeadState
from switchkd.learner.rank import LearnerRank, RankInfo
from switchkd.types import BatchAssignment, Rollout, StateLost, StepResult

MAX_RENDEZVOUS = 3
"""So many gangs are brought together until one stays whole."""


@ray.remote(max_restarts=0, concurrency_groups=GROUP)
class LearnerActor(Health):
    def __init__(self, config: dict[str, Any], replay: Any, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.config = Config.model_validate(config)
        self.replay = RayReplayHandle(replay)
        # what `start` needs and takes seconds, while the teacher, whose output head `start` waits for, is loading
        import_module("transformers.models.auto.modeling_auto")

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met: this node's address and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, gang: RankInfo, heads: dict[str, LMHeadState]) -> None:
        """Meet the other ranks and load the student."""
        self.rank = LearnerRank(self.config, gang, heads, self._fetch)

    def _fetch(self, rollout_ids: list[int]) -> list[Rollout]:
        rollouts: list[Rollout] = self.replay.fetch(rollout_ids).result()
        return rollouts

    def step(self, assignment: BatchAssignment, lr: float) -> StepResult:
        return self.rank.step(assignment, lr)

    def publish(self, version: int) -> list[Any]:
        """Rank 0 puts the weights into the object store once; the others only take part in gathering them. Raises
        OSError where there is no room."""
        packed = self.rank.publish(version)
        if packed is None:
            return []
        try:
            return [ray.put(packed)]
        except (OutOfDiskError, ObjectStoreFullError) as error:  # the rank lives, and can be asked again
            size = sum(bucket.nbytes for bucket in packed.buckets) / 1e9
            raise OSError(
                errno.ENOSPC,
                f"no room in Ray's object store for a version of {size:.3g} GB, and less than 5% of the disk behind it "
                "is free: free some, or give more memory (cluster.object_store_gb, or ray start --object-store-memory)",
            ) from error

    def save(self, folder: Path, tag: str) -> None:
        self.rank.save(folder, tag)

    def load(self, folder: Path, tag: str) -> None:
        self.rank.load(folder, tag)

    def export(self, folder: Path) -> None:
        self.rank.export(folder)


class LearnerGroup:
    """All ranks as one `house.LearnerHandle`: every call enters every rank, rank 0 answers."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        """`make` places the actors of a gang."""
        self.make = make
        self.ranks: list[Any] = make()
        self.heads: dict[str, LMHeadState] = {}

    def start(self, heads: dict[str, LMHeadState]) -> Future[None]:
        """Done when the ranks have met and hold the student."""
        self.heads = heads
        return run_in_thread(self._start_ranks)

    def _start_ranks(self) -> None:
        for _ in range(MAX_RENDEZVOUS - 1):
            try:
                return self._rendezvous()
            except StateLost:
                self._respawn()
        self._rendezvous()

    def _rendezvous(self) -> None:
        address, port = gather_ranks([self.ranks[0].address.remote()]).result()
        world = len(self.ranks)
        heads = ray.put(self.heads)
        gangs = [
            RankInfo(rank=i, local_rank=i, world_size=world, master_addr=address, master_port=port)
            for i in range(world)
        ]
        gather_ranks([rank.start.remote(gang, heads) for rank, gang in zip(self.ranks, gangs, strict=True)]).result()

    def restart(self) -> Future[None]:
        self._respawn()
        return run_in_thread(self._start_ranks)

    def _respawn(self) -> None:
        self.close()
        self.ranks = self.make()

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def _all(self, method: str, *args: Any) -> Future[Any]:
        return gather_ranks([getattr(rank, method).remote(*args) for rank in self.ranks])

    def step(self, assignment: BatchAssignment, lr: float) -> Future[StepResult]:
        return self._all("step", assignment, lr)

    def publish(self, version: int) -> Future[Any]:
        return self._all("publish", version)

    def save(self, folder: Path, tag: str) -> Future[None]:
        return self._all("save", folder, tag)

    def load(self, folder: Path, tag: str) -> Future[None]:
        return self._all("load", folder, tag)

    def export(self, folder: Path) -> Future[None]:
        return self._all("export", folder)
