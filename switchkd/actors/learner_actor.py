"""One learner rank behind Ray, and the gang of them as one handle.

A gang lives and dies together: when a rank is lost its peers cannot continue, and the run goes on from its last
checkpoint.
"""

from __future__ import annotations

import socket
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from switchkd.actors.environment import Secrets, prepare
from switchkd.actors.futures import gathered
from switchkd.assembly import Gang, LearnerRank
from switchkd.engines.heads import HeadArrays
from switchkd.sections import Config
from switchkd.types import BatchPlan, Rollout, StepResult


@ray.remote(max_restarts=0)
class LearnerActor:
    def __init__(self, config: dict[str, Any], replay: Any, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.config = Config.model_validate(config)
        self.replay = replay

    def address(self) -> tuple[str, int]:
        """Where rank 0 can be met: this node's address and a free port."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, gang: Gang, heads: dict[str, HeadArrays]) -> None:
        """Meet the other ranks and load the student."""
        self.rank = LearnerRank(self.config, gang, heads, self._fetch)

    def _fetch(self, rollout_ids: list[int]) -> list[Rollout]:
        return ray.get(self.replay.fetch.remote(rollout_ids))

    def step(self, plan: BatchPlan, lr: float) -> StepResult:
        return self.rank.step(plan, lr)

    def publish(self, version: int) -> list[Any]:
        """Rank 0 puts the weights into the object store once; the others only take part in gathering them."""
        bundle = self.rank.publish(version)
        return [] if bundle is None else [ray.put(bundle)]

    def save(self, folder: Path, tag: str) -> None:
        self.rank.save(folder, tag)

    def load(self, folder: Path, tag: str) -> None:
        self.rank.load(folder, tag)

    def export(self, folder: Path) -> None:
        self.rank.export(folder)


class LearnerGroup:
    """All ranks as one `house.LearnerHandle`: every call enters every rank, rank 0 answers."""

    def __init__(self, ranks: list[Any]) -> None:
        self.ranks = ranks

    def start(self, heads: dict[str, HeadArrays]) -> Future[Any]:
        address, port = ray.get(self.ranks[0].address.remote())
        world = len(self.ranks)
        heads_ref = ray.put(heads)
        return gathered(
            [
                rank.start.remote(
                    Gang(rank=i, local_rank=i, world_size=world, master_addr=address, master_port=port), heads_ref
                )
                for i, rank in enumerate(self.ranks)
            ]
        )

    def _all(self, method: str, *args: Any) -> Future[Any]:
        return gathered([getattr(rank, method).remote(*args) for rank in self.ranks])

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
