"""One learner rank behind Ray, and all ranks as one handle.

When a rank is lost the others cannot continue. `restart` ends them and starts new ranks, with a rendezvous on another
port; the run goes on from its last checkpoint.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from concurrent.futures import Future
from importlib import import_module
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import ObjectStoreFullError, OutOfDiskError

from switchkd.actors.heartbeat import HEARTBEAT_GROUP, HeartbeatActor, waiting_for
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.ray_futures import gather_ranks, run_in_thread
from switchkd.actors.replay_actor import RayReplayHandle
from switchkd.config.schema import Config
from switchkd.learner.rank import RankInfo, make_rank
from switchkd.types import PackedWeights, Rollout, StateLost

if TYPE_CHECKING:
    from switchkd.engines.models.lm_head import LMHeadState

MAX_RENDEZVOUS = 3
"""Tries to bring all ranks together."""


@ray.remote(max_restarts=0, concurrency_groups=HEARTBEAT_GROUP)
class LearnerActor(HeartbeatActor):
    def __init__(self, config: dict[str, Any], replay: Any, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.config = Config.model_validate(config)
        self.replay = RayReplayHandle(replay)
        if not self.config.is_fake:
            # `start` needs it: import it now, while the teacher loads, whose LM head `start` waits for
            import_module("transformers.models.auto.modeling_auto")

    def address(self) -> tuple[str, int]:
        """Address of this node and a free port, where the other ranks reach rank 0."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def start(self, rank_info: RankInfo, heads: dict[str, LMHeadState]) -> None:
        """Meet the other ranks and load the student."""
        self.rank = make_rank(self.config, rank_info, heads, self._fetch)

    def _fetch(self, rollout_ids: list[int]) -> list[Rollout]:
        with waiting_for("the replay"):
            return self.replay.fetch(rollout_ids).result()

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of `learner.rank.LearnerRank`. Packed weights are returned as a list with one reference to the
        object store. Raises OSError where they do not fit."""
        answer = getattr(self.rank, method)(*args)
        if not isinstance(answer, PackedWeights):
            return answer
        try:
            return [ray.put(answer)]
        except (OutOfDiskError, ObjectStoreFullError) as error:  # the rank lives, and the call can be repeated
            size = sum(bucket.nbytes for bucket in answer.buckets) / 1e9
            raise OSError(
                errno.ENOSPC,
                f"no room in Ray's object store for a version of {size:.3g} GB, and less than 5% of the disk behind it "
                "is free: free some, or give more memory (cluster.object_store_gb, or ray start --object-store-memory)",
            ) from error


class LearnerGroup:
    """All ranks as one `handles.LearnerHandle`: a call enters every rank, rank 0 answers. `make` starts all actors."""

    def __init__(self, make: Callable[[], list[Any]]) -> None:
        self.make = make
        self.ranks: list[Any] = make()
        self.heads: dict[str, LMHeadState] = {}

    def start(self, heads: dict[str, LMHeadState]) -> Future[None]:
        """Connect the ranks and load the student."""
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
        starting = []
        for i, rank in enumerate(self.ranks):
            info = RankInfo(rank=i, local_rank=i, world_size=world, master_addr=address, master_port=port)
            starting.append(rank.start.remote(info, heads))
        gather_ranks(starting).result()

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

    def __getattr__(self, method: str) -> Callable[..., Future[Any]]:
        """Return a method of `learner.rank.LearnerRank` that every rank enters."""
        return lambda *args: gather_ranks([rank.call.remote(method, *args) for rank in self.ranks])
