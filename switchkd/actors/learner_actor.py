"""One learner rank behind Ray, and the gang of them as one handle.

A gang lives and dies together: when a rank is lost its peers cannot continue. `restart` ends them and brings a new gang
together on another port; the run goes on from its last checkpoint.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from switchkd.actors.heartbeat import GROUP, Health
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.ray_futures import in_thread, of_gang, patient
from switchkd.config.schema import Config
from switchkd.engines.models.lm_head import HeadArrays
from switchkd.learner.rank import Gang, LearnerRank
from switchkd.types import BatchPlan, Rollout, StateLost, StepResult

MEETINGS = 3
"""So many gangs are brought together until one stays whole."""


@ray.remote(max_restarts=0, concurrency_groups=GROUP)
class LearnerActor(Health):
    def __init__(self, config: dict[str, Any], replay: Any, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.config = Config.model_validate(config)
        self.replay = replay
        # what `start` needs and takes seconds, while the teacher, whose output head `start` waits for, is loading
        import_module("transformers.models.auto.modeling_auto")

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met: this node's address and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, gang: Gang, heads: dict[str, HeadArrays]) -> None:
        """Meet the other ranks and load the student."""
        self.rank = LearnerRank(self.config, gang, heads, self._fetch)

    def _fetch(self, rollout_ids: list[int]) -> list[Rollout]:
        found: list[Rollout] = patient(partial(self.replay.fetch.remote, rollout_ids)).result()
        return found

    def step(self, plan: BatchPlan, lr: float) -> StepResult:
        return self.rank.step(plan, lr)

    def publish(self, version: int) -> list[Any]:
        """Rank 0 puts the weights into the object store once; the others only take part in gathering them. Raises
        OSError where there is no room."""
        bundle = self.rank.publish(version)
        if bundle is None:
            return []
        try:
            return [ray.put(bundle)]
        except (OutOfDiskError, ObjectStoreFullError) as error:  # the rank lives, and can be asked again
            size = sum(bucket.nbytes for bucket in bundle.buckets) / 1e9
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
        self.heads: dict[str, HeadArrays] = {}

    def start(self, heads: dict[str, HeadArrays]) -> Future[None]:
        """Done when the ranks have met and hold the student."""
        self.heads = heads
        return in_thread(self._come_together)

    def _come_together(self) -> None:
        for _ in range(MEETINGS - 1):
            try:
                return self._meet()
            except StateLost:
                self._anew()
        self._meet()

    def _meet(self) -> None:
        address, port = of_gang([self.ranks[0].address.remote()]).result()
        world = len(self.ranks)
        heads = ray.put(self.heads)
        gangs = [
            Gang(rank=i, local_rank=i, world_size=world, master_addr=address, master_port=port) for i in range(world)
        ]
        of_gang([rank.start.remote(gang, heads) for rank, gang in zip(self.ranks, gangs, strict=True)]).result()

    def restart(self) -> Future[None]:
        self._anew()
        return in_thread(self._come_together)

    def _anew(self) -> None:
        self.close()
        self.ranks = self.make()

    def close(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        self.ranks = []

    def _all(self, method: str, *args: Any) -> Future[Any]:
        return of_gang([getattr(rank, method).remote(*args) for rank in self.ranks])

    def step(self, plan: BatchPlan, lr: float) -> Future[StepResult]:
        return self._all("step", plan, lr)

    def publish(self, version: int) -> Future[Any]:
        return self._all("publish", version)

    def save(self, folder: Path, tag: str) -> Future[None]:
        return self._all("save", folder, tag)

    def load(self, folder: Path, tag: str) -> Future[None]:
        return self._all("load", folder, tag)

    def export(self, folder: Path) -> Future[None]:
        return self._all("export", folder)
