"""The replay behind Ray. It writes trained rollouts and its part of the checkpoint itself.

Ray restarts a dead one empty: until `restore` has filled it, every call raises StateLost.
"""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import ray

from switchkd.actors.heartbeat import HEARTBEAT_GROUP, HeartbeatActor
from switchkd.actors.process_setup import Secrets, prepare
from switchkd.actors.ray_futures import retry_until_alive
from switchkd.config.schema import Config
from switchkd.data.build import make_replay
from switchkd.types import StateLost


@ray.remote(max_restarts=-1, max_task_retries=0, num_cpus=0, concurrency_groups=HEARTBEAT_GROUP)
class ReplayActor(HeartbeatActor):
    def __init__(self, config: dict[str, Any], run_dir: str, secrets: Secrets, working_dir: str) -> None:
        prepare(secrets, working_dir)
        self.replay = make_replay(Config.model_validate(config), Path(run_dir))
        self.restored = False

    def progress_counter(self) -> int:
        return self.replay.num_put

    def call(self, method: str, *args: Any) -> Any:
        """Call a method of `data.replay.Replay`. Raises StateLost before `restore`; `rewind` then returns False, and
        `flush` has nothing to write."""
        if not self.restored and method != "restore":
            if method in ("rewind", "flush"):
                return False
            raise StateLost("the replay died")
        answer = getattr(self.replay, method)(*args)
        self.restored = True
        return answer


class RayReplayHandle:
    """The methods of `data.replay.Replay`, as futures, which wait while Ray restarts the actor."""

    def __init__(self, actor: Any) -> None:
        self.actor = actor

    def __getattr__(self, method: str) -> Any:
        def call(*args: Any) -> Future[Any]:
            return retry_until_alive(lambda: self.actor.call.remote(method, *args))

        return call
